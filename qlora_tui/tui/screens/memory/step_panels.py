"""Panels for the memory of a training step. One panel compares the peak at each precision with the memory
limit; the other lists the items of one precision's peak.

On a terminal with few colors or none, the parts of a bar have different textures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from textual.content import Content
from textual.widget import Widget

from qlora_tui.formatting import capitalize, format_bytes, format_gib, format_percent
from qlora_tui.glossary import explain
from qlora_tui.memory import Estimate, Item, Verdict, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import ADAPTER_ITEMS, LOADING, PRECISIONS, Precision, why_int8_is_larger
from qlora_tui.memory.explain import INSTANT
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.labels import PRECISION_NAMES, needed_words, place_words, verdict_words
from qlora_tui.tui.render.meters import CLIPPED, STACKED, bar
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.themes import lacks_shades
from qlora_tui.tui.widgets.controls import HEADING, Lines, Panel, ViList

_FRAME = 4
"""Width of a panel's border and padding, in cells."""
_LIMIT_IN_VIEW = 2.5
"""Maximum ratio of limit to peak at which the axis extends to the limit. At a higher ratio, the peak's bar
would be too short to show its parts.
"""
ABOVE_PEAK = 1.25
"""Length of an axis that does not reach the limit, relative to the peak."""
_USED = "╌"
_WORDS = 41
"""Width of the text next to a precision's bar, in cells."""
_SPARE = 19
_ITEM_NAME, _ITEM_FIGURES, _ITEM_BAR, _SHORT_ITEM_BAR = 26, 14, 24, 11
"""Width of an item's name, of its figures, and of its bar, in cells. The bar is shorter if there is room for
an explanation to its right.
"""
_MIN_BAR = 4
_MIN_EXPLANATION = 60
"""Minimum width of an explanation to the right of its item, in cells."""
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
"""Name of the glossary entry for an item, by the item's key."""


@dataclass(frozen=True)
class BarPart:
    """Items that belong together, and are drawn in the same way."""

    name: str
    texture: str
    """Character that fills a cell on a terminal with few colors. Parts that settings change little have light
    characters.
    """
    hue: str
    strength: int
    """Opacity of the color in percent, on a terminal with shades."""
    keys: frozenset[str]

    def drawn(self, *, is_even: bool, block: str = STACKED) -> tuple[str, str]:
        """Return (character, color) of a filled cell. With ``is_even``, the character is ``block`` in a shade
        of the part's color; otherwise, it is the part's texture.
        """
        return (block, f"{self.hue} {self.strength}%") if is_even else (self.texture, self.hue)


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
    BarPart("base weights", "░", "$hardware", 55, frozenset(_BASE)),
    BarPart("adapter", "▚", "$training", 50, frozenset(ADAPTER_ITEMS)),
    BarPart("activations", "█", "$validation", 75, frozenset(_ACTIVATIONS)),
    BarPart("loss", "╳", "$forgetting", 50, frozenset(("logits",))),
    BarPart("overhead", ":", "$foreground", 25, frozenset()),
)
"""The parts of a bar from left to right. The last part contains the items that belong to no other part."""


def has_even_colors(widget: Widget) -> bool:
    """Return whether colors alone distinguish the parts. On a terminal with few colors, the parts need
    textures.
    """
    return not lacks_shades(widget.app)


def part_of(key: str) -> BarPart:
    """Return the part of the bar that contains the item with this key."""
    return next((part for part in PARTS if key in part.keys), PARTS[-1])


def parts_of(estimate: Estimate) -> list[tuple[BarPart, int]]:
    """Return (part, bytes) for each part of a bar, from left to right."""
    sums = dict.fromkeys(PARTS, 0)
    for item in estimate.items:
        sums[part_of(item.key)] += item.bytes
    return list(sums.items())


def is_far_above(limit_bytes: int, peak_bytes: int) -> bool:
    """Return whether the limit is far above the peak. If so, the axis ends just above the peak instead of at
    the limit.
    """
    return limit_bytes > peak_bytes * _LIMIT_IN_VIEW


def stacked_bar(
    estimate: Estimate,
    full_bytes: int,
    most_bytes: int,
    width: int,
    *,
    is_even: bool = False,
    used_bytes: int = 0,
) -> Content:
    """Return a line of ``width`` cells with a bar and its track. The full length of the track stands for
    ``full_bytes``.

    The bar of an estimate larger than ``full_bytes`` is cut at the end of the track, and ends with ``▶`` and
    the size relative to ``full_bytes``, such as ``▶128%``. In other bars, each part that needs memory has at
    least one cell. Parts of equal size are equally long in all bars of one scale, with two exceptions: the
    last part makes up for the rounding of the others, and the longest part is shortened if the bar would
    otherwise be longer than the track.

    Args:
        estimate: The estimate.
        full_bytes: The memory that the track stands for.
        most_bytes: The largest estimate with the same scale. If it exceeds ``full_bytes``, every track leaves
            room for a percentage on its right.
        width: Width of the line, in cells.
        is_even: Whether the bar has blocks instead of textures.
        used_bytes: Memory that a run will use; 0 if unknown. A dashed line marks the part that exceeds the
            estimate.
    """
    sizes = [(part, bytes_) for part, bytes_ in parts_of(estimate) if bytes_]
    share = sum(bytes_ for _, bytes_ in sizes) / full_bytes
    percent_cells = len(format_percent(most_bytes / full_bytes)) if most_bytes > full_bytes else 0
    width -= percent_cells
    cells = [max(1, round(bytes_ / full_bytes * width)) for _, bytes_ in sizes]
    cells[-1] = max(1, round(share * width) - sum(cells[:-1]))
    if share <= 1:
        cells[cells.index(max(cells))] -= max(0, sum(cells) - width)
    pieces = []
    for (part, _), number in zip(sizes, cells, strict=True):
        glyph, style = part.drawn(is_even=is_even)
        pieces.append((glyph * number, style))
    drawn = Content.assemble(*pieces)
    if share > 1:
        end = f"{CLIPPED}{format_percent(share):<{percent_cells}}"
        return Content.assemble(drawn.truncate(width - 1), (end, "$error bold"))
    dashes = max(0, min(width, round(used_bytes / full_bytes * width)) - drawn.cell_length)
    return Content.assemble(
        drawn,
        (_USED * dashes, "$primary"),
        ("·" * (width - drawn.cell_length - dashes), "dim"),
        " " * percent_cells,
    )


def precision_bars(
    compared: Mapping[Precision, Estimate],
    selected: Precision,
    recipe_precision: Precision,
    budget_bytes: int,
    width: int,
    *,
    can_train: bool,
    is_even: bool = False,
    used_bytes: int = 0,
) -> list[Content]:
    """Return a line for each precision: ``› NF4  ░░▚█▒╌╌···   12.3 GiB fits  ◂ recipe``. ``used_bytes``:
    memory that a run of the recipe will use; 0 if unknown.

    If there is room, the memory that is left or missing follows the verdict. If the limit is far above all
    peaks, the axis is broken before the limit.
    """
    has_spare = width >= WIDE_CELLS - _FRAME
    bar_cells = max(10, width - _WORDS - (_SPARE if has_spare else 0))
    most = max(estimate.total_bytes for estimate in compared.values())
    broken = " ╱╱" if is_far_above(budget_bytes, most) else ""
    full_bytes = round(most * ABOVE_PEAK) if broken else budget_bytes
    lines = []
    for precision in PRECISIONS:
        estimate = compared[precision]
        verdict = check_fit(estimate, budget_bytes)
        word, style = verdict_words(verdict, can_train=can_train)
        spare = f"{spare_words(verdict):>{_SPARE}}" if has_spare else ""
        drawn = stacked_bar(
            estimate,
            full_bytes,
            most,
            bar_cells - len(broken),
            is_even=is_even,
            used_bytes=used_bytes if precision == recipe_precision else 0,
        )
        is_selected = precision == selected
        lines.append(
            Content.assemble(
                (
                    f"{'›' if is_selected else ' '} {PRECISION_NAMES[precision]:<5}",
                    "bold" if is_selected else "",
                ),
                drawn,
                (broken, "dim"),
                f" {needed_words(verdict):>10} ",
                (f"{word:<12}", style),
                (spare, "$text-muted"),
                (" ◂ recipe" if precision == recipe_precision else "", "$primary"),
            )
        )
    return lines


def spare_words(verdict: Verdict) -> str:
    """Return the memory that is left or missing: ``17.0 GiB to spare``, or ``2.1 GiB over``."""
    return f"{format_bytes(abs(verdict.spare_bytes))} {'over' if verdict.spare_bytes < 0 else 'to spare'}"


def verdict_sentence(verdict: Verdict) -> str:
    """Return the memory that is left or missing, such as ``17.0 GiB to spare``. For an uncertain verdict,
    return the figure for the upper end of the estimate: ``2.1 GiB over at the upper end``.
    """
    if verdict.word != "uncertain":
        return spare_words(verdict)
    upper = replace(verdict, needed_bytes=verdict.high_bytes)
    return f"{spare_words(upper)} at the upper end"


def legend(limit_bytes: int, most_bytes: int, *, is_even: bool = False, use: str = "") -> Content:
    """Return the legend of the colors or textures. If the limit is so far above the peaks that the axis has a
    break, the legend also gives the limit. ``most_bytes``: the highest peak, in bytes. ``use``: name of the
    dashed part of a bar; empty if no bar has one.
    """
    drawn = ((part.name, *part.drawn(is_even=is_even)) for part in PARTS)
    words = [Content.assemble((glyph * 2, style), (f" {name}", "dim")) for name, glyph, style in drawn]
    if use:
        words.append(Content.assemble((_USED * 2, "$primary"), (f" {use}", "dim")))
    if is_far_above(limit_bytes, most_bytes):
        words.append(Content.styled(f"╱╱ to {format_bytes(limit_bytes)}", "dim"))
    return Content("  ").join(words)


def peak_words(compared: Mapping[Precision, Estimate]) -> str:
    """Return ``Minimum memory for a training step``. If some precisions reach their peak while the model is
    being loaded, return text that names these precisions; if all precisions do, return ``Minimum memory while
    loading``.
    """
    loading = [PRECISION_NAMES[key] for key, one in compared.items() if one.peak_phase == LOADING]
    if not loading:
        return "Minimum memory for a training step"
    if len(loading) == len(compared):
        return "Minimum memory while loading"
    return f"Minimum memory ({' and '.join(loading)}: while loading)"


def budget_words(budget: MemoryBudget, system_status: SystemStatus) -> str:
    """Return the memory that estimates are compared with, such as ``24.0 GiB: RTX 4090, 22.1 free now``."""
    size = format_bytes(budget.bytes)
    gpu, free = system_status.gpu, system_status.free_bytes
    if gpu is not None and budget.name == gpu.short_name:
        return f"{size}: {budget.name}" + ("" if free is None else f", {format_gib(free)} free now")
    change = f"; {key_name('app.assume_gpu')} changes it" if budget.is_assumed else ""
    return f"{size} ({place_words(budget)}{change})"


def levels_line(estimate: Estimate) -> str:
    """Return a line with the memory that PyTorch holds at the peak, and the part of it that is in tensors."""
    reserved, tensors = format_bytes(estimate.reserved_bytes), format_bytes(estimate.allocated_bytes)
    return f"At the peak, PyTorch holds {reserved}, of which {tensors} in tensors"


def peak_time(estimate: Estimate, layers: int) -> str:
    """Return the time of the peak: ``while loading``, or a part of the step, such as ``in the backward pass
    of the last layer``.

    Layers other than the first and the last are numbered from 0, as on the LoRA screen.
    """
    if estimate.peak_phase == LOADING:
        return "while loading"
    part = re.sub("^loss (forward|backward)$", r"\1 of the loss", estimate.peak_phase)
    part = re.sub("^(forward|backward) of", r"\1 pass of", part)
    head, _, number = part.rpartition(" layer ")
    ends = {"0": "first", str(layers - 1): "last"}
    return f"in the {head} the {ends[number]} layer" if head and number in ends else f"in the {part}"


def peak_lines(
    compared: Mapping[Precision, Estimate],
    marked: Precision,
    of_recipe: Precision,
    limit_bytes: int,
    width: int,
    *,
    can_train: bool,
    is_even: bool,
    used_bytes: int,
) -> list[Content]:
    """Return the lines of the panel for the peak: the bars, their legend and, unless the window is narrow,
    the text of :func:`levels_line` for the selected precision. If int8 needs more memory than 16 bits, the
    last line says why.

    Args:
        compared: The estimate for each precision.
        marked: The precision that is selected.
        of_recipe: The recipe's precision.
        limit_bytes: The memory that the estimates are compared with.
        width: Width of a line, in cells.
        can_train: Whether the model can be trained.
        is_even: Whether bars have blocks instead of textures.
        used_bytes: Memory that a run of the recipe will use, in bytes; 0 if unknown.
    """
    most = max(estimate.total_bytes for estimate in compared.values())
    is_short = width < WIDE_CELLS - _FRAME
    use = "speed" if is_short else "used for speed if it is free"
    levels = "" if is_short else levels_line(compared[marked])
    reason = why_int8_is_larger(compared["int8"], compared["fp16"])
    return [
        *precision_bars(
            compared,
            marked,
            of_recipe,
            limit_bytes,
            width,
            can_train=can_train,
            is_even=is_even,
            used_bytes=used_bytes,
        ),
        legend(
            # In a narrow window, the title gives the limit, and there is no room to repeat it.
            most if is_short else limit_bytes,
            most,
            is_even=is_even,
            use=use if used_bytes > compared[of_recipe].total_bytes else "",
        ),
        *(Content.styled(text, "$text-muted") for text in (levels, reason) if text),
    ]


class ItemsPanel(Panel):
    """The items of the estimate for one precision, with an explanation of the item under the cursor."""

    def __init__(self) -> None:
        self._list = ViList(id="items")
        self._explanation = Lines(id="explanation")
        self._estimate: Estimate | None = None
        super().__init__("Items", self._list, self._explanation, id="items-panel")

    def show(self, name: str, estimate: Estimate) -> None:
        """Show the items of an estimate. ``name``: name of the precision."""
        self._estimate = estimate
        about = "" if estimate.traced else INSTANT
        self.show_title(f"{name} by item: needs at least {about}{format_bytes(estimate.total_bytes)}")
        is_nested = self.screen.has_class("-very-wide")
        self._list.show(partial(item_lines, estimate, has_even_colors(self), is_nested))
        self._explain()

    def on_option_list_option_highlighted(self) -> None:
        """Explain the item under the cursor."""
        self._explain()

    def _explain(self) -> None:
        key, items = self._list.current, self._estimate.items if self._estimate else ()
        item = next((item for item in items if item.key == key), None)
        if item is not None:
            self._explanation.show(partial(self._explanation_lines, item))

    def _explanation_lines(self, item: Item, _width: int) -> list[Content]:
        """Return the item's explanation, unless the list shows all of it. In a tall window that is not
        narrow, the item's glossary entry follows.
        """
        lines = []
        if len(item.explanation) > _explanation_cells(self._list.scrollable_content_region.width):
            lines.append(Content.assemble((f"{item.label}: ", "bold"), item.explanation))
        term = _TERMS.get(item.key)
        has_room = self.screen.has_class("-tall") and not self.screen.has_class("-narrow")
        if has_room and term is not None and not (term == "NF4" and "× 1 byte" in item.explanation):
            entry = (explain(term), "$text-muted")
            lines.append(Content.assemble((f"{term}: ", "bold $text-muted"), entry))
        return lines


def item_lines(estimate: Estimate, is_even: bool, is_nested: bool, width: int) -> list[tuple[str, Content]]:
    """Return (key, line) for each group and for each item, the largest first. Bars are relative to the peak.

    Args:
        estimate: The estimate.
        is_even: Whether bars have blocks instead of textures.
        is_nested: Whether the items of each group come right after the group. If not, all groups come first,
            so that a short list shows the groups and the largest items without scrolling.
        width: Width of a line, in cells.
    """
    heads: list[tuple[str, Content]] = []
    lines: list[tuple[str, Content]] = []
    sizes: dict[str, int] = {}
    groups = [(part, size) for part, size in parts_of(estimate) if size]
    for part, size in sorted(groups, key=lambda group: -group[1]):
        glyph, _ = drawn = part.drawn(is_even=is_even)
        head = f"{glyph} {capitalize(part.name)}"
        line = _item_line(head, drawn, size, estimate, width, is_even=is_even)
        (lines if is_nested else heads).append((f"{HEADING}{part.name}", line))
        items = [item for item in estimate.items if part_of(item.key) is part]
        for item in sorted(items, key=lambda item: -item.bytes):
            name = f"    {item.label}" if is_nested else f"{glyph} {item.label}"
            line = _item_line(name, drawn, item.bytes, estimate, width, item, is_even=is_even)
            lines.append((item.key, line))
            sizes[item.key] = item.bytes
    if is_nested:
        return lines
    heading = Content.styled("Largest items", "$foreground bold")
    return [*heads, (f"{HEADING}items", heading), *sorted(lines, key=lambda line: -sizes[line[0]])]


def _explanation_cells(width: int) -> int:
    """Return the width of the explanations to the right of the items, in a list of this width; 0 if there is
    too little room for them.
    """
    left = width - _ITEM_NAME - _ITEM_FIGURES
    return left - _SHORT_ITEM_BAR - 2 if left >= _ITEM_BAR + _MIN_EXPLANATION else 0


def _item_line(
    name: str,
    drawn: tuple[str, str],
    size: int,
    estimate: Estimate,
    width: int,
    item: Item | None = None,
    *,
    is_even: bool,
) -> Content:
    """Return a line with an item's name, size, share of the peak and bar: ``Quantized weights 3 GiB 47%
    ▄▄▄▄``. If there is room, the item's explanation follows. ``item``: None for the line of a group.
    """
    style = "$foreground bold" if item is None else ""
    share = size / estimate.total_bytes
    percent = "<1%" if share < 0.005 else format_percent(share)
    figures = f" {format_bytes(size):>8} {percent:>4}"
    # One cell is free between the figures and the scrollbar.
    cells = max(0, min(_ITEM_NAME, width - _ITEM_FIGURES - 1))
    text = Content(name).truncate(cells, ellipsis=True).plain.ljust(cells) + figures
    explanation_cells = _explanation_cells(width)
    cells = min(width - len(text), _SHORT_ITEM_BAR if explanation_cells else _ITEM_BAR) - 1
    texture, color = drawn
    text_of_bar = ""
    if cells >= _MIN_BAR:
        filled = bar(share, cells, has_track=False) if is_even else texture * round(share * cells)
        text_of_bar = f" {filled:<{cells}}"
    beside = ""
    if item is not None and explanation_cells:
        beside = "  " + Content(item.explanation).truncate(explanation_cells, ellipsis=True).plain
    return Content.assemble(
        (text[:1], color),
        (text[1:], style),
        (text_of_bar, color),
        (beside, "$text-muted"),
    )
