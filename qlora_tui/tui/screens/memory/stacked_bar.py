"""Memory bars in parts, one for each precision. Each part has its texture, so that color is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.content import Content

from qlora_tui.formatting import format_gib
from qlora_tui.memory import Estimate, Verdict, check_fit
from qlora_tui.memory.estimate import ADAPTER_ITEMS, PRECISIONS, Precision
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.render.labels import PRECISION_NAMES, verdict_words

_FRAME = 4
"""Cells of a panel's border and padding."""
_WORDS = 41
"""Cells of a line around its bar."""
_SPARE = 19


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
