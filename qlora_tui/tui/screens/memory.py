"""Memory: will it fit, item by item, and what would make it fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, ClassVar

from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Static

from qlora_tui.errors import Problem
from qlora_tui.format import gib, percent, size
from qlora_tui.memory import Change, Estimate, WhatFits, cheapest_changes, judge, what_fits
from qlora_tui.memory.estimate import PRECISIONS, Precision
from qlora_tui.memory.room import Room
from qlora_tui.recipe.fields import fields, value_of
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.commands import Command
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.widgets.recipe_strip import VERDICT_STYLE
from qlora_tui.tui.widgets.stacked_bar import legend, stacked_bar

NAMES: dict[Precision, str] = {"nf4": "NF4", "int8": "int8", "fp16": "fp16"}
TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
)
"""What ``t`` goes through: the choices of the QLoRA paper, of many recipes, and of the LoRA paper."""


def _change(id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = True) -> Command:
    return Command(id=f"memory.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer)


class MemoryScreen(WorkScreen):
    """NF4, int8 and 16 bits side by side against the card."""

    MODE = "memory"
    CSS_PATH = "memory.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "The bars are the predicted peak of a training step, cut into what it is made of. "
        "The table takes the precision apart that is marked ▸; the line under it explains the item under "
        "the cursor. A verdict is 'fits' only when even the upper end of the doubt does."
    )
    ACTIONS: ClassVar[tuple[Command, ...]] = (
        _change("batch_up", "b", "scale('training.micro_batch', 2)", "Batch ×2", "Double the micro-batch."),
        _change("batch_down", "B", "scale('training.micro_batch', 0.5)", "÷2", "Halve the micro-batch."),
        _change("length_up", "s", "scale('data.max_length', 2)", "Length ×2", "Double the sequence length."),
        _change("length_down", "S", "scale('data.max_length', 0.5)", "÷2", "Halve the sequence length."),
        _change("rank_up", "r", "scale('lora.rank', 2)", "Rank ×2", "Double the rank."),
        _change("rank_down", "R", "scale('lora.rank', 0.5)", "÷2", "Halve the rank."),
        _change("targets", "t", "targets", "Targets", "Next choice of target modules.", in_footer=False),
        _change(
            "checkpointing",
            "c",
            "checkpointing",
            "Checkpointing",
            "Checkpoint activations, or not.",
            in_footer=False,
        ),
        _change("precision", "tab,n", "next_precision", "Precision", "Take the next precision apart."),
        _change("apply", "a", "apply", "Apply", "Make the cheapest change that fits."),
    )

    class Solved(Message):
        """The slower questions are answered."""

        def __init__(self, recipe: Recipe, fitting: WhatFits, changes: tuple[Change, ...]) -> None:
            super().__init__()
            self.recipe = recipe
            self.fitting = fitting
            self.changes = changes

    def __init__(self) -> None:
        super().__init__()
        self._precision: Precision = "nf4"
        self._compared: dict[Precision, Estimate] = {}
        self._changes: tuple[Change, ...] = ()
        self._shown_for: tuple[Recipe, Room] | None = None

    def compose_body(self) -> Iterable[Widget]:
        yield Static(id="bars")
        with Horizontal(id="parts"):
            with Vertical(id="items-side"):
                yield DataTable[Any](id="items", cursor_type="row")
                yield Static(id="explanation")
            with VerticalScroll(id="answers", can_focus=False):
                yield Static(id="fitting")

    def on_mount(self) -> None:
        super().on_mount()
        table = self.query_one("#items", DataTable)
        table.add_column("item", key="item")
        table.add_column("      size", key="size")
        table.add_column("share", key="share")
        table.focus()

    def show_recipe(self, recipe: Recipe) -> None:
        room = self.workstation.room
        if self._shown_for == (recipe, room):
            return
        self._shown_for = (recipe, room)
        compared = self.workstation.workbench.comparison(room.device)
        if isinstance(compared, Problem):
            self._compared = {}
            self.query_one("#bars", Static).update(Content(f"{compared.what}\n{compared.fix}"))
            self.query_one("#items", DataTable).clear()
            self.query_one("#explanation", Static).update("")
            self.query_one("#fitting", Static).update("")
            return
        self._compared = compared
        self._show_bars()
        self._show_items()
        self.run_worker(self._solve(recipe, room), exclusive=True, group="solve")

    def on_resize(self) -> None:
        if self._compared:
            self._show_bars()

    def action_scale(self, path: str, factor: float) -> None:
        """Multiply a whole-number setting, within its bounds."""
        field = fields()[path]
        value = round(value_of(self.workstation.workbench.recipe, path) * factor)
        low, high = int(field.minimum or 1), int(field.maximum or value)
        self.workstation.edit(path, min(max(value, low), high))

    def action_targets(self) -> None:
        """The next choice of target modules; back to all-linear from one of the user's own."""
        now = self.workstation.workbench.recipe.lora.target_modules
        index = TARGETS.index(now) + 1 if now in TARGETS else 0
        self.workstation.edit("lora.target_modules", TARGETS[index % len(TARGETS)])

    def action_checkpointing(self) -> None:
        """Checkpoint activations, or not."""
        now = self.workstation.workbench.recipe.training.gradient_checkpointing
        self.workstation.edit("training.gradient_checkpointing", not now)

    def action_next_precision(self) -> None:
        """Take the next precision apart in the table."""
        self._precision = PRECISIONS[(PRECISIONS.index(self._precision) + 1) % len(PRECISIONS)]
        if self._compared:
            self._show_bars()
            self._show_items()

    def action_apply(self) -> None:
        """Make the cheapest change that fits."""
        if not self._changes:
            self.notify("Nothing to apply: it fits, or no single change helps.")
            return
        change = self._changes[0]
        if self.workstation.workbench.replace(change.recipe):
            self.workstation.recipe_edited()
            self.notify(f"{change.label}. u takes it back.")

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Explain the item under the cursor."""
        made = self._compared.get(self._precision)
        key = event.row_key.value if event.row_key else None
        item = next((i for i in made.items if i.key == key), None) if made else None
        self.query_one("#explanation", Static).update(Content(item.explanation if item else ""))

    def on_memory_screen_solved(self, message: Solved) -> None:
        """Show what fits, if the recipe is still the one it was asked for."""
        if self._shown_for is None or self._shown_for[0] != message.recipe:
            return
        self._changes = message.changes
        self.query_one("#fitting", Static).update(_answers(message.fitting, message.changes))

    async def _solve(self, recipe: Recipe, room: Room) -> None:
        architecture = self.workstation.workbench.architecture()
        if isinstance(architecture, Problem):
            return

        def answer() -> tuple[WhatFits, tuple[Change, ...]]:
            return (
                what_fits(recipe, architecture, room.bytes, device=room.device),
                cheapest_changes(recipe, architecture, room.bytes, device=room.device),
            )

        fitting, changes = await asyncio.to_thread(answer)
        self.post_message(self.Solved(recipe, fitting, changes))

    def _show_bars(self) -> None:
        room = self.workstation.room
        width = max(10, self.size.width - 41)
        lines = [Content(f"against {room.name}, {gib(room.bytes)} GiB")]
        for precision in PRECISIONS:
            made = self._compared[precision]
            verdict = judge(made, room.bytes)
            mark = "▸" if precision == self._precision else " "
            lines.append(
                Content.assemble(
                    f"{mark} {NAMES[precision]:<5}",
                    stacked_bar(made, room.bytes, width),
                    f" {gib(made.total_bytes):>6} GiB  ",
                    (verdict.word, VERDICT_STYLE[verdict.word]),
                )
            )
        lines.append(legend())
        self.query_one("#bars", Static).update(Content("\n").join(lines))

    def _show_items(self) -> None:
        table = self.query_one("#items", DataTable)
        kept = table.cursor_row
        made = self._compared[self._precision]
        table.clear()
        for item in sorted(made.items, key=lambda i: -i.bytes):
            share = percent(item.bytes / made.total_bytes)
            table.add_row(item.label, f"{size(item.bytes):>10}", f"{share:>5}", key=item.key)
        table.move_cursor(row=min(kept, table.row_count - 1))


def _answers(fitting: WhatFits, changes: tuple[Change, ...]) -> Content:
    lines = [
        Content.styled("The most that fits, one at a time", "bold"),
        Content(f"  sequence length {fitting.sequence_length:>9,}"),
        Content(f"  micro-batch     {fitting.micro_batch:>9,}"),
        Content(f"  rank            {fitting.rank:>9,}"),
    ]
    if changes:
        lines += [Content(""), Content.styled("To make it fit, the cheapest first", "bold")]
        for number, change in enumerate(changes[:4]):
            key = "a" if number == 0 else " "
            cost = f" ({change.cost})" if change.cost else ""
            word = change.verdict.word
            lines.append(
                Content.assemble(
                    f"{key} {change.label}: {gib(change.estimate.total_bytes)} GiB ",
                    (word, VERDICT_STYLE[word]),
                    cost,
                )
            )
    return Content("\n").join(lines)
