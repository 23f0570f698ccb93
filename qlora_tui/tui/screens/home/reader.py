"""Reads what Home shows: the state of the app, of the machine and of the runs.

Import and use this module only in a thread, since its own imports would delay the first frame.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from textual.content import Content

from qlora_tui import paths
from qlora_tui.catalog.local_models import LocalModel, ModelNotFoundError, find_files, list_local_models
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.errors import UserError
from qlora_tui.formatting import short_model_name
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.presets import Preset, list_presets
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.data_checks import data_error
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.expected_time import LEAST_STEPS, Forecast, forecast
from qlora_tui.runs.result_weights import better_checkpoint, summary_weights
from qlora_tui.runs.run_summary import RunSummary, SummaryCache, data_words
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui.draft import draft_written_at
from qlora_tui.tui.render.labels import recipe_fit, refusal_words
from qlora_tui.tui.screens.home.first_lines import way_lines
from qlora_tui.tui.screens.home.next_step import HomeState, Steps, next_step, other_steps
from qlora_tui.tui.screens.home.panel_lines import (
    HomeLayout,
    gpu_lines,
    machine_line,
    other_run_line,
    queue_lines,
    recipe_lines,
    run_lines,
    server_line,
)
from qlora_tui.tui.screens.models.model_facts import need
from qlora_tui.tui.screens.models.model_list import ListedModels, starters
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench

_MAX_RECENT = 40
"""Maximum number of recent runs to read. A window with 60 rows shows fewer runs."""


@dataclass(frozen=True)
class HomeFacts:
    """What Home shows."""

    lines: dict[str, tuple[Content, ...]]
    """Lines by panel: run, gpu, queue, recipe, way."""
    steps: Steps
    last: RunSummary | None
    """The active run or, if there is none, the last run; None if there are no runs."""
    recent: tuple[RunSummary, ...]
    """The runs other than ``last`` that are neither queued nor active, newest first."""
    models: ListedModels | None = None
    """Models to choose from; None if the recipe already has a model, or if there is a run."""
    is_partial: bool = False
    """Whether some facts are missing, because :meth:`HomeReader.look_ahead` has not been called for this
    state yet.
    """
    presets: tuple[Preset, ...] = ()
    is_estimate: bool = False
    """Whether the number of steps of the next run is an estimate, because its samples have not been
    counted.
    """


class HomeReader:
    """Reads what Home shows. Parts that have not changed since the last read are cached."""

    def __init__(self, seen_at: float, started_at: float) -> None:
        self._seen_at = seen_at
        """Unix time at which the app was last in use before this start. If the app was never used before, the
        time of this start.
        """
        self._started_at = started_at
        self._summaries = SummaryCache()
        self._local_models: list[LocalModel] | None = None
        self._presets = list_presets()
        self._outlook: tuple[object, Forecast | None, UserError | None] = (None, None, None)
        """Result of the last :meth:`look_ahead`: the state that it was for, the forecast of a run, and the
        error in the data.
        """
        self._to_choose: tuple[object, ListedModels | None] = (None, None)

    def invalidate_models(self) -> None:
        """Read the presets again now, and the models on this machine at the next :meth:`read`."""
        self._local_models, self._presets = None, list_presets()

    def read(
        self,
        workbench: Workbench,
        budgets: tuple[MemoryBudget, MemoryBudget],
        system_status: SystemStatus,
        now: float,
        layout: HomeLayout,
        counts: int = 0,
    ) -> HomeFacts:
        """Read everything that Home shows.

        Args:
            workbench: The recipe.
            budgets: The memory of the device that a run on this machine would use, and the memory that models
                must fit.
            system_status: The latest readings.
            now: The current Unix time.
            layout: Widths of the panels.
            counts: Number of times that samples have been counted. A new count invalidates the last
                :meth:`look_ahead`.
        """
        budget, planned = budgets
        local_models = self._local_models  # the app may reset it in the meantime
        if local_models is None:
            local_models = [model for model in list_local_models() if model.refusal is None]
            self._local_models = local_models
        status = system_status.active_or_last_status
        is_news = status is not None and status.state not in ACTIVE and status.at > self._seen_at
        while_away = is_news and status is not None and status.at < self._started_at
        verdict = workbench.verdict(budget)
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
        refusal = workbench.model_refusal()
        is_known = self._outlook[0] == self._outlook_key(workbench.recipe, system_status, counts)
        expected, problem = self._outlook[1:] if is_known else (None, None)
        state = HomeState(
            recipe=workbench.recipe,
            model_error=refusal_words(refusal) if refusal else "",
            can_download=isinstance(refusal, MissingFilesError | ModelNotFoundError),
            data_error=refusal_words(problem) if problem else "",
            local_models=len(local_models),
            verdict="" if verdict is None else verdict.word,
            last_run=summary.name if summary else "",
            last_state=status.state if status else None,
            last_is_news=is_news,
            last_checkpoint=checkpoints[-1][0] if checkpoints else 0,
            last_weights=_proposed_weights(summary) if summary else "",
            last_total_steps=status.total_steps if status else 0,
            last_fix=summary.fix if summary else "",
            edited_since=status is not None and draft_written_at() > status.at,
            duration=expected.duration if expected else "",
        )
        step = next_step(state)
        if summary is None:
            run = [Content.styled("No runs yet.", "dim")]
        else:
            waiting = [RunDir(paths.runs_dir() / id_).name for id_ in system_status.waiting_ids[:1]]
            run = run_lines(summary, while_away, now, layout, waiting)
            others = zip(system_status.also_active, system_status.also_active_statuses, strict=True)
            run += [other_run_line(other.name, status, layout.left) for other, status in others]
        gpu = (
            [machine_line(system_status, budget, layout.wide)]
            if layout.is_compact
            else gpu_lines(system_status, budget, layout.right, is_compact=False)
        )
        lines = {
            "run": run,
            "gpu": [*gpu, *map(server_line, system_status.servers)],
            "queue": queue_lines(system_status.waiting_ids),
            "recipe": recipe_lines(
                workbench,
                budget,
                refusal,
                expected,
                layout.right,
                is_compact=layout.is_compact,
                is_quiet=system_status.active is not None,
            ),
            "way": way_lines(self._done(workbench, budget, refusal, problem), is_compact=layout.is_compact),
        }
        return HomeFacts(
            {name: tuple(texts) for name, texts in lines.items()},
            (step, other_steps(state, step)),
            summary,
            self._recent(system_status),
            None if summary else self._models(workbench.recipe, planned, local_models),
            presets=tuple(self._presets),
            is_estimate=expected is not None and not expected.length.is_exact,
            is_partial=not is_known,
        )

    def _done(
        self,
        workbench: Workbench,
        budget: MemoryBudget,
        refusal: UserError | None,
        data_problem: UserError | None,
    ) -> dict[str, str | Content]:
        """Return what the recipe already has for a run (a model, data, enough memory), by the id of the
        command that opens the screen for it.
        """
        recipe, done = workbench.recipe, dict[str, str | Content]()
        if recipe.model.id and refusal is None:
            done["go.models"] = short_model_name(recipe.model.id)
        if recipe.data.sources and data_problem is None:
            done["go.data"] = data_words(recipe)
        verdict, fit = workbench.verdict(budget), recipe_fit(workbench, budget)
        if verdict is not None and fit is not None and verdict.fits_even_if_tight:
            done["go.memory"] = fit.draw(0)
        return done

    def look_ahead(self, recipe: Recipe, system_status: SystemStatus, counts: int) -> None:
        """Check whether the data can be used, estimate how long a run takes, and store both results for the
        next read. This takes seconds if the data is large. ``counts``: number of times that samples have been
        counted.
        """
        key, files = self._outlook_key(recipe, system_status, counts), None
        with suppress(UserError):
            files = find_files(recipe.model.id)
        expected = forecast(recipe, system_status.machine, files) if recipe.has_model_and_data else None
        self._outlook = (key, expected, data_error(recipe, files))

    def _outlook_key(self, recipe: Recipe, system_status: SystemStatus, counts: int) -> object:
        last, stamps = system_status.active_or_last_status, map(source_stamps, every_source(recipe.data))
        # During its first steps, the active run improves the forecast for the next run with each step.
        now = (last.state, min(last.step, LEAST_STEPS)) if last else None
        return (recipe, counts, system_status.gpu, now, list(stamps))

    def _models(self, recipe: Recipe, budget: MemoryBudget, local: list[LocalModel]) -> ListedModels | None:
        """Return the models on this machine and recommended models from the Hub; None if the recipe already
        has a model.
        """
        if recipe.model.id:
            return None
        key = (recipe, budget, id(local))
        if key != self._to_choose[0]:
            needs = {}
            for model in local:
                with suppress(UserError):
                    if model.architecture is not None:
                        needs[model.path] = need(model.architecture, recipe, budget)
            listed = ListedModels(local=local, needs=needs, starters=starters(recipe, budget))
            self._to_choose = (key, listed)
        return self._to_choose[1]

    def _recent(self, system_status: SystemStatus) -> tuple[RunSummary, ...]:
        """Return the runs, newest first, except the queued runs, the active runs, and the last run."""
        shown = {
            *system_status.waiting_ids,
            *(run.id for run in system_status.also_active),
            system_status.active_or_last.id if system_status.active_or_last else "",
        }
        others = (run for name, run in self._summaries.all_runs().items() if name not in shown)
        return tuple(self._summaries.get(run) for run in islice(others, _MAX_RECENT))


def _proposed_weights(summary: RunSummary) -> str:
    """Return the weights that Chat and Export propose for a run, such as ``step 640 (best)``; empty unless
    the run ended because all steps were done.
    """
    if summary.status.state != "finished" or summary.ended_early:
        return ""
    return summary_weights(summary, better_checkpoint(summary, dict(summary.run.checkpoints())))
