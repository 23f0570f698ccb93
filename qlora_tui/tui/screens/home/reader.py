"""Reads what Home shows: the state of the app and of its runs.

Imported and used in a thread: its imports would delay the first frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from textual.content import Content

from qlora_tui.catalog.local_models import list_local_models
from qlora_tui.errors import UserError
from qlora_tui.memory import Estimate, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import precision_of
from qlora_tui.runs.preflight import data_error
from qlora_tui.runs.run_summary import SummaryCache
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.screens.home.next_step import HomeState, NextStep, next_step, other_steps
from qlora_tui.tui.screens.home.text import (
    gpu_lines,
    next_lines,
    queue_lines,
    recent_lines,
    recipe_lines,
    run_lines,
)
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench

_MAX_RECENT = 20
_MIN_WIDTH = 20
"""Cells that lines are laid out in, however narrow the window."""


@dataclass(frozen=True)
class HomeFacts:
    """All of Home."""

    parts: dict[str, tuple[Content, ...]]
    """Lines by part (GPU, run, queue, recipe, next, recent), none wider than the window."""
    suggestion: NextStep


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
        *,
        width: int,
        height: int,
    ) -> HomeFacts:
        """Read everything for ``height`` lines of ``width`` cells beside the titles."""
        width = max(_MIN_WIDTH, width)
        if self._local_models is None:
            self._local_models = sum(model.refusal is None for model in list_local_models())
        status = system_status.active_or_last_status
        is_news = status is not None and status.state not in ACTIVE and status.at > self._seen_at
        while_away = is_news and status is not None and status.at < self._started_at
        estimate = _estimate(workbench, budget)
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
        problem = data_error(workbench.recipe.data)
        state = HomeState(
            recipe=workbench.recipe,
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
        parts = {
            "gpu": gpu_lines(system_status, budget),
            "run": run_lines(summary, while_away, now, width),
            "queue": queue_lines(system_status.waiting_ids),
            "recipe": recipe_lines(workbench, budget, estimate),
            "next": next_lines(step, other_steps(state, step)),
        }
        wrapped = {name: _wrapped(lines, width) for name, lines in parts.items()}
        # A line under each part.
        left = height - 1 - sum(len(lines) + 1 for lines in wrapped.values())
        wrapped["recent"] = _wrapped(self._recent(system_status, now, width, min(left, _MAX_RECENT)), width)
        return HomeFacts(wrapped, step)

    def _recent(self, system_status: SystemStatus, now: float, width: int, height: int) -> list[Content]:
        """The runs before the last."""
        shown = {
            *system_status.waiting_ids,
            system_status.active_or_last.id if system_status.active_or_last else "",
        }
        others = (run for name, run in self._summaries.all_runs().items() if name not in shown)
        return recent_lines([self._summaries.get(run) for run in islice(others, max(0, height))], now, width)


def _estimate(workbench: Workbench, budget: MemoryBudget) -> Estimate | None:
    """Estimate of the recipe in its precision; None without a model."""
    compared = workbench.comparison(budget.device)
    if isinstance(compared, UserError):
        return None
    return compared[precision_of(workbench.recipe)]


def _wrapped(lines: list[Content], width: int) -> tuple[Content, ...]:
    """Wrap the lines that are too long."""
    return tuple(
        piece for line in lines for piece in (line.wrap(width) if line.cell_length > width else [line])
    )
