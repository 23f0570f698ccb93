"""Wording of recipes, verdicts, run states and errors, shared by all screens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from textual.content import Content

from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    abbreviate_home,
    format_bytes,
    format_duration,
    format_loss,
    format_number,
    format_rate,
    pluralize,
    short_model_name,
    truncate_middle,
    uncapitalize,
)
from qlora_tui.memory import Verdict
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Precision
from qlora_tui.memory.explain import INSTANT, fit_texts, verdict_word
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.describe import done_at_words
from qlora_tui.runs.main_settings import length_and_batch, main_settings
from qlora_tui.runs.run_summary import ResultDefect, RunVerdict, data_words
from qlora_tui.runs.status import State, Status, held_words
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.columns import cut_name
from qlora_tui.tui.render.figures import Figure
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.workbench import Workbench

if TYPE_CHECKING:
    from qlora_tui.runs.doctor import Outcome

_VERDICTS = {
    "fits": ("✓", "$success"),
    "tight": ("!", "$warning"),
    "uncertain": ("?", "$warning"),
    "does not fit": ("✗", "$error"),
}
"""(symbol, color) of each verdict on memory. Color is never the only cue: the word or the symbol is shown
too.
"""
_OUTCOME_STYLE = {"better": "$success", "worse": "$error", "unclear": "$warning"}
CANNOT_TRAIN = "cannot train"
"""Note next to the estimate of a model that cannot be trained, for example because its weights are missing.
"""
SEPARATOR = " · "
_MIN_NAME = 9
"""Minimum width of a shortened name in a recipe's line, in cells."""
_MAX_TARGETS = 16
"""Maximum width of the names of the target modules, in cells. A longer list is replaced by its length."""
_MIN_BAR = 4
"""Minimum width of a bar, in cells. If there is less room, the bar is left out."""
PRECISION_NAMES: dict[Precision, str] = {"nf4": "NF4", "int8": "int8", "fp16": "fp16"}
SIGNS: dict[State, tuple[str, str]] = {
    "queued": ("◌", "dim"),
    "starting": ("●", "$training"),
    "running": ("●", "$training"),
    "finished": ("✓", "$success"),
    "failed": ("✗", "$error"),
    "stopped": ("■", ""),
    "paused": ("‖", "$warning"),
    "lost": ("?", "$error"),
    "unreadable": ("?", "$error"),
    "gone": ("✗", "$error"),
}
"""(symbol, color) by run state. The name of the state is always shown too. A stopped run has no color: its
user ended it, while a paused run waits for its user.
"""
OUTCOME_SIGNS: dict[Outcome, tuple[str, str]] = {
    "ok": ("✓ ok", "$success"),
    "note": ("· note", "$primary"),
    "warning": ("! warning", "bold $warning"),
    "error": ("✗ error", "bold $error"),
}
"""(symbol and word, style) by outcome of a check, from best to worst."""
SEVERITY_SIGNS = {"error": ("✗", "$error"), "warning": ("⚠", "$warning")}
"""(symbol, color) by severity of a data problem."""
BEST = "★"
"""Marks the best evaluation."""


def recipe_line(workbench: Workbench, width: int | None = None, *, names_preset: bool = True) -> str:
    """Return the recipe in one line, cut to ``width`` cells: ``balanced* · Qwen2.5-7B · tickets.jsonl · r16
    all-linear · 2,048 tok · batch 2 × 8``. If ``width`` is None, the line is not cut. Without
    ``names_preset``, the line begins with the model.
    """
    line = join_parts(recipe_parts(workbench, width, names_preset=names_preset))
    return line if width is None else cut_cells(line, width)


def recipe_parts(workbench: Workbench, width: int | None = None, *, names_preset: bool = True) -> list[str]:
    """Return the parts of a recipe's one-line summary: preset, model, data, adapter, and :func:`batch_words`.

    If the parts do not fit ``width`` cells, first the LoRA targets, then the preset are left out. After that,
    the name of the data is shortened, then the name of the model. At last, the data is left out, so that
    numbers are not cut. Without ``width``, nothing is shortened. Without ``names_preset``, the preset is left
    out in any case.
    """
    recipe = workbench.recipe
    parts = [
        _preset_words(workbench) if names_preset else "",
        short_model_name(recipe.model.id) or "no model",
        data_words(recipe),
        f"{format_rank(recipe.lora)} {targets_words(recipe, _MAX_TARGETS)}",
        batch_words(recipe),
    ]
    if width is None:
        return parts
    for place, shorter in ((3, format_rank(recipe.lora)), (0, "")):
        if cell_len(join_parts(parts)) > width:
            parts[place] = shorter
    for place in (2, 1):
        over = cell_len(join_parts(parts)) - width
        cells = cell_len(parts[place])
        if over > 0 and cells > _MIN_NAME + 1:
            parts[place] = cut_name(Content(parts[place]), max(_MIN_NAME, cells - over)).plain
    if cell_len(join_parts(parts)) > width:
        parts[2] = ""
    return parts


def join_parts(parts: Sequence[str]) -> str:
    """Join the parts from :func:`recipe_parts` into one line. Empty parts, which were left out, are
    skipped.
    """
    return SEPARATOR.join(filter(None, parts))


def _preset_words(workbench: Workbench) -> str:
    return f"{workbench.preset or 'defaults'}{'*' if workbench.modified else ''}"


def batch_words(recipe: Recipe) -> str:
    """Return ``1,024 tok · batch 1 × 8``: sequence length, micro-batch size, gradient accumulation."""
    return SEPARATOR.join(length_and_batch(recipe))


def targets_words(recipe: Recipe, width: int) -> str:
    """Return the names of the LoRA target modules. If the names are longer than ``width`` characters, return
    their number instead.
    """
    patterns = recipe.lora.target_modules
    names = ",".join(patterns)
    return names if len(names) <= width else f"{len(patterns)} targets"


def lora_words(recipe: Recipe, width: int) -> str:
    """Return ``r16  alpha 32  all-linear``: rank, alpha, and :func:`targets_words` of the adapter."""
    lora = recipe.lora
    return f"{format_rank(lora)}  alpha {format_number(lora.alpha)}  {targets_words(recipe, width)}"


def recipe_facts(recipe: Recipe, cells: int, batch: str = "") -> list[tuple[str, str]]:
    """Return the settings of a run as (label, value) pairs.

    Args:
        recipe: The run's recipe.
        cells: Maximum width of a value, in cells. Longer values are shortened.
        batch: Text for the sequence length and the batch; empty for the result of :func:`batch_words`.
    """
    training = recipe.training
    precision, *_, epochs = main_settings(recipe)
    suffix = f", {precision.words}"
    facts = [
        ("model", truncate_middle(short_model_name(recipe.model.id) or "none", cells - len(suffix)) + suffix),
        ("data", data_words(recipe)),
        ("LoRA", lora_words(recipe, _MAX_TARGETS)),
        ("length", batch or batch_words(recipe)),
        ("lr", f"{format_rate(training.learning_rate)} {training.lr_scheduler}, {epochs.words}"),
    ]
    if training.max_steps:
        facts.append(("limit", pluralize(training.max_steps, "step")))
    if method := preference_words(recipe):
        facts.append(("method", method))
    return [(label, truncate_middle(value, cells)) for label, value in facts]


def preference_words(recipe: Recipe) -> str:
    """Return the preference method and its parameters: ``DPO β 0.1``; empty if the recipe does not train on
    preferences.
    """
    traits, training = recipe.preference_traits, recipe.training
    if traits is None:
        return ""
    beta = f" β {format_number(training.preference_beta)}" if training.preference_beta else ""
    gamma = f" γ {format_number(training.simpo_gamma)}" if traits.has_margin else ""
    return f"{traits.label}{beta}{gamma}"


def verdict_words(verdict: Verdict, *, can_train: bool = True) -> tuple[str, str]:
    """Return (text, color) for a verdict on memory. The text is the one of :func:`verdict_word`."""
    word = verdict_word(verdict, can_train=can_train)
    return word, _VERDICTS[word][1] if word in _VERDICTS else "$text-muted"


def verdict_sign(verdict: Verdict) -> Content:
    """Return the symbol of a verdict on memory, such as ``✗``. Use the symbol if there is no room
    for the word.
    """
    return Content.styled(*_VERDICTS[verdict.word])


def needed_words(verdict: Verdict) -> str:
    """Return the memory that a recipe needs, such as ``~9.9 GiB``."""
    return f"{'' if verdict.is_exact else INSTANT}{format_bytes(verdict.needed_bytes)}"


def fit_sign(verdict: Verdict) -> Content:
    """Return the verdict's symbol for a table, such as ``✗``; a space if the recipe fits."""
    return Content(" ") if verdict.word == "fits" else verdict_sign(verdict)


def fit_figure(verdict: Verdict, *, is_current: bool = False) -> Content:
    """Return the memory that a recipe needs and the symbol of the verdict, such as ``~13.1 GiB ✗``, for a
    table. ``is_current`` makes the text bold.
    """
    style = "" if verdict.word == "fits" else _VERDICTS[verdict.word][1]
    figure = Content.assemble(f"{needed_words(verdict)} ", fit_sign(verdict).plain)
    return figure.stylize(f"bold {style}" if is_current else style)


def verdict_legend(verdicts: Iterable[Verdict], width: int) -> Content:
    """Return a legend for the symbols of these verdicts in a table: ``✗ does not fit ! tight ~
    estimated``. The verdict ``fits`` has no symbol in a table.

    The legend is wrapped to ``width`` cells. Lines break only before a symbol.
    """
    parts: dict[str, Content] = {}
    for verdict in verdicts:
        if verdict.word != "fits":
            reason = ": its range includes the limit" if verdict.word == "uncertain" else ""
            parts[verdict.word] = verdict_sign(verdict) + Content.styled(f" {verdict.word}{reason}", "dim")
        if not verdict.is_exact:
            parts[INSTANT] = Content.styled(f"{INSTANT} estimated", "dim")
    instant = [parts.pop(INSTANT)] if INSTANT in parts else []
    lines = [Content("")]
    for part in (*parts.values(), *instant):
        if lines[-1] and lines[-1].cell_length + 2 + part.cell_length > width:
            lines.append(part)
        else:
            lines[-1] = Content("  ").join([lines[-1], part] if lines[-1] else [part])
    return Content("\n").join(lines)


def refusal_words(*refusals: UserError) -> str:
    """Return why the model cannot be trained, worded the same on every screen: ``cannot train: no
    tokenizer``.
    """
    return f"{CANNOT_TRAIN}: {', '.join(uncapitalize(refusal.title) for refusal in refusals)}"


class FitLine:
    """A recipe's memory compared with the available memory, worded by :func:`fit_texts`: ``NF4 ▄▄▄▁▁ fits:
    uses ~9.5 of 24.0 GiB, needs at least ~6.3``.

    ``place``: name of the device with the available memory, from :func:`place_words`; empty to leave it out.
    """

    def __init__(self, label: str, verdict: Verdict, place: str = "", *, can_train: bool = True) -> None:
        self._label = f"{label} " if label else ""
        self._verdict = verdict
        self._texts = fit_texts(verdict, place, can_train=can_train)
        self._word, self._style = verdict_words(verdict, can_train=can_train)

    def draw(self, width: int, max_bar: int | None = None, *, keeps_place: bool = False) -> Content:
        """Return the most detailed wording that fits ``width`` next to a bar. If none does, return the
        shortest wording, and leave out the bar if there is no room.

        Args:
            width: Maximum length of the line, in cells.
            max_bar: Maximum length of the bar, in cells; None for no maximum, and 0 for no bar.
            keeps_place: Whether to return only wordings with the name of the device.
        """
        texts = self._texts[::2] if keeps_place else self._texts
        least_bar = 0 if max_bar == 0 else _MIN_BAR + 1
        room = width - len(self._label)
        text = next((text for text in texts if len(text) + least_bar <= room), texts[-1])
        cells = room - len(text) - 1
        return self._colored(text, cells if max_bar is None else min(cells, max_bar))

    def draw_wrapped(self, width: int) -> Content:
        """Return the line without a bar. If the line does not fit ``width``, the memory that a run needs
        at least is on a second line.
        """
        least = self._texts[0].removeprefix(self._texts[2]).removeprefix(", ")
        line = self.draw(width, 0)
        return line if line.plain.endswith(least) else Content.assemble(line, ",\n", least)

    def _colored(self, text: str, bar_cells: int = 0) -> Content:
        share = (self._verdict.used_bytes or self._verdict.needed_bytes) / self._verdict.available_bytes
        drawn = f"{bar(share, bar_cells)} " if bar_cells >= _MIN_BAR else ""
        rest = text.removeprefix(self._word)
        return Content.assemble(self._label, (drawn, self._style), (self._word, self._style), rest)


def fit_title(name: str, verdict: Verdict, width: int, *, can_train: bool) -> Content:
    """Return a title with a recipe's memory: ``name`` and the verdict, such as ``NF4 fits``, followed in a
    muted color by the memory that a run uses and, if there is room, the memory that it needs at least.
    """
    word, style = verdict_words(verdict, can_train=can_train)
    *longer, shortest = fit_texts(verdict, can_train=can_train)
    text = next((text for text in longer if len(name) + 1 + len(text) <= width), shortest)
    figures = text.removeprefix(word)
    style = "" if style == "$text-muted" else style
    return Content.assemble(f"{name} ", (word, style), (figures, "$text-muted not bold"))


def place_words(budget: MemoryBudget) -> str:
    """Return the name of the device whose memory a recipe is compared with, worded the same on every screen:
    ``assumed GPU``, ``this CPU``, or the GPU's name.
    """
    if budget.is_assumed:
        return "assumed GPU"
    return "this CPU" if budget.device.kind == "cpu" else budget.name


def assumed_words(budget: MemoryBudget, machine: MemoryBudget) -> tuple[str, ...]:
    """Return several wordings, longest first, of a note that says that the estimates are for a GPU of an
    assumed size. Return an empty tuple if the estimates are for this machine.

    Args:
        budget: The memory that the recipe is compared with.
        machine: The memory of the device on which a run would train.
    """
    if not budget.is_assumed:
        return ()
    size = format_bytes(budget.bytes)
    here = "CPU" if machine.device.kind == "cpu" else machine.name
    return (
        f"planning for {size} GPU (assumed) · this machine: {here}",
        f"for {size} GPU (assumed) · here: {here}",
        f"{size} GPU (assumed)",
        f"{size} assumed",
    )


def recipe_fit(workbench: Workbench, budget: MemoryBudget, label: str = "") -> FitLine | None:
    """Return the line with the estimated memory of the recipe being edited; None if there is no estimate."""
    verdict, can_train = workbench.verdict(budget), workbench.model_refusal() is None
    return (
        None if verdict is None else FitLine(label, verdict, place=place_words(budget), can_train=can_train)
    )


def next_step(command: str, text: str) -> Content:
    """Return the next step to suggest to the user, with the key of its command: ``▸ [5] check and
    launch``.
    """
    return highlight_keys(f"▸ {key_name(command)} {text}", "$primary")


def error_content(error: UserError, *, step: Content | None = None, is_spaced: bool = False) -> Content:
    """Return the text of an error that is shown in place of content: title, what happened, why, and what to
    do.

    Args:
        error: The error.
        step: What to do, with its key; replaces the error's own advice. None to show the error's advice.
        is_spaced: Whether to put empty lines around the description of what happened.
    """
    gap = "\n\n" if is_spaced else "\n"
    fix = Content.styled(f"▸ {abbreviate_home(error.fix)}", "$primary") if error.fix else Content("")
    return Content.assemble(
        (f"✗ {error.title}{gap}", "$error bold"),
        abbreviate_home(error.what),
        (f"\n{abbreviate_home(error.why)}" if error.why else "", "dim"),
        gap if step or fix else "",
        step or fix,
    )


def result_label(status: Status, defect: ResultDefect | None) -> tuple[str, str, str]:
    """Return the (symbol, word, color) of a run's state or, if its result has a defect, of the defect.

    A queued run that gave up its GPU is labeled ``paused``, or ``waiting`` if it has not trained a step.
    """
    if defect is not None:
        return "!", defect.word, "$error"
    is_held = status.hold is not None and status.hold.has_left
    word = held_words(status).partition(" ")[0] if is_held else status.state
    sign, style = SIGNS["paused" if word == "paused" else status.state]
    return sign, word, style


def verdict_style(verdict: RunVerdict) -> str:
    """Return the color of a verdict on a run. An improvement that may be due to chance is not a problem, so
    it has no color.
    """
    may_be_chance = verdict.outcome == "unclear" and verdict.has_improved
    return "" if may_be_chance else _OUTCOME_STYLE[verdict.outcome]


def verdict_content(verdict: RunVerdict) -> Content:
    """Return the sentence of a verdict in the verdict's color. Cautions, which are parts of the sentence,
    have the warning color.
    """
    content = Content.styled(verdict.sentence, verdict_style(verdict))
    for part in verdict.cautions:
        start = verdict.sentence.index(part)
        content = content.stylize("$warning", start, start + len(part))
    return content


def state_bar(status: Status, defect: ResultDefect | None = None) -> Content:
    """Return ``▌`` in the color that :func:`result_label` gives the run, for the left edge of lines that also
    name the run's state or defect. Do not draw the bar on a terminal without color, where it has no meaning.
    """
    return Content.styled("▌", result_label(status, defect)[2])


def best_figure(loss: float, loss_to_beat: float | None) -> Figure:
    """Return a run's lowest validation loss as a figure. :func:`best_word` describes ``loss_to_beat``."""
    return Figure(f"{best_word(loss_to_beat)} validation loss", format_loss(loss))


def best_word(loss_to_beat: float | None) -> str:
    """Return the adjective for the lowest validation loss after training began: ``best`` if this loss is
    below the loss before training, otherwise ``lowest``.

    Args:
        loss_to_beat: The loss before training, if no later validation loss is below it; otherwise None.
    """
    return "best" if loss_to_beat is None else "lowest"


def progress_figures(mean_loss: float | None, seconds_left: float | None) -> list[Figure]:
    """Return figures for an active run: its loss, the time left, and the expected end time. Unknown values
    are left out.
    """
    figures = []
    if mean_loss is not None:
        figures.append(Figure("smoothed loss", format_loss(mean_loss)))
    if seconds_left is not None:
        figures.append(Figure("left", format_duration(seconds_left), label_first=False))
    if done_at := done_at_words(seconds_left):
        figures.append(Figure("done", done_at))
    return figures


def no_steps_words(*, is_over: bool) -> str:
    """Return the text to show in place of a graph if the run has no steps. ``is_over``: whether the run has
    ended.
    """
    return "The run ended before its first step." if is_over else "No steps yet."


def format_ago(at: float, now: float) -> str:
    """Return the time ``at`` as text: ``at 03:12, 4 h ago``, with the date if it was not today. Both times
    are Unix times in seconds.
    """
    moment, today = time.localtime(at), time.localtime(now)
    day = "" if moment[:3] == today[:3] else time.strftime("%d %b ", moment)
    return f"at {day}{time.strftime('%H:%M', moment)}, {format_duration(max(0.0, now - at))} ago"


def cut_cells(text: str, width: int) -> str:
    """Return the beginning of ``text`` that fits ``width`` cells.

    Chinese characters, for example, take two cells each.
    """
    return text if cell_len(text) <= width else set_cell_size(text, width).rstrip()
