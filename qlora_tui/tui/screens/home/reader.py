"""Reads what Home shows: the state of the app and of its runs.

Imported and used in a thread: its imports would delay the first frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from textual.content import Content

from qlora_tui.catalog.local_models import ModelNotFoundError, list_local_models
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.memory import check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.data_checks import data_error
from qlora_tui.runs.run_summary import RunSummary, SummaryCache
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.screens.home.next_step import HomeState, NextStep, next_step, other_steps
from qlora_tui.tui.screens.home.text import (
    HostFacts,
    gpu_lines,
    next_lines,
    queue_lines,
    recipe_lines,
    run_lines,
)
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench

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
