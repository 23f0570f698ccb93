"""Memory: will it fit, item by item, and what would make it fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.catalog.context_length import context_length_warning
from qlora_tui.catalog.lookup import load_model_config
from qlora_tui.engine.trace_client import trace_step
from qlora_tui.errors import UserError
from qlora_tui.memory import (
    Estimate,
    check_fit,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import PRECISIONS, Precision, precision_of
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.commands import Command
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.recipe_line import PRECISION_NAMES
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.memory.commands import COMMANDS
from qlora_tui.tui.screens.memory.solution import METHOD_OF_PRECISION, Solution, solve
from qlora_tui.tui.screens.memory.stacked_bar import legend, precision_bars
from qlora_tui.tui.screens.memory.text import (
    budget_words,
    fixes_text,
    item_line,
    kept_layers_text,
    levels_line,
    peak_words,
    setting_controls,
    verdict_text,
)
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.model_problem import ModelProblem
from qlora_tui.tui.widgets.static_update import update_if_changed
from qlora_tui.tui.widgets.vi_list import ViList

TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
)
"""The choices of the key ``t``: those of the QLoRA paper, of many recipes, and of the LoRA paper."""
SETTLED_S = 0.15
"""Seconds without a key before the slow computations start."""


class MemoryScreen(WorkScreen):
    """NF4, int8 and 16 bits side by side, compared with the GPU's memory."""

    MODE = "memory"
    CSS_PATH = "memory.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "The bars show the predicted peak memory of a run, by what takes it: in a training step, or while "
        "loading where that takes more. The list breaks down the bar marked ▸; the sentence below explains "
        "the selected item. The last line is the peak with its range, when it is reached, what torch "
        "reserves then, and what of that is in tensors. ◂ recipe marks the precision that the recipe trains "
        "in; {memory.use} changes it to the one marked ▸.\n"
        "On the right, lower-case keys double a setting and capital keys halve it. 'fits up to' is the "
        "largest value that fits, in the precision marked ▸, with the other settings unchanged. If the "
        "recipe does not fit, {memory.apply} applies the change that costs least.\n"
        "With checkpointing auto, the bars show every layer recomputed, which is what the run needs. As many "
        "layers as fit in the memory left keep their activations, which is faster: the run uses more then.\n"
        "'fits': even the upper end of the uncertainty fits. 'tight': less than 5% is left. 'uncertain': "
        "only a part of the range fits.\n"
        "To see the estimate for another GPU, press {app.assume_gpu} and type its memory, or start the app "
        "with qlora-tui --gpu-gib 12."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS
    FOOTER_APP_COMMANDS: ClassVar[frozenset[str]] = frozenset({"app.assume_gpu"})

    class Solved(Message):
        """The slow computations are done."""

        def __init__(self, recipe: Recipe, solution: Solution) -> None:
            super().__init__()
            self.recipe = recipe
            self.solution = solution

    def __init__(self) -> None:
        super().__init__()
        self._precision: Precision | None = None
        self._compared: dict[Precision, Estimate] = {}
        self._solution = Solution()
        self._shown_for: tuple[Recipe, MemoryBudget] | None = None
        self._heading = ""
        self._offered: object = None
        self._trace_note = ""

    @property
    def precision(self) -> Precision:
        """The precision whose breakdown is shown: the recipe's until another is selected."""
        return self._precision or precision_of(self.qlora_app.workbench.recipe)

    def compose_body(self) -> Iterable[Widget]:
        yield ModelProblem()
        with Vertical(id="memory-body"):
            yield Static(id="bars")
            with Horizontal(id="memory-parts"):
                yield ViList(id="items")
                with Vertical(id="memory-side"):
                    yield Static(id="memory-settings")
                    yield Static(id="changes")
            yield Static(id="explanation")

    def on_mount(self) -> None:
        self.query_one("#items").focus()

    def show_recipe(self, recipe: Recipe) -> None:
        budget = self.qlora_app.memory_budget
        if self._shown_for == (recipe, budget):
            return
        self._shown_for = (recipe, budget)
        compared = self.qlora_app.workbench.comparison(budget.device)
        problem = compared if isinstance(compared, UserError) else None
        self.query_one("#memory-body").display = problem is None
        self.query_one(ModelProblem).show(problem)
        self._compared = {} if isinstance(compared, UserError) else compared
        if problem is not None:
            return
        self._solution = Solution()
        self._trace_note = ""
        if not self._compared[precision_of(recipe)].exact:
            self._trace_note = "tracing a step…"
            self._trace(recipe, budget)
        else:
            self.workers.cancel_group(self, "trace")
        self._show_all()
        self._solve(recipe, budget)

    def show_system_status(self, system_status: SystemStatus) -> None:
        if self._compared and self._heading_text() != self._heading:
            self._show_bars()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable keys that would change nothing."""
        if action == "use":
            return self.precision != precision_of(self.qlora_app.workbench.recipe)
        if action == "apply":
            return bool(self._compared) and not self._recipe_fits() and not self._solution.least_bytes
        return super().check_action(action, parameters)

    def on_resize(self) -> None:
        # The list knows its new width only after the layout.
        self.call_after_refresh(self._show_all)

    def action_targets(self) -> None:
        """Select the next choice that this model has; all-linear after a custom one."""
        architecture = self.qlora_app.workbench.architecture()
        kinds = () if isinstance(architecture, UserError) else architecture.kinds()
        choices = [choice for choice in TARGETS if choice == TARGETS[0] or set(choice) <= set(kinds)]
        now = self.qlora_app.workbench.recipe.lora.target_modules
        index = choices.index(now) + 1 if now in choices else 0
        self.qlora_app.edit("lora.target_modules", choices[index % len(choices)])

    def action_next_bar(self, step: int) -> None:
        """Show the breakdown of another precision."""
        self._precision = PRECISIONS[(PRECISIONS.index(self.precision) + step) % len(PRECISIONS)]
        self._show_all()

    def action_use(self) -> None:
        """Train in the precision whose breakdown is shown."""
        self.qlora_app.edit("quantization.method", METHOD_OF_PRECISION[self.precision])

    def action_apply(self) -> None:
        """Apply the cheapest change that fits."""
        if not self._solution.changes:
            self.notify("Still searching for a change that fits.")
            return
        change = self._solution.changes[0]
        if self.qlora_app.workbench.replace(change.recipe):
            self._precision = None
            self.qlora_app.recipe_edited()
            self.notify(f"{change.label}. Press {key_name('app.undo')} to undo.")

    def on_option_list_option_highlighted(self) -> None:
        """Explain the item under the cursor."""
        self._show_explanation()

    def on_memory_screen_solved(self, message: Solved) -> None:
        """Show what fits, if the recipe has not changed since."""
        if self._shown_for is None or self._shown_for[0] != message.recipe:
            return
        self._solution = message.solution
        self._refresh_offered_keys()
        self._show_side_panel()

    @work(exclusive=True, group="solve")
    async def _solve(self, recipe: Recipe, budget: MemoryBudget) -> None:
        architecture = self.qlora_app.workbench.architecture()
        if isinstance(architecture, UserError):
            return

        fits = self._recipe_fits()

        await asyncio.sleep(SETTLED_S)
        solution = await asyncio.to_thread(solve, recipe, architecture, budget, fits=fits)
        self.post_message(self.Solved(recipe, solution))

    @work(exclusive=True, group="trace")
    async def _trace(self, recipe: Recipe, budget: MemoryBudget) -> None:
        """Trace a step of the real model, if its layers have no formula."""
        await asyncio.sleep(SETTLED_S)
        try:
            traced = await trace_step(load_model_config(recipe.model.id), recipe, budget.device)
        except UserError as problem:
            self._trace_note = f"not traced: {problem.what}"
        else:
            self._trace_note = ""  # the estimate says so
            self.qlora_app.workbench.use_trace(recipe, budget.device, traced)
            compared = self.qlora_app.workbench.comparison(budget.device)
            self._compared = self._compared if isinstance(compared, UserError) else compared
        self._show_all()

    def _show_all(self) -> None:
        if self._compared:
            self._show_bars()
            self._show_items()
            self._show_side_panel()
            self._show_explanation()

    def _heading_text(self) -> str:
        notes = [text for text in (self._compared[self.precision].correction_words, self._trace_note) if text]
        peak = peak_words(self._compared, short=bool(notes) and self.size.width < WIDE_CELLS)
        budget = budget_words(self.qlora_app.memory_budget, self.qlora_app.system_status)
        return "; ".join([f"{peak} against {budget}", *notes])

    def _show_bars(self) -> None:
        self._refresh_offered_keys()
        recipe_precision = precision_of(self.qlora_app.workbench.recipe)
        budget_bytes = self.qlora_app.memory_budget.bytes
        self._heading = self._heading_text()
        lines = [
            Content.styled(self._heading, "$text-muted"),
            *precision_bars(
                self._compared, self.precision, recipe_precision, budget_bytes, max(10, self.size.width - 43)
            ),
            legend(),
        ]
        update_if_changed(self.query_one("#bars", Static), Content("\n").join(lines))

    def _refresh_offered_keys(self) -> None:
        offered = [self.check_action(action, ()) for action in ("use", "apply")]
        if offered != self._offered:
            self._offered = offered
            self.refresh_bindings()

    def _show_items(self) -> None:
        estimate = self._compared[self.precision]
        items = sorted(estimate.items, key=lambda item: -item.bytes)
        list_ = self.query_one("#items", ViList)
        width = list_.scrollable_content_region.width
        list_.show([(item.key, item_line(item, estimate, items[0].bytes, width)) for item in items])

    def _show_side_panel(self) -> None:
        recipe, estimate = self.qlora_app.workbench.recipe, self._compared[self.precision]
        architecture = self.qlora_app.workbench.architecture()
        known = None if isinstance(architecture, UserError) else architecture
        context = known.max_positions if known else None
        update_if_changed(
            self.query_one("#memory-settings", Static),
            setting_controls(recipe, self._solution.fitting.get(self.precision), context),
        )
        beside = self.query_one("#changes", Static)
        parts = fixes_text(self._solution, beside.content_size.width)
        if known and (warning := context_length_warning(recipe.data.max_length, known)):
            # The setting itself is shown among the controls.
            parts.append(Content.styled(f"{warning.why} {warning.fix}", "$warning"))
        if self._solution.kept_layers is not None and self.precision == precision_of(recipe):
            parts.append(kept_layers_text(self._solution.kept_layers, estimate.total_bytes))
        parts += [Content(note) for note in estimate.notes]
        if conversion := self._solution.conversion:
            on_cpu = self.qlora_app.memory_budget.device.kind == "cpu"
            parts.append(Content(conversion.words(estimate.process_bytes if on_cpu else None)))
        if self.size.width >= WIDE_CELLS:
            verdict = check_fit(estimate, self.qlora_app.memory_budget.bytes)
            parts.append(verdict_text(verdict, PRECISION_NAMES[self.precision]))
        update_if_changed(beside, Content("\n\n").join(parts))

    def _recipe_fits(self) -> bool:
        estimate = self._compared[precision_of(self.qlora_app.workbench.recipe)]
        return check_fit(estimate, self.qlora_app.memory_budget.bytes).fits_even_if_tight

    def _show_explanation(self) -> None:
        estimate = self._compared.get(self.precision)
        key = self.query_one("#items", ViList).current
        item = next((item for item in estimate.items if item.key == key), None) if estimate else None
        if estimate is None or item is None:
            return
        explained = Content.assemble((f"{item.label}: ", "bold"), item.explanation)
        levels = Content.styled(levels_line(estimate), "$text-muted")
        update_if_changed(self.query_one("#explanation", Static), Content("\n").join([explained, levels]))
