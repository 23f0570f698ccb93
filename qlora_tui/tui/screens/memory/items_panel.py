"""The items of an estimate, under the groups that the bars show, and what the one under the cursor is."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from qlora_tui.formatting import capitalize, format_bytes, format_percent
from qlora_tui.glossary import explain
from qlora_tui.memory import Estimate, Item
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.screens.memory.peak_panel import BarPart, part_of, parts_of
from qlora_tui.tui.widgets.controls import HEADING, ViList
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

BAR_WIDTH = 24
_MIN_BAR = 4
_MIN_EXPLANATION = 60
"""Cells from which an explanation stands beside its item."""
_TERMS = {
    "weights": "NF4",
    "scales": "double quantization",
    "adapter": "LoRA",
    "gradients": "gradient",
    "optimizer": "optimizer states",
    "checkpoints": "gradient checkpointing",
    "activations": "activations",
    "dropout": "dropout",
    "logits": "logits",
    "fragmentation": "allocator slack",
}
"""Word of the glossary that an item is about."""


class ItemsPanel(Panel):
    """The list has the focus of the screen; below it is the explanation."""

    def __init__(self) -> None:
        self._list = ViList(id="items")
        self._explanation = Static(id="explanation")
        self._estimate: Estimate | None = None
        super().__init__("Items", self._list, self._explanation, id="items-panel")

    def show(self, name: str, estimate: Estimate) -> None:
        """Show the items of the precision ``name``."""
        self._estimate = estimate
        self.show_title(f"{name} by item")
        self._list.show(item_lines(estimate, self._list.scrollable_content_region.width))
        self._explain()

    def on_option_list_option_highlighted(self) -> None:
        """Explain the item under the cursor."""
        self._explain()

    def _explain(self) -> None:
        key, items = self._list.current, self._estimate.items if self._estimate else ()
        item = next((item for item in items if item.key == key), None)
        if item is not None:
            has_room = self.screen.has_class("-tall") and not self.screen.has_class("-narrow")
            text = explanation_lines(item, with_term=has_room)
            update_if_changed(self._explanation, text)


def item_lines(estimate: Estimate, width: int) -> list[tuple[str, Content]]:
    """(key, line) of each item under its group, the largest first; bars are shares of the peak."""
    lines = []
    groups = [(part, size) for part, size in parts_of(estimate) if size]
    for part, size in sorted(groups, key=lambda group: -group[1]):
        head = f"{part.glyph} {capitalize(part.name)}"
        lines.append((f"{HEADING}{part.name}", _item_line(head, part, size, estimate, width)))
        items = [item for item in estimate.items if part_of(item.key) is part]
        for item in sorted(items, key=lambda item: -item.bytes):
            lines.append((item.key, _item_line(f"  {item.label}", part, item.bytes, estimate, width, item)))
    return lines


def _item_line(
    name: str, part: BarPart, size: int, estimate: Estimate, width: int, item: Item | None = None
) -> Content:
    """``  Quantized weights   3.0 GiB  47%  ▇▇▇▇``; in a wide window, with the explanation beside it."""
    style = "$foreground bold" if item is None else ""
    share = size / estimate.total_bytes
    text = f"{name:<22.22} {format_bytes(size):>9} {format_percent(share):>4} "
    left = width - len(text)
    cells = min(left, BAR_WIDTH)
    drawn = bar(share, cells).replace("░", " ") if cells >= _MIN_BAR else ""
    beside = ""
    if item is not None and left >= BAR_WIDTH + _MIN_EXPLANATION:
        beside = Content(f"  {item.explanation}").truncate(left - BAR_WIDTH, ellipsis=True).plain
    glyphs = 1 if item is None else 0
    return Content.assemble(
        (text[:glyphs], part.style), (text[glyphs:], style), (drawn, part.style), (beside, "$text-muted")
    )


def explanation_lines(item: Item, *, with_term: bool) -> Content:
    """The item under the cursor: its formula, and ``with_term`` what the glossary says of it."""
    lines = [Content.assemble((f"{item.label}: ", "bold"), item.explanation)]
    term = _TERMS.get(item.key)
    if with_term and term is not None and not (term == "NF4" and "× 1 byte" in item.explanation):
        lines.append(Content.assemble((f"{term}: ", "bold $text-muted"), (explain(term), "$text-muted")))
    return Content("\n").join(lines)
