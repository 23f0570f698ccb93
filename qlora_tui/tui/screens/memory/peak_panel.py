"""The peak of each precision as a bar against the limit, and one of them item by item.

The parts of a bar have their textures, so that color is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.content import Content
from textual.widgets import Static

from qlora_tui.formatting import capitalize, format_bytes, format_gib, format_percent
from qlora_tui.glossary import explain
from qlora_tui.memory import Estimate, Item, Verdict, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import ADAPTER_ITEMS, LOADING, PRECISIONS, Precision, why_int8_is_larger
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import PRECISION_NAMES, verdict_words
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.controls import HEADING, ViList
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_FRAME = 4
"""Cells of a panel's border and padding."""
_WORDS = 41
"""Cells of a line around its bar."""
_SPARE = 19
_ITEM_BAR = 24
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


@dataclass(frozen=True)
class BarPart:
    """Items that belong together, drawn alike."""

    name: str
    glyph: str
    style: str
    keys: frozenset[str]


_BASE = ("weights", "scales", "linear", "embedding", "head", "norms", "experts", "vision", "loading")
_ACTIVATIONS = (
    "checkpoints",
    "activations",
    "adapter_inputs",
    "int8_inputs",
    "dropout",
    "scores",
    "mask",
    "hidden_gradient",
    "inputs",
)

PARTS: tuple[BarPart, ...] = (
    BarPart("base weights", "█", "$primary", frozenset(_BASE)),
    BarPart("adapter", "▚", "$accent", frozenset(ADAPTER_ITEMS)),
    BarPart("activations", "▓", "$success", frozenset(_ACTIVATIONS)),
    BarPart("loss", "▒", "$warning", frozenset(("logits",))),
    BarPart("overhead", "░", "$secondary", frozenset()),
)
"""In the order they are drawn; the last takes every item that no other names."""


def part_of(key: str) -> BarPart:
    """The part that an item is drawn as."""
    return next((part for part in PARTS if key in part.keys), PARTS[-1])


def parts_of(estimate: Estimate) -> list[tuple[BarPart, int]]:
    """Bytes of each part, in the order they are drawn."""
    sums = dict.fromkeys(PARTS, 0)
    for item in estimate.items:
        sums[part_of(item.key)] += item.bytes
    return list(sums.items())


def stacked_bar(estimate: Estimate, full_bytes: int, width: int) -> Content:
    """Draw ``width`` cells for ``full_bytes``; a longer bar is cut and marked with ▶."""
    pieces: list[tuple[str, str]] = []
    drawn = 0
    filled_bytes = 0
    for part, bytes_ in parts_of(estimate):
        filled_bytes += bytes_
        end = min(width, round(filled_bytes / full_bytes * width))
        pieces.append((part.glyph * (end - drawn), part.style))
        drawn = end
    if filled_bytes > full_bytes:
        text = Content.assemble(*pieces)
        return Content.assemble(text[: width - 1], ("▶", "$error bold"))
    return Content.assemble(*pieces, ("·" * (width - drawn), "dim"))


def precision_bars(
    compared: Mapping[Precision, Estimate],
    selected: Precision,
    recipe_precision: Precision,
    budget_bytes: int,
    width: int,
    *,
    can_train: bool,
) -> list[Content]:
    """``▸ NF4  ██▚▓▒·····   12.3 GiB fits  ◂ recipe``: a line of ``width`` cells for each precision.

    With room for it, how much is left or missing stands behind the verdict.
    """
    has_spare = width >= WIDE_CELLS - _FRAME
    bar_cells = max(10, width - _WORDS - (_SPARE if has_spare else 0))
    lines = []
    for precision in PRECISIONS:
        estimate = compared[precision]
        verdict = check_fit(estimate, budget_bytes)
        word, style = verdict_words(verdict.word, can_train=can_train)
        spare = f"{spare_words(verdict):>{_SPARE}}" if has_spare else ""
        is_selected = precision == selected
        lines.append(
            Content.assemble(
                (
                    f"{'▸' if is_selected else ' '} {PRECISION_NAMES[precision]:<5}",
                    "bold" if is_selected else "",
                ),
                stacked_bar(estimate, budget_bytes, bar_cells),
                f" {format_gib(estimate.total_bytes):>6} GiB ",
                (f"{word:<12}", style),
                (spare, "$text-muted"),
                (" ◂ recipe" if precision == recipe_precision else "", "$accent"),
            )
        )
    return lines


def spare_words(verdict: Verdict) -> str:
    """``17.0 GiB to spare``, or ``2.1 GiB over``."""
    return f"{format_gib(abs(verdict.spare_bytes))} GiB {'over' if verdict.spare_bytes < 0 else 'to spare'}"


def legend() -> Content:
    """Which texture is what."""
    words = [Content.assemble((part.glyph * 2, part.style), f" {part.name}") for part in PARTS]
    return Content("  ").join(words)


def peak_words(compared: Mapping[Precision, Estimate], *, short: bool) -> str:
    """``Peak of a training step``, or which precisions take the most memory before it, while loading."""
    loading = [PRECISION_NAMES[key] for key, one in compared.items() if one.peak_phase == LOADING]
    if not loading:
        return "Peak" if short else "Peak of a training step"
    if len(loading) == len(compared):
        return "Peak, while loading,"
    return f"Peak ({' and '.join(loading)}: while loading)"


def budget_words(budget: MemoryBudget, system_status: SystemStatus) -> str:
    """``24.0 GiB: RTX 4090, 22.1 free now``: the memory that estimates are compared with."""
    size = f"{format_gib(budget.bytes)} GiB"
    gpu, free = system_status.gpu, system_status.free_bytes
    if gpu is not None and budget.name == gpu.short_name:
        return f"{size}: {budget.name}" + ("" if free is None else f", {format_gib(free)} free now")
    if budget.is_assumed:
        return f"{size} (assumed; {key_name('app.assume_gpu')} changes it)"
    return f"{size}, {budget.name}"


def levels_line(estimate: Estimate, layers: int, *, short: bool) -> str:
    """Peak of the process with its uncertainty and phase, and what of it PyTorch holds, with its tensors.

    ``layers``: how many the model has. ``short``: leave out the tensors, for 76 cells.
    """
    low, high = format_gib(estimate.band.low_bytes), format_gib(estimate.band.high_bytes)
    doubt = f" ({low} to {high})" if low != high else ""
    reserved, tensors = format_gib(estimate.reserved_bytes), format_gib(estimate.allocated_bytes)
    in_tensors = "" if short else f" of it, {tensors} in tensors"
    peak = f"Peak {format_gib(estimate.process_bytes)} GiB{doubt}, {peak_time(estimate, layers)}"
    return f"{peak}; PyTorch {'' if short else 'holds '}{reserved}{in_tensors}"


def peak_time(estimate: Estimate, layers: int) -> str:
    """``while loading``, or the part of the step: ``backward of the last layer``.

    Layers are counted from 0, as on the LoRA screen.
    """
    if estimate.peak_phase == LOADING:
        return "while loading"
    head, _, number = estimate.peak_phase.rpartition(" layer ")
    ends = {"0": "first", str(layers - 1): "last"}
    return f"{head} the {ends[number]} layer" if head and number in ends else estimate.peak_phase


"""Cells of a panel's border and padding."""


class PeakPanel(Panel):
    """Bars, their legend, the peak of the marked one in numbers, and why int8 takes more than 16 bits."""

    def __init__(self) -> None:
        self._bars = Static(id="bars")
        keys = (("memory.next", "next precision"), ("memory.use", "train in this"))
        super().__init__("Peak", self._bars, keys=keys, id="peak-panel")

    def show(
        self,
        heading: tuple[str, str],
        compared: Mapping[Precision, Estimate],
        marked: Precision,
        of_recipe: Precision,
        limit_bytes: int,
        width: int,
        *,
        layers: int,
        can_train: bool,
    ) -> None:
        """Show these estimates under a heading, whose second part is less important."""
        self.show_title(Content.assemble(heading[0], (heading[1], "$text-muted not bold")))
        reason = why_int8_is_larger(compared["int8"], compared["fp16"])
        lines = [
            *precision_bars(compared, marked, of_recipe, limit_bytes, width, can_train=can_train),
            legend(),
            Content.styled(
                levels_line(compared[marked], layers, short=width < WIDE_CELLS - _FRAME), "$text-muted"
            ),
            *([Content.styled(reason, "$text-muted")] if reason else []),
        ]
        update_if_changed(self._bars, Content("\n").join(lines))


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
    cells = min(left, _ITEM_BAR)
    drawn = bar(share, cells).replace("░", " ") if cells >= _MIN_BAR else ""
    beside = ""
    if item is not None and left >= _ITEM_BAR + _MIN_EXPLANATION:
        beside = Content(f"  {item.explanation}").truncate(left - _ITEM_BAR, ellipsis=True).plain
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
