"""What the Chat screen shows before and above the first message: starter prompts, time and memory for loading
the model, and facts about the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets.option_list import Option

from qlora_tui.chat.chat_sources import chat_bytes, checkpoint_step
from qlora_tui.chat.chat_types import ADAPTER, BASE
from qlora_tui.data.sources import first_exchanges, prompt_at
from qlora_tui.formatting import (
    format_bytes,
    format_duration,
    format_loss,
    format_number,
    pluralize,
    short_model_name,
)
from qlora_tui.memory import Device
from qlora_tui.memory.estimate import precision_of
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import PhaseChanged, SampleGenerated, Started
from qlora_tui.runs.result_weights import better_checkpoint, summary_weights
from qlora_tui.runs.run_summary import RunSummary, data_words, summarize
from qlora_tui.runs.task_metrics.answer_metrics import match_answers
from qlora_tui.runs.task_metrics.task_evaluation import read_task_evaluation
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.columns import fact_lines
from qlora_tui.tui.render.labels import PRECISION_NAMES, targets_words, verdict_content
from qlora_tui.tui.render.meters import labeled
from qlora_tui.tui.screens.chat.recorded_answers import RecordedAnswers, recorded_lines
from qlora_tui.tui.screens.runs.run_list import settings_lines
from qlora_tui.tui.widgets.controls import HEADING, ViList

_MAX_OF_KIND = 60
"""Maximum number of prompts of each kind that are read."""
_FEW = 4
"""Minimum number of starter prompts before the first message. With more free rows, there are more prompts."""
_LATER, _LATER_IF_TALL = 1, 3
"""Minimum number of starter prompts during a conversation, in a short window and in a tall window."""
_UNRELATED = ("Name three uses for a paper clip.", "How do I boil an egg?")
"""Prompts on topics that few data sets cover, to see whether the adapter changes unrelated answers too."""
_HEADING = "Suggested messages"
HEADING_ROWS = 2
"""Number of lines above the starter prompts if they have a heading: an empty one and the heading."""
_FIRST_ROWS = 2000
"""Number of rows at the beginning of a file in which validation questions are looked up. The limit keeps the
search short.
"""
_MAX_RECORDED = 12
_LEAST_EXPECTED = 36
"""Minimum number of cells next to the starter prompts for the expected answers, including their label."""
_SCROLL = 3
"""Page Up and Page Down scroll the conversation this many times as far as the other scroll keys do."""
_LABEL = 10


@dataclass(frozen=True)
class Starter:
    """A prompt to begin with."""

    prompt: str
    kind: str
    """Where the prompt comes from, such as ``sample prompt``."""
    expected: str = ""
    """The answer in the data; empty if the data has none, or if the recorded answers show it."""


@dataclass(frozen=True, kw_only=True)
class ChatStart:
    """What the Chat screen shows before the first message."""

    prompts: tuple[Starter, ...] = ()
    """The starter prompts, without the unrelated prompts."""
    recorded: tuple[RecordedAnswers, ...] = ()
    load_s: float | None = None
    """Seconds that the run's last attempt took to load the model; None if unknown."""
    load_bytes: int | None = None
    """Upper estimate of the chat's memory, in bytes; None if unknown."""
    summary: RunSummary | None = None


def read_start(recipe: Recipe, run: RunDir | None, device: Device | None) -> ChatStart:
    """Read the contents of the screen for a run or, if ``run`` is None, for the model of a recipe. Reads
    files, so call it in a thread. ``device``: the device for which memory is estimated; None if it is not
    known yet.
    """
    summary = None if run is None else summarize(run)
    questions = _validation_answers(recipe, summary) if summary is not None else []
    samples, load_s = _events(run) if run is not None else ([], None)
    starters = [Starter(each.prompt, "validation question") for each in questions]
    starters += [Starter(prompt, "sample prompt") for prompt in recipe.training.sample_prompts]
    if not questions:
        kind = "validation question" if recipe.data.validation_path else "from the data"
        exchanges = first_exchanges(recipe.data, _MAX_OF_KIND)
        starters += [Starter(prompt, kind, expected) for prompt, expected in exchanges]
    return ChatStart(
        prompts=tuple({each.prompt: each for each in reversed(starters)}.values())[::-1],
        recorded=(*questions, *_answers_by_step(samples))[:_MAX_RECORDED],
        load_s=load_s,
        load_bytes=None if device is None else chat_bytes(recipe, device),
        summary=summary,
    )


def _validation_answers(recipe: Recipe, summary: RunSummary) -> list[RecordedAnswers]:
    """Return the first validation questions, with the answers that the run's evaluation recorded. If the app
    proposes a checkpoint, the answers of the final adapter are labeled with the step of its weights.
    """
    evaluation = read_task_evaluation(summary.run)
    better = better_checkpoint(summary, dict(summary.run.checkpoints()))
    adapter = ADAPTER if better is None else summary_weights(summary, None)
    rows = evaluation.rows if evaluation is not None else ()
    recorded: list[RecordedAnswers] = []
    for row, judged in zip(rows, match_answers(rows), strict=True):
        if row.row <= _FIRST_ROWS and (prompt := prompt_at(recipe.data, row.source, row.row, row.file)):
            answers = ((BASE, row.base_raw or row.base), (adapter, row.adapter_raw or row.adapter))
            matches = {
                name: is_match
                for (name, _), is_match in zip(answers, judged, strict=True)
                if is_match is not None
            }
            expected = row.reference_raw or row.reference
            recorded.append(RecordedAnswers(prompt, answers, expected=expected, matches=matches))
        if len(recorded) == _MAX_RECORDED:
            break
    return recorded


def _events(run: RunDir) -> tuple[list[SampleGenerated], float | None]:
    """Return the answers to the sample prompts, and the seconds that the last attempt spent loading (None if
    unknown).
    """
    samples: list[SampleGenerated] = []
    began_at, load_s = None, 0.0
    with suppress(OSError):
        for event in EventTail(run.events_path).drain():
            if isinstance(event, SampleGenerated):
                samples.append(event)
            elif isinstance(event, Started):
                began_at, load_s = None, 0.0
            elif isinstance(event, PhaseChanged):
                if began_at is not None:
                    load_s += event.at - began_at
                began_at = event.at if event.phase == "loading" else None
    return samples, load_s or None


def _answers_by_step(samples: Sequence[SampleGenerated]) -> list[RecordedAnswers]:
    """Return the answers to each sample prompt, ordered by step. Equal answers at successive steps are
    merged. Prompts with answers at only one step are left out.
    """
    by_prompt: dict[str, dict[int, str]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, {})[sample.step] = sample.answer
    return [
        RecordedAnswers(prompt, _without_repetition(answers), by_step=True)
        for prompt, answers in by_prompt.items()
        if len(answers) > 1
    ]


def _without_repetition(answers: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    """Return (name, answer) pairs. Equal answers at successive steps are merged into one pair with a name
    such as ``steps 20 to 60``.
    """
    pairs = []
    for answer, group in groupby(answers.items(), key=itemgetter(1)):
        first, *later = (step for step, _ in group)
        pairs.append((f"steps {first:,} to {later[-1]:,}" if later else f"step {first:,}", answer))
    return tuple(pairs)


class Starters(ViList):
    """The starter prompts: questions from the validation data, sample prompts of the recipe, and unrelated
    prompts.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Ask"),
        Binding("pageup,ctrl+u", f"screen.scroll_conversation({-_SCROLL})", show=False),
        Binding("pagedown,ctrl+d", f"screen.scroll_conversation({_SCROLL})", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(id="starters", classes="quiet")
        self._prompts: tuple[Starter, ...] = ()
        self._has_heading = False
        self._was_moved = False
        """Whether the user has moved the cursor since these prompts were offered."""

    def offer(self, prompts: tuple[Starter, ...], *, has_heading: bool) -> None:
        """Show these prompts. If the user has moved the cursor to one of them, the cursor stays on this
        prompt; otherwise, the cursor is on the first prompt.
        """
        if (prompts, has_heading) != (self._prompts, self._has_heading):
            texts, chosen = [each.prompt for each in prompts], self.selected_prompt
            self._was_moved = chosen in texts
            self._prompts, self._has_heading = prompts, has_heading
            select = f"{texts.index(chosen) if self._was_moved else 0}"
            self.show(lambda width: _starter_lines(prompts, width, has_heading=has_heading), select=select)

    def prompt(self, option: Option) -> str:
        """Return the full prompt of an option."""
        return self._prompts[int(option.id or 0)].prompt

    @property
    def selected_prompt(self) -> str:
        """The full prompt under the cursor; empty if the user has not moved the cursor."""
        if self.highlighted is None or not self._was_moved:
            return ""
        return self.prompt(self.get_option_at_index(self.highlighted))

    def action_cursor_down(self) -> None:
        self._was_moved = True
        super().action_cursor_down()

    def action_cursor_up(self) -> None:
        self._was_moved = True
        super().action_cursor_up()


def offered_prompts(
    start: ChatStart, asked: Collection[str], rows: int, *, is_tall: bool
) -> tuple[Starter, ...]:
    """Return the starter prompts to offer: those of ``start``, followed by :data:`_UNRELATED`. Return as many
    as there are rows, but at least a minimum number. If there are too many prompts, leave out the last ones
    or, before the first message, the last ones of ``start`` that belong to the most frequent kind.

    Args:
        start: The contents of the screen.
        asked: The prompts that were sent in the conversation, which are not offered again. Empty before the
            first message.
        rows: Number of free rows.
        is_tall: Whether the window is tall, so that more prompts are offered during a long conversation.
    """
    own = [each for each in start.prompts if each.prompt not in asked]
    unrelated = [Starter(prompt, "unrelated") for prompt in _UNRELATED if prompt not in asked]
    least = _FEW if not asked else _LATER_IF_TALL if is_tall else _LATER
    most = max(least, rows)
    if asked:
        return (*own, *unrelated)[:most]
    while len(own) > most - len(unrelated):
        kinds = [each.kind for each in own]
        largest = max(reversed(kinds), key=kinds.count)
        del own[len(own) - 1 - kinds[::-1].index(largest)]
    return (*own, *unrelated)


def _starter_lines(offered: Sequence[Starter], width: int, *, has_heading: bool) -> list[tuple[str, Content]]:
    """Return an (id, line) pair for each prompt. With ``has_heading``, an empty line and a heading come
    first.

    If there is room, the expected answers are in a second column. The name of each kind of prompt is at the
    right end of the heading or of the first prompt of its kind.
    """
    prompts = [Content(" ".join(each.prompt.split())) for each in offered]
    cells = max((prompt.cell_length for prompt in prompts), default=0)
    cells = max(cells, len(_HEADING)) if has_heading else cells
    muted = partial(Content.styled, style="$text-muted")
    first_kind = offered[0].kind if has_heading and offered else ""
    lines, kind, heading = [], first_kind, Content.styled(_HEADING, "bold $primary")
    has_title = False
    for number, (prompt, starter) in enumerate(zip(prompts, offered, strict=True)):
        shown = (
            "" if starter.kind == kind else f"  {starter.kind}" if kind else f"  suggested: {starter.kind}"
        )
        kind = starter.kind
        if starter.expected and width - len(kind) - 4 - cells > _LEAST_EXPECTED:
            if not has_title:
                has_title = True
                heading = heading.pad_right(cells + 5 - len(_HEADING)) + Content.styled(
                    "expected answer", "dim"
                )
            expected = " ".join(starter.expected.split())
            column = muted(expected if has_heading else f"expected: {expected}")
            prompt = prompt.pad_right(cells - prompt.cell_length) + "   " + column
        prompt = prompt.truncate(max(0, width - 2 - len(shown)), ellipsis=True, pad=True)
        lines.append((str(number), Content.assemble("  ", prompt, (shown, "dim"))))
    if not has_heading:
        return lines
    heading = heading.truncate(max(0, width - len(first_kind)), pad=True) + muted(first_kind)
    return [(f"{HEADING}gap", Content("")), (f"{HEADING}suggested", heading), *lines]


def start_lines(
    start: ChatStart,
    recipe: Recipe,
    opened: str,
    width: int,
    height: int,
    *,
    adapter_name: str,
    is_loaded: bool,
    is_described: bool,
    folds: bool,
) -> list[Content]:
    """Return lines about the model and the adapter, followed by the recorded answers.

    Args:
        start: The contents of the screen.
        recipe: The recipe whose model answers.
        opened: The prompt whose recorded answers have priority if not all answers fit.
        width: Width of a line, in cells.
        height: Maximum number of lines.
        adapter_name: The adapter that answers. The lines say which step its weights are from.
        is_loaded: Whether the model is loaded.
        is_described: Whether another panel describes the run.
        folds: Whether messages follow below. If so, return only one line about the model and one line about
            the recorded answers.
    """
    weights = weights_of(start, adapter_name)
    facts = _model_facts(start, recipe, weights, is_loaded=is_loaded, is_described=is_described)
    if folds:
        lines = [] if is_described and is_loaded else [_summary_line(start, facts, weights, width)]
        if start.recorded:
            prompts = pluralize(len(start.recorded), "prompt")
            hint = f"Recorded answers to {prompts} are hidden. "
            hint += f"{key_name('chat.clear')} shows them in a new conversation"
            lines.append(highlight_keys(hint, "$text-muted").truncate(width, ellipsis=True))
        return lines
    above = fact_lines(facts, width)
    if not start.recorded:
        return above
    return [*above, Content(""), *recorded_lines(start.recorded, opened, width, height - len(above) - 1)]


def weights_of(start: ChatStart, adapter_name: str) -> str:
    """Return of which step the weights of an adapter are, such as ``step 1,200 (last)``; empty for the base
    model and GGUF files.
    """
    step = checkpoint_step(adapter_name)
    if start.summary is None or (step is None and adapter_name != ADAPTER):
        return ""
    return summary_weights(start.summary, step)


def _summary_line(
    start: ChatStart, facts: Sequence[tuple[str, str | Content]], weights: str, width: int
) -> Content:
    """Return one line with as many facts as fit: all facts, or all with only the step of the weights, or this
    step and the cautions of the run's verdict, with or without the base model.
    """
    base, *others = [Content("") + value for _, value in facts]
    verdict = start.summary.verdict if start.summary is not None and others else None
    cautions = [] if verdict is None else [Content.styled(part, "$warning") for part in verdict.cautions]
    between = Content.styled(" · ", "$text-muted")
    step = [Content(f"weights: {weights}")] if weights and others else []
    # The result of the run is the last fact.
    brief = [*step, *cautions]
    choices = ([base, *others], [base, *step, *others[1:]], [base, *brief], brief or [base])
    lines = [between.join(parts) for parts in choices]
    fitting = [line for line in lines if line.cell_length <= width]
    return fitting[0] if fitting else lines[-1].truncate(width, ellipsis=True)


def _model_facts(
    start: ChatStart, recipe: Recipe, weights: str, *, is_loaded: bool, is_described: bool
) -> list[tuple[str, str | Content]]:
    """Return (label, value) pairs for the base model and, unless ``is_described``, for the adapter and what
    it has learned. Unless ``is_loaded``, the pairs include the time and memory for loading the base model.
    ``weights``: the step of the adapter's weights; empty if unknown.
    """
    base = f"{short_model_name(recipe.model.id)} ({PRECISION_NAMES[precision_of(recipe)]})"
    if not is_loaded:
        took = [] if start.load_s is None else [f"takes about {format_duration(start.load_s)}"]
        took += [] if start.load_bytes is None else [f"needs up to {format_bytes(start.load_bytes)}"]
        base += f" · loading {' and '.join(took)}" if took else ", loaded with the first message"
    facts: list[tuple[str, str | Content]] = [("base", Content.styled(base, "$text-muted"))]
    summary = start.summary
    if summary is not None and not is_described:
        lora = recipe.lora
        settings = f"{format_rank(lora)} alpha {format_number(lora.alpha)} {targets_words(recipe, 24)}"
        facts.append(("weights", " · ".join(filter(None, (weights, f"{settings} on {data_words(recipe)}")))))
        if summary.verdict is not None:
            sentence = verdict_content(summary.verdict)
            facts.append(("result", sentence))
        elif summary.best is not None:
            facts.append(("result", _best_words(*summary.best)))
    return facts


def run_lines(start: ChatStart, recipe: Recipe, adapter_name: str, width: int) -> list[Content]:
    """Return lines with the run's settings, the step of the adapter's weights, and the run's result."""
    lines, summary = settings_lines(recipe, width), start.summary
    if summary is None:
        return lines
    if weights := weights_of(start, adapter_name):
        lines.append(labeled("weights", weights, _LABEL))
    if summary.best is not None and summary.verdict is None:  # A verdict already says how far the loss fell.
        lines.append(labeled("best", _best_words(*summary.best), _LABEL))
    if summary.verdict is not None:
        lines += verdict_content(summary.verdict).wrap(width)
    return lines


def _best_words(loss: float, step: int) -> str:
    return f"validation {format_loss(loss)} at step {step:,}"
