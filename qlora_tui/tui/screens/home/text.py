"""Text of the parts of Home: GPU, last run, queue, recipe, next step, recent runs.

Used in a thread: its imports would delay the first frame.
"""

from __future__ import annotations

from textual.content import Content

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_duration, format_float, format_gib, truncate_middle
from qlora_tui.memory import Estimate, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import phase_label
from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.block_charts import bar, curve
from qlora_tui.tui.render.recipe_line import VERDICT_STYLE, recipe_line
from qlora_tui.tui.render.run_labels import format_ago, result_label
from qlora_tui.tui.screens.home.next_step import NextStep
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench

_CURVE_WIDTH, _SHORT_CURVE_WIDTH = 24, 12
_MAX_NAME_WIDTH = 44
"""Cells of a name or a model in the list of runs."""
_STATE_WIDTH = 13
_MIN_WIDTH_FOR_CURVES, _MIN_WIDTH_FOR_MODELS = 90, 140
"""Cells from which the list of runs has curves, and models and settings."""


def gpu_lines(system_status: SystemStatus, budget: MemoryBudget) -> list[Content]:
    """The GPU with its utilization, or what is used instead."""
    if system_status.gpu is None:
        where = (
            f"runs train on the CPU, slowly   {format_gib(budget.bytes)} GiB of memory"
            if budget.device.kind == "cpu"
            else f"estimates are for {budget.name}"
        )
        first = Content.assemble(("No GPU", "bold"), f"   {where}")
        return [
            first,
            *([Content.styled(system_status.no_gpu_reason, "dim")] if system_status.no_gpu_reason else []),
        ]
    gpu, metrics = system_status.gpu, system_status.gpu_metrics
    if metrics is None:
        return [
            Content.assemble((gpu.short_name, "bold"), "   does not respond"),
            Content.styled(system_status.no_gpu_reason, "dim"),
        ]
    use = "NA" if metrics.utilization_percent is None else f"{metrics.utilization_percent}%"
    temperature = "NA" if metrics.temperature_c is None else f"{metrics.temperature_c} °C"
    used, total = metrics.memory_used_bytes, metrics.memory_total_bytes
    drawn = f"{bar(used / total, 16)} " if used is not None and total else ""
    return [
        Content.assemble(
            (gpu.short_name, "bold"),
            f"   util {use}   {drawn}{format_gib(used)} of {format_gib(total)} GiB   {temperature}",
        )
    ]


def run_lines(summary: RunSummary | None, while_away: bool, now: float, width: int) -> list[Content]:
    """The active or last run: name, state, and progress or outcome."""
    if summary is None:
        return [Content.styled("No run yet.", "dim")]
    status, cells = summary.status, _CURVE_WIDTH if width >= _MIN_WIDTH_FOR_CURVES else _SHORT_CURVE_WIDTH
    sign, word, style = result_label(status.state, summary.defect)
    if status.state in ACTIVE:
        word = phase_label(status.phase or status.state)
    elif summary.defect is not None:
        word = f"{status.state}, {word}"
    first = Content.assemble((f"{sign} ", style), (summary.name, "bold"), "  ", (word, style))
    if status.state in ACTIVE:
        share = summary.step / summary.total_steps if summary.total_steps else 0.0
        loss = "" if summary.loss is None else f"   loss {format_float(summary.loss, 3)}"
        steps = f"step {summary.step:,} of {summary.total_steps:,}" if summary.total_steps else "preparing"
        left = "" if summary.seconds_left is None else f"   ETA {format_duration(summary.seconds_left)}"
        return [first, Content(f"{bar(share, cells)} {steps}{loss}{left}")]
    lines = [first, *_ended(status.at, now, while_away=while_away)]
    if sum(line.cell_length for line in lines) + 2 <= width:
        lines = [Content("  ").join(lines)]
    facts = _outcome(summary)
    if summary.losses:
        lines.append(Content.assemble((curve(summary.losses, cells), "$primary"), "  ", facts))
    elif facts:
        lines.append(Content(facts))
    if status.state in ("failed", "lost", "unreadable") and status.detail:
        lines.append(Content.styled(status.detail, "$error"))
    return lines


def _ended(at: float, now: float, *, while_away: bool) -> list[Content]:
    """``at 03:12, 4 h ago  while you were away``, as a line if it is known."""
    if not at:
        return []
    return [Content.assemble(format_ago(at, now), ("  while you were away" if while_away else "", "$accent"))]


def _outcome(summary: RunSummary) -> str:
    facts = []
    if summary.best is not None:
        facts.append(f"best validation loss {format_float(summary.best[0], 3)} at step {summary.best[1]:,}")
        if summary.loss_to_beat is not None:
            facts.append(f"worse than before training ({format_float(summary.loss_to_beat, 3)})")
    elif summary.loss is not None:
        facts.append(f"loss {format_float(summary.loss, 3)}")
    if summary.step < summary.total_steps:
        facts.append(f"step {summary.step:,} of {summary.total_steps:,}")
    if summary.seconds is not None:
        facts.append(format_duration(summary.seconds))
    return "   ".join(facts)


def recent_lines(summaries: list[RunSummary], now: float, width: int) -> list[Content]:
    """``✓ finished  qwen2.5-7b-tickets-20261123-0101  best 1.29  at 03:12, 4 h ago``, one under the other."""
    columns: list[tuple[list[str], str]] = []
    if width >= _MIN_WIDTH_FOR_MODELS:
        columns += [([s.model for s in summaries], ""), ([s.settings for s in summaries], "")]
    columns.append((["" if s.best is None else f"best {format_float(s.best[0], 3)}" for s in summaries], ""))
    if width >= _MIN_WIDTH_FOR_CURVES:
        columns.append(
            ([curve(s.losses, _SHORT_CURVE_WIDTH) if s.losses else "" for s in summaries], "$primary")
        )
    columns.append(([_when(s.status.at, now, width) for s in summaries], "dim"))
    shown = [(_column(texts), style) for texts, style in columns]
    left = width - _STATE_WIDTH - sum(texts[0].cell_length + 2 for texts, _ in shown if texts)
    names = _column([summary.name for summary in summaries], max(_MAX_NAME_WIDTH // 3, left))
    lines = []
    for number, summary in enumerate(summaries):
        sign, word, style = result_label(summary.status.state, summary.defect)
        head = (f"{sign} {word:<{_STATE_WIDTH - 2}}", style)
        rest = [texts[number].stylize(style).pad_left(2) for texts, style in shown]
        lines.append(Content.assemble(head, names[number], *rest))
    return lines


def _when(at: float, now: float, width: int) -> str:
    if not at:
        return ""
    return (
        format_ago(at, now)
        if width >= _MIN_WIDTH_FOR_CURVES
        else f"{format_duration(max(0.0, now - at))} ago"
    )


def _column(texts: list[str], widest: int = _MAX_NAME_WIDTH) -> list[Content]:
    """Pad all texts to the widest one."""
    shown = [_cut(Content(text), min(widest, _MAX_NAME_WIDTH)) for text in texts]
    width = max((text.cell_length for text in shown), default=0)
    return [text.pad_right(width - text.cell_length) for text in shown]


def _cut(text: Content, width: int) -> Content:
    """Shorten in the middle, since names differ at their ends; wide characters are cut at the end."""
    if text.cell_length == len(text):
        return Content(truncate_middle(text.plain, width))
    return text.truncate(width, ellipsis=True)


def queue_lines(waiting: tuple[str, ...]) -> list[Content]:
    """The queued runs, the next one first."""
    if not waiting:
        return [Content.styled("Empty.", "dim")]
    named = [RunDir(paths.runs_dir() / id_).name for id_ in waiting[:3]]
    shown = [Content(f"{number}. {name}") for number, name in enumerate(named, 1)]
    if len(waiting) > len(shown):
        shown.append(Content.styled(f"and {len(waiting) - len(shown)} more", "dim"))
    return shown


def recipe_lines(workbench: Workbench, budget: MemoryBudget, estimate: Estimate | None) -> list[Content]:
    """The recipe being edited, and whether it fits."""
    first = Content(recipe_line(workbench))
    if estimate is None:
        compared = workbench.comparison(budget.device)
        if isinstance(compared, UserError) and workbench.recipe.model.id:
            return [first, Content.styled(f"{compared.what} {compared.fix}", "dim")]
        return [first]
    verdict = check_fit(estimate, budget.bytes)
    share = estimate.total_bytes / budget.bytes
    figures = (
        f"{bar(share, _CURVE_WIDTH)} {format_gib(estimate.total_bytes)} of {format_gib(budget.bytes)} GiB  "
    )
    return [first, Content.assemble(figures, (verdict.word, VERDICT_STYLE[verdict.word]))]


def next_lines(step: NextStep, others: tuple[NextStep, ...]) -> list[Content]:
    """The suggested step with its key and reason, and the alternatives."""
    key = "" if step.command in ("home.demo", "") else f" (also {key_name(step.command)})"
    head = f"▸ {key_name('home.next')}  "
    indent = " " * len(head)
    lines = [
        Content.assemble((head, "bold $accent"), (step.text, "bold"), (key, "dim")),
        Content.styled(f"{indent}{step.why}", "dim"),
    ]
    for other in others:
        lines.append(Content.assemble("  or ", (key_name(other.command), "bold $accent"), " ", other.text))
        lines.append(Content.styled(f"{indent}{other.why}", "dim"))
    return lines
