"""Panels beside the graph of a run: its warnings, what it trains with, and its evaluations."""

from __future__ import annotations

import math
from functools import partial

from textual.content import Content
from textual.geometry import Size

from qlora_tui.formatting import (
    format_count,
    format_float,
    format_percent,
    short_model_name,
    truncate_middle,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.events import Failed
from qlora_tui.runs.view import RunView
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.charts import labeled
from qlora_tui.tui.render.labels import BEST, batch_words, data_words, preference_words, targets_words
from qlora_tui.tui.screens.train.run_snapshot import RunSnapshot
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_LABEL = 8
"""Cells of the name before a value."""
_ROWS_WITH_HEADS = 4
"""Lines of the evaluations from which there is one for the heads of their columns."""
_row = partial(labeled, cells=_LABEL)


class FactList(DiffWidget):
    """Lines that a panel shows, cut to its size."""

    def __init__(self, *, id: str | None = None, wraps: bool = False) -> None:
        """``wraps``: whether long lines go on in the next, indented."""
        super().__init__(id=id)
        self._lines: list[Content] = []
        self._wraps = wraps

    def show(self, lines: list[Content]) -> None:
        """Show these; repaints only what changed."""
        width = self.size.width
        before, self._lines = len(self._fitted(width)), lines
        if len(self._fitted(width)) != before:
            self.refresh(layout=True)
        self.redraw()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._fitted(width))

    def draw(self, width: int, height: int) -> list[Content]:
        lines = self._fitted(width)
        if self._wraps and len(lines) > height > 0:
            lines[height - 1] = Content.styled("… the rest is in the tabs", "dim")
        return lines

    def _fitted(self, width: int) -> list[Content]:
        if not self._wraps or width <= 2:
            return [line.truncate(width, ellipsis=True) for line in self._lines]
        wrapped: list[Content] = []
        for line in self._lines:
            first, *rest = line.wrap(width - 2) or [Content("")]
            wrapped += [first, *(Content("  ") + piece for piece in rest)]
        return wrapped


def health_lines(snapshot: RunSnapshot) -> list[Content]:
    """The latest warning of each kind, the newest first."""
    latest = {health.kind: health for health in snapshot.health}
    lines = []
    if isinstance(snapshot.view.ending, Failed):
        lines.append(Content.styled(f"✗ {snapshot.view.ending.title}.", "$error"))
    for health in sorted(latest.values(), key=lambda health: health.step, reverse=True):
        sign, style = ("✗", "$error") if health.severity == "error" else ("!", "$warning")
        lines.append(Content.assemble((f"{sign} {health.evidence}", style), f" ▸ {health.remedy}"))
    if snapshot.fix is not None:
        lines.append(highlight_keys(f"▸ {key_name('train.fix')} {snapshot.fix.label}"))
    return lines or [Content.assemble(("✓ ", "$success"), ("No warnings.", "dim"))]


def sample_lines(snapshot: RunSnapshot) -> list[Content]:
    """The answers to the sample prompts at the last evaluation."""
    step = _sample_step(snapshot)
    lines: list[Content] = []
    for sample in snapshot.samples:
        if sample.step == step:
            lines.append(Content.styled(f"▸ {sample.prompt}", "bold"))
            lines += [Content(f"  {line}") for line in sample.answer.splitlines()]
    return lines or [Content.styled("None yet.", "dim")]


def samples_title(snapshot: RunSnapshot) -> str:
    """Title of the panel of answers."""
    step = _sample_step(snapshot)
    return "Answers" if step is None else f"Answers at step {step:,}"


def _sample_step(snapshot: RunSnapshot) -> int | None:
    return snapshot.samples[-1].step if snapshot.samples else None


def setup_lines(snapshot: RunSnapshot, recipe: Recipe | None, width: int) -> list[Content]:
    """What is trained on what, and how it is computed."""
    view, lines = snapshot.view, []
    if recipe is not None:
        schedule = f"{recipe.training.learning_rate:g} {recipe.training.lr_scheduler}"
        lines += [
            _row("model", truncate_middle(short_model_name(recipe.model.id), width - _LABEL)),
            _row("data", truncate_middle(data_words(recipe), width - _LABEL)),
            _row("LoRA", f"{format_rank(recipe.lora)} α {recipe.lora.alpha:g} {targets_words(recipe, 16)}"),
            _row("length", _batch(view, recipe)),
            _row("lr", schedule),
        ]
        if recipe.preference_method is not None:
            lines.append(_row("method", preference_words(recipe)))
    if view.adapter is not None:
        share = view.adapter.trained_parameters / view.adapter.total_parameters
        lines.append(_row("trains", f"{format_count(view.adapter.trained_parameters)} weights, {share:.2%}"))
    if view.data is not None:
        lines.append(_row("samples", f"{view.data.samples:,}, {view.data.validation_samples:,} to validate"))
    if view.environment is not None:
        environment = view.environment
        lines += [
            _row("compute", environment.compute_dtype),
            _row("optim", environment.optimizer),
            _row("loss", environment.loss),
        ]
    return lines


def _batch(view: RunView, recipe: Recipe) -> str:
    """``1,024 tok · batch 2 × 4, chosen``: as the attempt computes it."""
    words = batch_words(view.plan.apply_to(recipe))
    chosen = view.step_chosen
    return (
        f"{words}, chosen"
        if chosen and chosen.micro_batch_size != recipe.training.micro_batch_size
        else words
    )


def evaluation_lines(snapshot: RunSnapshot, rows: int) -> list[Content]:
    """A line for each evaluation, the newest first: loss, its change, exact or right answers."""
    evaluations = snapshot.evaluations
    if not evaluations:
        return [Content.styled("None yet.", "dim")]
    lines = []
    if rows >= _ROWS_WITH_HEADS:
        lines.append(Content.styled(f"{'step':>7}  loss     {'change':>7}", "dim"))
        rows -= 1
    for number in range(len(evaluations) - 1, max(-1, len(evaluations) - 1 - rows), -1):
        each = evaluations[number]
        before = evaluations[number - 1].loss if number else None
        change = ""
        if each.loss is not None and before is not None and math.isfinite(each.loss - before):
            change = f"{each.loss - before:+.3f}"
        exact = "" if each.accuracy is None else f"{format_percent(each.accuracy):>5} exact"
        if each.reward_accuracy is not None:
            exact = f"{format_percent(each.reward_accuracy):>5} right"
        star = f" {BEST}" if each is snapshot.best else "  "
        lines.append(
            Content.assemble(
                (f"{each.step:>7,}  ", "dim"),
                f"{format_float(math.nan if each.loss is None else each.loss, 4):<6}",
                (star, "$success bold"),
                (f" {change:>7}", "dim"),
                exact,
            )
        )
    return lines
