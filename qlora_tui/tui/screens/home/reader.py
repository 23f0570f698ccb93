"""Reads the state of the app and of its runs, and says it in the lines of Home's panels.

Imported and used in a thread: its imports would delay the first frame.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import islice

import psutil
from textual.content import Content

from qlora_tui import paths
from qlora_tui.catalog.local_models import ModelNotFoundError, list_local_models
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    capitalize,
    format_count,
    format_duration,
    format_float,
    format_gib,
    format_loss,
    short_model_name,
)
from qlora_tui.memory import Estimate, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.data_checks import data_error
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import phase_label
from qlora_tui.runs.run_summary import RunSummary, SummaryCache
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import bar, labeled, meter, sparkline
from qlora_tui.tui.render.columns import Column, table
from qlora_tui.tui.render.labels import (
    CANNOT_TRAIN,
    FitLine,
    batch_words,
    best_words,
    data_words,
    format_ago,
    recipe_line,
    refusal_words,
    result_label,
    targets_words,
)
from qlora_tui.tui.screens.home.next_step import HomeState, NextStep, next_step, other_steps
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench

_CURVE_WIDTH, _SHORT_CURVE_WIDTH = 24, 12
_MAX_NAME_WIDTH = 44
"""Cells of a name or a model in the list of runs."""
_LABEL = 8
"""Cells of the name before a bar."""
_OUTCOME_STYLE = {"better": "$success", "worse": "$error", "unclear": "$warning"}
_MIN_WIDTH_FOR_CURVES, _MIN_WIDTH_FOR_MODELS = 90, 140
"""Cells from which the list of runs has curves, and models and settings."""


@dataclass(frozen=True)
class HostFacts:
    """Memory and disk of the machine."""

    memory_used_bytes: int
    memory_bytes: int
    disk_free_bytes: int | None
    """Where runs are stored; None if it cannot be asked."""

    @classmethod
    def read(cls) -> HostFacts:
        """Ask the system."""
        memory = psutil.virtual_memory()
        try:
            free = shutil.disk_usage(paths.runs_dir()).free
        except OSError:
            free = None
        return cls(memory.total - memory.available, memory.total, free)


def gpu_lines(
    system_status: SystemStatus, budget: MemoryBudget, host: HostFacts | None, width: int
) -> list[Content]:
    """The GPU with its utilization, or what is used instead.

    Args:
        system_status: The latest readings.
        budget: The device that estimates are for.
        host: Memory and disk of the machine, for a panel with room for a line each; None for a short one.
        width: Cells of a line.
    """
    gpu, metrics = system_status.gpu, system_status.gpu_metrics
    if gpu is None:
        title = capitalize(system_status.no_gpu_title)
        where = f"Estimates: {budget.name}."
        if system_status.trains_on == budget.device.kind:
            where = "Training runs on the CPU, slowly."
        lines = [Content.assemble((title, "bold"), ("" if host else f"   {where}", "dim"))]
        lines += [Content.styled(where, "dim")] if host else []
        if system_status.no_gpu_reason:
            lines.append(Content.styled(system_status.no_gpu_reason, "dim"))
        return lines + _host_lines(host, width)
    if metrics is None:
        lines = [
            Content.assemble((gpu.short_name, "bold"), ("   does not respond", "$warning")),
            Content.styled(system_status.no_gpu_reason, "dim"),
        ]
        return lines + _host_lines(host, width)
    if system_status.gpu_problem is not None:
        lines = [
            Content.assemble((gpu.short_name, "bold"), (f"   {system_status.gpu_problem.title}", "$warning")),
            Content.styled(system_status.gpu_problem.what, "dim"),
        ]
        return lines + _host_lines(host, width)
    use = "NA" if metrics.utilization_percent is None else f"{metrics.utilization_percent}%"
    temperature = "NA" if metrics.temperature_c is None else f"{metrics.temperature_c} °C"
    power = "" if metrics.power_w is None else f"   {metrics.power_w:.0f} W"
    used, total = metrics.memory_used_bytes, metrics.memory_total_bytes
    memory = f"{format_gib(used)} of {format_gib(total)} GiB"
    if host is None:
        drawn = f"{bar(used / total, 16)} " if used is not None and total else ""
        text = f"   util {use}   {drawn}{memory}   {temperature}"
        return [Content.assemble((gpu.short_name, "bold"), text)]
    share = (metrics.utilization_percent or 0) / 100
    return [
        Content.assemble((gpu.short_name, "bold"), (f"   {temperature}{power}", "dim")),
        meter("util", share, use, _LABEL, width),
        meter("memory", used / total if used is not None and total else 0.0, memory, _LABEL, width),
        *_host_lines(host, width),
    ]


def _host_lines(host: HostFacts | None, width: int) -> list[Content]:
    if host is None:
        return []
    share = host.memory_used_bytes / host.memory_bytes
    memory = f"{format_gib(host.memory_used_bytes)} of {format_gib(host.memory_bytes)} GiB"
    disk = "NA" if host.disk_free_bytes is None else f"{format_gib(host.disk_free_bytes)} GiB free"
    return [meter("RAM", share, memory, _LABEL, width), labeled("disk", disk, _LABEL)]


def run_lines(
    summary: RunSummary, while_away: bool, now: float, width: int, *, has_graph: bool
) -> list[Content]:
    """The active or last run: name, state, and progress or outcome; a small curve where there is no graph."""
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
        # A graph names its star itself.
        best = "" if has_graph or summary.best is None else f"   {best_words(summary)}"
        line = f"{bar(share, cells)} {steps}{loss}"
        if len(line + best + left) > width:
            best = best.replace(" best validation", "").replace(" lowest validation", "")
        return [first, Content(f"{line}{best}{left}")]
    lines = [first, *_ended(status.at, now, while_away=while_away)]
    if sum(line.cell_length for line in lines) + 2 <= width:
        lines = [Content("  ").join(lines)]
    facts = _outcome(summary, has_graph=has_graph)
    if summary.losses and not has_graph:
        lines.append(Content.assemble((sparkline(summary.losses, cells), "$primary"), "  ", facts))
    elif facts:
        lines.append(Content(facts))
    if summary.verdict is not None:
        lines.append(Content.styled(summary.verdict.sentence, _OUTCOME_STYLE[summary.verdict.outcome]))
    if status.state in ("failed", "lost", "unreadable") and status.detail:
        lines.append(Content.styled(status.detail, "$error"))
    return lines


def _ended(at: float, now: float, *, while_away: bool) -> list[Content]:
    """``at 03:12, 4 h ago  while you were away``, as a line if it is known."""
    if not at:
        return []
    return [Content.assemble(format_ago(at, now), ("  while you were away" if while_away else "", "$accent"))]


def _outcome(summary: RunSummary, *, has_graph: bool) -> str:
    facts = []
    if summary.best is not None:
        # A graph names its star itself.
        facts += [] if has_graph else [best_words(summary)]
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
    """``✓ finished  qwen2.5-7b-tickets-20261123  best val. 1.29  at 03:12, 4 h ago``: a line for each."""

    def state(summary: RunSummary) -> Content:
        sign, word, style = result_label(summary.status.state, summary.defect)
        return Content.styled(f"{sign} {word}", style)

    def when(summary: RunSummary) -> str:
        at = summary.status.at
        if at and width < _MIN_WIDTH_FOR_CURVES:
            return f"{format_duration(max(0.0, now - at))} ago"
        return format_ago(at, now) if at else ""

    columns: tuple[Column[RunSummary], ...] = (
        Column(text=state, width=13),
        Column(text=lambda s: s.name, shrinks=True, min_width=14, max_width=_MAX_NAME_WIDTH, gap=0),
        Column(text=lambda s: s.model, max_width=_MAX_NAME_WIDTH, shown_from=_MIN_WIDTH_FOR_MODELS),
        Column(text=lambda s: s.settings, max_width=_MAX_NAME_WIDTH, shown_from=_MIN_WIDTH_FOR_MODELS),
        Column(text=lambda s: "" if s.best is None else f"best val. {format_loss(s.best[0])}"),
        Column(
            text=lambda s: sparkline(s.losses, _SHORT_CURVE_WIDTH) if s.losses else "",
            style="$primary",
            shown_from=_MIN_WIDTH_FOR_CURVES,
        ),
        Column(text=when, style="dim"),
    )
    return table(columns, summaries, width)


def queue_lines(waiting: tuple[str, ...]) -> list[Content]:
    """The queued runs, the next one first."""
    if not waiting:
        return [Content.styled("Empty.", "dim")]
    named = [RunDir(paths.runs_dir() / id_).name for id_ in waiting[:3]]
    shown = [Content(f"{number}. {name}") for number, name in enumerate(named, 1)]
    if len(waiting) > len(shown):
        shown.append(Content.styled(f"and {len(waiting) - len(shown)} more", "dim"))
    return shown


def recipe_lines(
    workbench: Workbench, budget: MemoryBudget, estimate: Estimate | None, width: int, *, is_compact: bool
) -> list[Content]:
    """The recipe being edited, and whether it fits: an item a line, or two lines where that is too long."""
    recipe, problem = workbench.recipe, None
    compared = workbench.comparison(budget.device)
    if isinstance(compared, UserError) and recipe.model.id:
        problem = Content.styled(f"{compared.what} {compared.fix}", "dim")
    if is_compact:
        memory = (
            problem
            if estimate is None
            else _memory_line(estimate, budget, width, label="", refusal=workbench.model_refusal())
        )
        return [Content(recipe_line(workbench)), *([memory] if memory else [])]
    architecture = workbench.architecture()
    size = (
        ""
        if isinstance(architecture, UserError)
        else f"{format_count(architecture.total_params)} parameters, {architecture.layers} layers"
    )
    lora, training = recipe.lora, recipe.training
    rate = f"learning rate {training.learning_rate:g}"
    rows = [
        ("model", short_model_name(recipe.model.id) or "none yet", size),
        ("data", data_words(recipe), ""),
        ("LoRA", f"{format_rank(lora)}  alpha {lora.alpha:g}  {targets_words(recipe, 40)}", ""),
        ("length", batch_words(recipe), rate),
    ]
    lines = [
        labeled(name, Content.assemble(value, (f"   {note}" if note else "", "dim")), _LABEL)
        for name, value, note in rows
    ]
    if estimate is not None:
        refusal = workbench.model_refusal()
        lines.append(_memory_line(estimate, budget, width, label="memory", refusal=refusal))
    elif problem is not None:
        lines.append(problem)
    return lines


def _memory_line(
    estimate: Estimate, budget: MemoryBudget, width: int, label: str, refusal: UserError | None
) -> Content:
    head = Content.styled(f"{label:<{_LABEL}}" if label else "", "dim")
    fit = FitLine("", estimate, budget, can_train=refusal is None)
    line = head + fit.draw(width - head.cell_length, _CURVE_WIDTH)
    if refusal is None:
        return line
    reason = f"  {refusal_words(refusal)}"
    has_room = line.cell_length + len(reason) <= width
    return line + Content.styled(reason if has_room else f"  {CANNOT_TRAIN}", "$error")


def next_lines(step: NextStep, others: tuple[NextStep, ...], width: int) -> list[Content]:
    """The suggested step with its key and reason, and the alternatives."""
    keys = [key_name("home.next"), *(key_name(other.command) for other in others)]
    column = max(map(len, keys))
    lines = []
    for number, (key, each) in enumerate(zip(keys, (step, *others), strict=True)):
        also = "" if number or each.command in ("home.demo", "") else f" (or {key_name(each.command)})"
        first = Content.assemble(
            ("▸ " if not number else "  ", "bold $accent"),
            (f"{key:<{column}}  ", "bold $accent"),
            (each.text, "bold" if not number else ""),
            (also, "dim"),
        )
        why = Content.styled(each.why, "dim")
        if first.cell_length + 2 + why.cell_length <= width:
            lines.append(Content.assemble(first, "  ", why))
        else:
            indent = column + 4
            lines += [first, *(Content(" " * indent) + part for part in why.wrap(max(20, width - indent)))]
    return lines


_MAX_RECENT = 40
"""Runs that are read for the list of recent ones, more than a window of 60 rows shows."""


@dataclass(frozen=True)
class HomeLayout:
    """Room for the text of each panel, in cells."""

    wide: int
    """Width of the panels that cross the window."""
    left: int
    right: int
    is_compact: bool
    """Whether panels have no borders and as few lines as possible."""


@dataclass(frozen=True)
class HomeFacts:
    """All of Home."""

    lines: dict[str, tuple[Content, ...]]
    """Lines by panel: next, run, gpu, queue, recipe."""
    suggestion: NextStep
    last: RunSummary | None
    """The active or last run."""
    recent: tuple[RunSummary, ...]
    """The runs before it, the newest first."""


class HomeReader:
    """Reads the state, and caches what does not change between reads."""

    def __init__(self, seen_at: float, started_at: float) -> None:
        self._seen_at = seen_at
        """Unix time at which the app was last looked at before this start, or of the first start."""
        self._started_at = started_at
        self._summaries = SummaryCache()
        self._local_models: int | None = None

    def invalidate_models(self) -> None:
        """Count the local models again at the next read."""
        self._local_models = None

    def read(
        self,
        workbench: Workbench,
        budget: MemoryBudget,
        system_status: SystemStatus,
        now: float,
        layout: HomeLayout,
    ) -> HomeFacts:
        """Read everything, for panels of these widths."""
        if self._local_models is None:
            self._local_models = sum(model.refusal is None for model in list_local_models())
        status = system_status.active_or_last_status
        is_news = status is not None and status.state not in ACTIVE and status.at > self._seen_at
        while_away = is_news and status is not None and status.at < self._started_at
        estimate = workbench.estimate(budget.device)
        summary = (
            self._summaries.get(system_status.active_or_last)
            if system_status.active_or_last is not None
            else None
        )
        checkpoints = (
            system_status.active_or_last.checkpoints()
            if system_status.active_or_last and status and status.state in RESUMABLE
            else []
        )
        problem, refusal = data_error(workbench.recipe.data), workbench.model_refusal()
        state = HomeState(
            recipe=workbench.recipe,
            model_error=refusal.title if refusal else "",
            can_download=isinstance(refusal, MissingFilesError | ModelNotFoundError),
            data_error=problem.title if problem else "",
            local_models=self._local_models,
            verdict="" if estimate is None else check_fit(estimate, budget.bytes).word,
            last_run=summary.name if summary else "",
            last_state=status.state if status else None,
            last_is_news=is_news,
            last_checkpoint=checkpoints[-1][0] if checkpoints else 0,
            last_total_steps=status.total_steps if status else 0,
            last_fix=summary.fix if summary else "",
            edited_since=status is not None and draft_written_at() > status.at,
        )
        step = next_step(state)
        host = None if layout.is_compact else HostFacts.read()
        if summary is None:
            run = [Content.styled("No runs yet.", "dim")]
        else:
            run = run_lines(summary, while_away, now, layout.left, has_graph=not layout.is_compact)
        lines = {
            "next": next_lines(step, other_steps(state, step), layout.wide),
            "run": run,
            "gpu": gpu_lines(system_status, budget, host, layout.right),
            "queue": queue_lines(system_status.waiting_ids),
            "recipe": recipe_lines(workbench, budget, estimate, layout.wide, is_compact=layout.is_compact),
        }
        return HomeFacts(
            {name: tuple(texts) for name, texts in lines.items()},
            step,
            summary,
            self._recent(system_status),
        )

    def _recent(self, system_status: SystemStatus) -> tuple[RunSummary, ...]:
        """The runs before the last."""
        shown = {
            *system_status.waiting_ids,
            system_status.active_or_last.id if system_status.active_or_last else "",
        }
        others = (run for name, run in self._summaries.all_runs().items() if name not in shown)
        return tuple(self._summaries.get(run) for run in islice(others, _MAX_RECENT))
