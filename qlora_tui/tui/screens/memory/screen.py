"""The Memory screen: whether the recipe fits, its memory by item, and changes that make it fit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.catalog.architecture_types import Architecture, context_length_warning
from qlora_tui.catalog.local_models import load_model_config
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_percent
from qlora_tui.memory import Estimate, Verdict, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import PRECISIONS, Precision, precision_of, step_timeline, with_precision
from qlora_tui.memory.quality import Quality, describe_quality, measure_in_child
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.step import Moment
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.exact_memory import TraceStopped, trace_all
from qlora_tui.tui.key_names import highlight_keys, key_name, settings_title
from qlora_tui.tui.render.labels import PRECISION_NAMES, fit_title
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.memory.settings_table import settings_table
from qlora_tui.tui.screens.memory.step_panels import (
    ItemsPanel,
    budget_words,
    has_even_colors,
    peak_lines,
    peak_time,
    peak_words,
)
from qlora_tui.tui.screens.memory.timeline import TIMELINE, timeline_lines, timeline_title
from qlora_tui.tui.screens.memory.what_fits import (
    METHOD_OF_PRECISION,
    FitPanel,
    Solution,
    next_targets,
    solve,
)
from qlora_tui.tui.screens.modals.dialogs import TextDialog
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.threads import Measurement, run_stoppable
from qlora_tui.tui.widgets.controls import Drawing, Lines, ModelProblem, Panel
from qlora_tui.worker import Progress

SETTLED_S = 0.15
"""Seconds without a key press after which the slow computations start."""
TRACE_SETTLED_S = 0.6
"""Seconds without a key press after which a step is traced. A trace takes a second or more."""
_FRAME = 4
"""Width of a panel's border and padding, in cells."""


class QualityDialog(TextDialog[bool]):
    """Dialog that describes the measured effects of quantization. Returns whether to use 16 bits for the
    layers with the largest errors.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("k", "dismiss(True)", "Keep these layers in 16 bits"),
        Binding("escape,q", "dismiss(False)", "Close"),
    ]

    def __init__(self, quality: Quality) -> None:
        super().__init__("What quantization changes", Static(Content("\n\n".join(describe_quality(quality)))))


class MemoryScreen(WorkScreen):
    """The Memory screen: the estimates for NF4, int8 and 16 bits, compared with the GPU's memory."""

    MODE = "memory"
    CSS_PATH = "memory.tcss"
    EDITS_RECIPE = True
    IS_DENSE = True
    FOOTER_APP_COMMANDS: ClassVar[frozenset[str]] = frozenset({"app.assume_gpu"})

    @dataclass
    class Solved(Message):
        """Posted when the slow computations for a recipe have finished."""

        recipe: Recipe
        solution: Solution

    def __init__(self) -> None:
        super().__init__()
        self._precision: Precision | None = None
        self._compared: dict[Precision, Estimate] = {}
        self._solution = Solution()
        self._shown_for: tuple[Recipe, MemoryBudget, Architecture | None] | None = None
        self._heading = Content("")
        self._timeline: tuple[Estimate, tuple[Moment, ...]] | None = None
        self._offered: object = None
        self._trace_note = ""
        self._quality = Measurement(self._show_all)

    @property
    def precision(self) -> Precision:
        """The precision whose items are shown: the recipe's, unless the user has selected another
        precision.
        """
        return self._precision or precision_of(self.app.workbench.recipe)

    def compose_body(self) -> Iterable[Widget]:
        yield Panel("Memory", ModelProblem(), id="no-estimate")
        with Vertical(id="memory-body"):
            keys = (("memory.next", "next precision"), ("memory.use", "train in this"))
            yield Panel("Peak", Lines(id="bars"), keys=keys, id="peak-panel")
            with Horizontal(id="memory-parts"):
                yield ItemsPanel()
                with Vertical(id="memory-side"):
                    yield FitPanel()
                    yield Panel("Change", Lines(id="memory-settings"), id="memory-settings-panel")
            yield Panel(TIMELINE, Drawing(id="timeline"), id="timeline-panel")

    def on_mount(self) -> None:
        self.query_one("#items").focus()

    def show_recipe(self, recipe: Recipe) -> None:
        budget = self.app.memory_budget
        # The architecture is part of the key, because an outline of the model is later replaced by the exact
        # structure.
        shown_for = (recipe, budget, self._architecture())
        if self._shown_for == shown_for:
            return
        self._shown_for = shown_for
        compared = self.app.workbench.comparison(budget.device)
        problem = compared if isinstance(compared, UserError) else None
        self.query_one("#memory-body").display = problem is None
        self.query_one("#no-estimate").display = problem is not None
        self.query_one(ModelProblem).show(problem)
        self._compared = {} if isinstance(compared, UserError) else compared
        if problem is not None:
            return
        self._solution = Solution()
        self.workers.cancel_group(self, "changes")
        if self._trace_of(precision_of(recipe)) is None:
            self._trace_note = "estimated, tracing…"
            self._trace(recipe, budget)
        else:
            self._trace_note = ""
        self._show_all()
        self._solve(recipe, budget)

    def show_system_status(self, system_status: SystemStatus) -> None:
        if self._compared and self._heading_text() != self._heading:
            self._show_bars()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether an action is available. An action that would have no effect is not available."""
        if action == "use":
            return self.precision != precision_of(self.app.workbench.recipe)
        if action in ("apply", "choose"):
            return bool(self._compared) and not self._recipe_fits() and not self._solution.least_bytes
        if action == "timeline":
            return self.has_class("-short")
        return super().check_action(action, parameters)

    def on_resize(self) -> None:
        # The lists have their new width only after the layout.
        self.call_after_refresh(self._show_all)

    def action_targets(self) -> None:
        architecture = self._architecture()
        kinds = architecture.kinds() if architecture else ()
        now = self.app.workbench.recipe.lora.target_modules
        self.app.edit("lora.target_modules", next_targets(now, kinds))

    def action_next_bar(self, step: int) -> None:
        """Select the precision that is ``step`` lines further down, and show its items. Wrap around at
        either end.
        """
        self._precision = PRECISIONS[(PRECISIONS.index(self.precision) + step) % len(PRECISIONS)]
        self._show_all()

    def action_use(self) -> None:
        self.app.edit("quantization.method", METHOD_OF_PRECISION[self.precision])

    def action_apply(self) -> None:
        self._apply(0)

    def action_choose(self) -> None:
        self.remove_class("-timeline")
        choices = self.query_one(FitPanel).choices
        (self.query_one("#items") if choices.has_focus else choices).focus()

    def action_measure_quality(self) -> None:
        """If a measurement is in progress, stop it; otherwise, measure how the recipe's quantization changes
        the model.
        """
        if not self._quality.stop():
            self._measure_quality(self.app.workbench.recipe)

    def action_timeline(self) -> None:
        self.toggle_class("-timeline")
        self.call_after_refresh(self._show_all)
        if not self.has_class("-timeline"):
            self.call_after_refresh(self.query_one("#items").focus)

    def _apply(self, number: int) -> None:
        if number >= len(self._solution.changes):
            self.notify("Still searching for a change that fits.")
            return
        change = self._solution.changes[number]
        self.query_one("#items").focus()
        if self.app.workbench.replace(change.recipe):
            self._precision = None
            self.app.recipe_edited()
            self.notify(f"{change.label}. Press {key_name('app.undo')} to undo.")

    def on_fit_panel_chosen(self, message: FitPanel.Chosen) -> None:
        """Apply the change that the user has selected."""
        self._apply(message.number)

    def on_memory_screen_solved(self, message: Solved) -> None:
        """Show the results of the slow computations, unless the recipe has changed in the meantime."""
        if self._shown_for is None or self._shown_for[0] != message.recipe:
            return
        self._solution = message.solution
        self._trace_changes(message.recipe, self._shown_for[1])
        self._show_bars()
        self._show_fit()
        self._show_settings()

    @work(exclusive=True, group="solve")
    async def _solve(self, recipe: Recipe, budget: MemoryBudget) -> None:
        architecture = self._architecture()
        if architecture is None:
            return
        fits = self._recipe_fits()
        await asyncio.sleep(SETTLED_S)
        solution = await asyncio.to_thread(solve, recipe, architecture, budget, fits=fits)
        self.post_message(self.Solved(recipe, solution))

    @work(exclusive=True, group="quality")
    async def _measure_quality(self, recipe: Recipe) -> None:
        def measure(say: Callable[[str], None], should_stop: Callable[[], bool]) -> Quality:
            def on_progress(progress: Progress) -> None:
                share = f" {format_percent(progress.done / progress.total)}" if progress.total else ""
                say(f"quality: {progress.text}{share}")

            return measure_in_child(recipe, on_progress=on_progress, should_stop=should_stop)

        quality = await self._quality.run(measure, "quality: starting")
        if quality is None:
            return
        if await self.app.push_screen_wait(QualityDialog(quality)):
            skipped = self.app.workbench.recipe.quantization.skip
            self.app.edit("quantization.skip", tuple(dict.fromkeys((*skipped, quality.skip))))

    @work(exclusive=True, group="trace")
    async def _trace(self, recipe: Recipe, budget: MemoryBudget) -> None:
        """Trace a training step of the real model, and replace the instant estimate with the exact
        estimate.
        """
        tell = self.app.watch_verdict()
        await asyncio.sleep(TRACE_SETTLED_S)
        try:
            await self._trace_steps([recipe], recipe, budget)
            tell("A step was traced")
        except TraceStopped:
            return
        except UserError as problem:
            self._trace_note = f"estimated, not traced: {problem.what}"
            self._show_all()

    @work(exclusive=True, group="changes")
    async def _trace_changes(self, recipe: Recipe, budget: MemoryBudget) -> None:
        """Trace the recipe with each offered change, and with the change that each key would make. Do nothing
        if the recipe itself has not been traced.
        """
        if self._trace_of(precision_of(recipe)) is not None and not self._solution.is_exact:
            with suppress(UserError, TraceStopped):
                await self._trace_steps(self._solution.recipes, recipe, budget)

    async def _trace_steps(self, recipes: Collection[Recipe], recipe: Recipe, budget: MemoryBudget) -> None:
        """Trace a training step of each of ``recipes``, and update all figures. Raises TraceStopped if the
        trace is stopped, and UserError if a step cannot be traced.
        """
        architecture, config = self._architecture(), load_model_config(recipe.model.id)
        if architecture is not None and await run_stoppable(
            trace_all, config, recipes, architecture, budget.device
        ):
            self.app.recipe_changed.publish(self.app.workbench.recipe)

    def _show_all(self) -> None:
        if self._compared:
            self._show_bars()
            self.query_one(ItemsPanel).show(PRECISION_NAMES[self.precision], self._estimate)
            self._show_fit()
            self._show_settings()
            self._show_timeline()

    @property
    def _estimate(self) -> Estimate:
        return self._compared[self.precision]

    def _traced_words(self) -> str:
        """Return a note on the figures: which precisions were traced, and with which library. Return an empty
        string if the recipe has not been traced or the window is narrow.
        """
        own = precision_of(self.app.workbench.recipe)
        traced, name = self._trace_of(own), PRECISION_NAMES[own]
        if traced is None or self.has_class("-narrow"):
            return ""
        what = f"{name} and its changes" if self._solution.is_exact else name
        if not self.has_class("-very-wide"):
            return f"{what} traced"
        return f"{what} traced with transformers {traced.transformers}, others estimated"

    def _heading_text(self) -> Content:
        """Return the title above the bars. In a narrow window, the title is the verdict; otherwise, it gives
        the memory that the bars are compared with. Notes that do not fit are left out.
        """
        budget, room = self.app.memory_budget, self.size.width - _FRAME
        trace_note = self._trace_note or self._traced_words()
        texts = filter(None, (self._quality.progress, self._estimate.correction_words, trace_note))
        notes = [highlight_keys(f"; {text}", "$text-muted not bold") for text in texts]
        if self.has_class("-narrow"):
            can_train = self.app.workbench.model_refusal() is None
            name, verdict = PRECISION_NAMES[self.precision], self._verdict
            least = fit_title(name, verdict, 0, can_train=can_train).cell_length
            # A note is left out only if it does not fit next to the shortest title.
            notes = [note for note in notes if least + note.cell_length <= room]
            room_left = room - sum(note.cell_length for note in notes)
            title = fit_title(name, verdict, room_left, can_train=can_train)
        else:
            against = f" against {budget_words(budget, self.app.system_status)}"
            title = Content(peak_words(self._compared))
            title += highlight_keys(against, "$text-muted not bold")
        for note in notes:
            if title.cell_length + note.cell_length <= room:
                title += note
        return title

    @property
    def _verdict(self) -> Verdict:
        """The verdict on the selected precision."""
        verdict = check_fit(self._estimate, self.app.memory_budget.bytes)
        is_recipe = self.precision == precision_of(self.app.workbench.recipe)
        return replace(verdict, used_bytes=self._used_bytes) if is_recipe else verdict

    @property
    def _used_bytes(self) -> int:
        """Memory that a run of the recipe will use; 0 if unknown."""
        return 0 if self._solution.step is None else self._solution.step.estimate.process_bytes

    def _show_bars(self) -> None:
        self._refresh_offered_keys()
        self._heading = self._heading_text()
        self.query_one("#peak-panel", Panel).show_title(self._heading)
        can_train = self.app.workbench.model_refusal() is None
        lines = peak_lines(
            self._compared,
            self.precision,
            precision_of(self.app.workbench.recipe),
            self.app.memory_budget.bytes,
            self.size.width - _FRAME,
            can_train=can_train,
            is_even=has_even_colors(self),
            used_bytes=self._used_bytes,
        )
        self.query_one("#bars", Lines).show(lines)

    def _refresh_offered_keys(self) -> None:
        offered = [self.check_action(action, ()) for action in ("use", "apply", "timeline")]
        if offered != self._offered:
            self._offered = offered
            self.refresh_bindings()
            self.query_one(FitPanel).offer(changes=bool(offered[1]))

    def _show_settings(self) -> None:
        recipe, known = self.app.workbench.recipe, self._architecture()
        context = known.max_positions if known else None
        fitting = self._solution.fitting.get(self.precision)
        lowered = self._solution.lowered.get(self.precision, {})
        table = partial(settings_table, recipe, fitting, lowered, context)
        self.query_one("#memory-settings", Lines).show(table)
        title = settings_title("Change", ("memory.length_up", "×2"), ("memory.length_down", "÷2"))
        self.query_one("#memory-settings-panel", Panel).show_title(title)

    def _show_fit(self) -> None:
        recipe, budget = self.app.workbench.recipe, self.app.memory_budget
        known = self._architecture()
        self.query_one(FitPanel).show(
            PRECISION_NAMES[self.precision],
            self._estimate,
            self._verdict,
            budget,
            self._solution,
            self.app.workbench.model_refusal(),
            context_length_warning(recipe.data.max_length, known) if known else None,
            is_recipe=self.precision == precision_of(recipe),
        )

    def _architecture(self) -> Architecture | None:
        architecture = self.app.workbench.architecture()
        return None if isinstance(architecture, UserError) else architecture

    def _trace_of(self, precision: Precision) -> StepTrace | None:
        """Return the traced step of the recipe in a precision; None if the step has not been traced."""
        recipe, architecture = self.app.workbench.recipe, self._architecture()
        if architecture is None or not self._compared:
            return None
        one = recipe if precision == precision_of(recipe) else with_precision(recipe, precision)
        traces = self.app.memory_budget.device.traces
        return traces.find(one, architecture, self._compared[precision].execution)

    @property
    def _layers(self) -> int:
        known = self._architecture()
        return known.layers if known else 0

    def _recipe_fits(self) -> bool:
        verdict = self.app.workbench.verdict(self.app.memory_budget)
        return verdict is not None and verdict.fits_even_if_tight

    def _show_timeline(self) -> None:
        """Draw the timeline of the selected precision, if its panel is shown."""
        panel, estimate, known = (
            self.query_one("#timeline-panel", Panel),
            self._estimate,
            self._architecture(),
        )
        if known is None or not panel.display:
            return
        budget = self.app.memory_budget
        if self._timeline is None or self._timeline[0] is not estimate:
            recipe = with_precision(self.app.workbench.recipe, self.precision)
            moments = step_timeline(recipe, known, estimate, self._trace_of(self.precision))
            self._timeline = (estimate, moments)
        moments, when = self._timeline[1], peak_time(estimate, self._layers)
        panel.show_title(timeline_title(moments, budget.bytes, when))
        lines = partial(timeline_lines, moments, budget.bytes, has_even_colors(self))
        self.query_one("#timeline", Drawing).show(lines)
