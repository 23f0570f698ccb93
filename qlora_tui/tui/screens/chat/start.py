"""What the Chat screen shows before the first message: starter prompts, time and memory for loading the
model, and facts about the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets.option_list import Option

from qlora_tui.chat.chat_sources import chat_bytes
from qlora_tui.data.sources import first_prompt, prompt_at
from qlora_tui.formatting import format_bytes, format_duration, format_loss, format_progress, short_model_name
from qlora_tui.memory import Device
from qlora_tui.memory.estimate import precision_of
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import PhaseChanged, SampleGenerated, Started
from qlora_tui.runs.run_summary import RunSummary, summarize
from qlora_tui.runs.task_metrics.task_evaluation import read_task_evaluation
from qlora_tui.tui.key_names import highlight_keys, name_keys
from qlora_tui.tui.render.labels import PRECISION_NAMES, verdict_style
from qlora_tui.tui.render.meters import labeled
from qlora_tui.tui.screens.runs.run_list import settings_lines
from qlora_tui.tui.widgets.controls import ViList

_ASK = "▸ Enter asks the question under the cursor, {chat.write} lets you write your own."
_WRITE = "▸ Enter sends what you type, {chat.leave} goes back to the questions."
_MAX_OF_KIND = 5
"""Maximum number of prompts of each kind that are read."""
_FEW, _MANY = (2, 5), (5, 10)
"""Maximum numbers of starter prompts, as (of each kind, in total): in a low window, and in a high window."""
_UNRELATED = ("Name three uses for a paper clip.", "How do I boil an egg?")
"""Prompts on topics that few data sets cover, to see whether the adapter changes unrelated answers too."""
_FIRST_ROWS = 2000
"""Number of rows at the beginning of a file in which validation questions are looked up. A limit keeps the
wait short.
"""
_MAX_RECORDED = 12
_LEAST_ROWS = 3
"""Minimum number of lines to which a recorded answer is shortened."""
_ENOUGH_WHOLE = 2
"""If at least this many prompts fit with their whole recorded answers, answers are not shortened to make room
for further prompts.
"""
_COLUMN_GAP, _INDENT = 3, 2
_LABEL = 10


@dataclass(frozen=True)
class RecordedAnswers:
    """A prompt, with an answer from before training and an answer from after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class ChatStart:
    """What the Chat screen shows before the first message."""

    prompts: tuple[tuple[str, str], ...] = ()
    """(prompt, kind) of the starter prompts, except the unrelated prompts. An example of a kind is ``sample
    prompt``.
    """
    recorded: tuple[RecordedAnswers, ...] = ()
    columns: tuple[str, str] = ("", "")
    """Titles of the two columns of answers: ``base`` and ``adapter``, or ``step 0`` and ``step 60``."""
    load_s: float | None = None
    """Seconds that the run's last attempt took to load the model; None if unknown."""
    load_bytes: int | None = None
    """Upper estimate of the chat's memory, in bytes; None if unknown."""
    summary: RunSummary | None = None


def read_start(recipe: Recipe, run: RunDir | None, device: Device) -> ChatStart:
    """Read the contents of the screen for a run or, if ``run`` is None, for the model of a recipe. Reads
    files, so call it in a thread. ``device``: the device for which memory is estimated.
    """
    questions = _validation_answers(recipe, run) if run is not None else []
    samples, load_s = _events(run) if run is not None else ([], None)
    kinds = dict.fromkeys((each.prompt for each in questions[:_MAX_OF_KIND]), "validation question")
    for prompt in recipe.training.sample_prompts[:_MAX_OF_KIND]:
        kinds.setdefault(prompt, "sample prompt")
    if not questions and (prompt := first_prompt(recipe.data)):
        kinds.setdefault(prompt, "from the data")
    columns, recorded = ("base", "adapter"), questions
    if not recorded:
        recorded, columns = _before_and_after(samples)
    return ChatStart(
        prompts=tuple(kinds.items()),
        recorded=tuple(recorded[:_MAX_RECORDED]),
        columns=columns,
        load_s=load_s,
        load_bytes=chat_bytes(recipe, device),
        summary=None if run is None else summarize(run),
    )


def _validation_answers(recipe: Recipe, run: RunDir) -> list[RecordedAnswers]:
    """Return the answers of the run's evaluation to the first validation questions."""
    evaluation = read_task_evaluation(run)
    recorded: list[RecordedAnswers] = []
    for row in evaluation.rows if evaluation is not None else ():
        if row.row <= _FIRST_ROWS and (prompt := prompt_at(recipe.data, row.source, row.row, row.file)):
            recorded.append(RecordedAnswers(prompt, row.base, row.adapter))
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


def _before_and_after(samples: Sequence[SampleGenerated]) -> tuple[list[RecordedAnswers], tuple[str, str]]:
    """Return the answers to the sample prompts at the first and the last step that have answers, and the
    titles of the two columns. Without answers at two different steps, the list and the titles are empty.
    """
    if not samples or samples[0].step == samples[-1].step:
        return [], ("", "")
    before, after = samples[0].step, samples[-1].step
    first = {sample.prompt: sample.answer for sample in samples if sample.step == before}
    last = {sample.prompt: sample.answer for sample in samples if sample.step == after}
    recorded = [RecordedAnswers(prompt, first[prompt], last[prompt]) for prompt in first if prompt in last]
    return recorded, (f"step {before:,}", f"step {after:,}")


class Starters(ViList):
    """The starter prompts: questions from the validation data, sample prompts of the recipe, and unrelated
    prompts.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "Ask")]

    def __init__(self) -> None:
        super().__init__(id="starters", classes="quiet")
        self._prompts: tuple[tuple[str, str], ...] = ()

    def offer(self, prompts: tuple[tuple[str, str], ...]) -> None:
        """Show these (prompt, kind) pairs, with the cursor on the first."""
        if prompts != self._prompts:
            self._prompts = prompts
            self.show(lambda width: _starter_lines(prompts, width))

    def prompt(self, option: Option) -> str:
        """Return the full prompt of an option."""
        return self._prompts[int(option.id or 0)][0]


def offered_prompts(start: ChatStart, *, is_high: bool) -> tuple[tuple[str, str], ...]:
    """Return (prompt, kind) for the starter prompts to offer, the unrelated prompts last. ``is_high``:
    whether the window has room for more prompts.
    """
    of_kind, of_all = _MANY if is_high else _FEW
    offered: list[tuple[str, str]] = []
    for prompt, kind in start.prompts:
        if sum(kind == other for _, other in offered) < of_kind and len(offered) < of_all - 1:
            offered.append((prompt, kind))
    return (*offered, *[(prompt, "unrelated") for prompt in _UNRELATED][: of_all - len(offered)])


def _starter_lines(offered: Sequence[tuple[str, str]], width: int) -> list[tuple[str, Content]]:
    """Return (id, line) for each (prompt, kind), with the kind at the right end of the line."""
    lines = []
    for number, (prompt, kind) in enumerate(offered):
        room = max(0, width - len(kind) - 4)
        shown = Content(" ".join(prompt.split())).truncate(room, ellipsis=True, pad=True)
        lines.append((str(number), Content.assemble("▸ ", shown, "  ", (kind, "dim"))))
    return lines


def start_lines(
    start: ChatStart, recipe: Recipe, width: int, *, is_loaded: bool, is_writing: bool
) -> list[Content]:
    """Return lines that say which keys to press and, unless the model is loaded, how much time and memory
    loading the model takes.

    Args:
        start: The contents of the screen.
        recipe: The recipe whose model answers.
        width: Width of a line, in cells.
        is_loaded: Whether the model is loaded.
        is_writing: Whether the prompt field has the focus.
    """
    lines = [highlight_keys(name_keys(_WRITE if is_writing else _ASK))]
    if not is_loaded:
        took = [] if start.load_s is None else [f"takes about {format_duration(start.load_s)}"]
        took += [] if start.load_bytes is None else [f"needs up to {format_bytes(start.load_bytes)}"]
        model = f"{short_model_name(recipe.model.id)} ({PRECISION_NAMES[precision_of(recipe)]})"
        words = f"Loading {model} {' and '.join(took)}." if took else f"The first message loads {model}."
        lines.append(Content.styled(words, "$text-muted").truncate(width, ellipsis=True))
    return lines


def recorded_title(start: ChatStart) -> Content:
    """Return the title of the panel of recorded answers."""
    before, after = start.columns
    return Content.assemble("Recorded answers", (f" · {before} and {after}", "not bold $text-muted"))


def recorded_lines(start: ChatStart, width: int, height: int) -> list[Content]:
    """Return each prompt that fits, with its answers before and after training in two columns. If fewer than
    :data:`_ENOUGH_WHOLE` prompts fit with their whole answers, answers are shortened.
    """
    whole: list[Content] = []
    for number, each in enumerate(start.recorded):
        lines = _answer_lines(each, start.columns, width, None)
        if len(whole) + len(lines) > height:
            if number >= _ENOUGH_WHOLE:
                return whole
            break
        whole += lines
    else:
        return whole
    count = max(1, min(len(start.recorded), height // (_LEAST_ROWS + 1)))
    rows = max(_LEAST_ROWS, height // count - 1)
    return [
        line for each in start.recorded[:count] for line in _answer_lines(each, start.columns, width, rows)
    ][:height]


def _answer_lines(
    answers: RecordedAnswers, names: tuple[str, str], width: int, rows: int | None
) -> list[Content]:
    """Return a line with a prompt, and lines with its two answers side by side. ``names``: the titles of the
    columns. ``rows``: maximum number of lines of an answer; None for whole answers.
    """
    cells = max(1, (width - _COLUMN_GAP) // 2)
    lines = [Content.styled(f"▸ {' '.join(answers.prompt.split())}", "bold").truncate(width, ellipsis=True)]
    columns = (
        _column(answers.before, names[0], cells, rows, "$text-muted"),
        _column(answers.after, names[1], cells, rows, ""),
    )
    for left, right in zip_longest(*columns, fillvalue=Content("")):
        lines.append(left.pad_right(cells + _COLUMN_GAP - left.cell_length) + right)
    return lines


def _column(answer: str, name: str, cells: int, rows: int | None, style: str) -> list[Content]:
    """Return lines of ``cells`` cells that begin with the title of the column, followed by the answer.
    ``rows``: maximum number of lines; None for the whole answer.
    """
    head = Content.styled(f"{name}: ", "dim")
    wrapped = (head + Content.styled(" ".join(answer.split()), style)).wrap(cells - _INDENT)
    if rows is not None and len(wrapped) > rows:
        wrapped = [*wrapped[: rows - 1], wrapped[rows - 1].truncate(cells - _INDENT - 1) + "…"]
    return [Content(" " * _INDENT) + line for line in wrapped]


def run_lines(start: ChatStart, recipe: Recipe, width: int) -> list[Content]:
    """Return lines with the run's settings and its result."""
    lines, summary = settings_lines(recipe, width), start.summary
    if summary is None:
        return lines
    lines.append(labeled("steps", format_progress(summary.step, summary.total_steps), _LABEL))
    if summary.best is not None and summary.verdict is None:  # which has the loss of this adapter
        loss, step = summary.best
        lines.append(labeled("best", f"validation {format_loss(loss)} at step {step:,}", _LABEL))
    if summary.verdict is not None:
        lines += Content.styled(summary.verdict.sentence, verdict_style(summary.verdict)).wrap(width)
    return lines
