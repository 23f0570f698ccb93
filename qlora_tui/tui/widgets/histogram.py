"""How long the samples are, drawn in lines, with the sequence length marked."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.data.statistics import Lengths

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def histogram(lengths: Lengths, cut_at: int, width: int, height: int) -> Content:
    """At most ``height`` lines, one a bin; bins beyond the sequence length are marked with ✂."""
    bins = merged([(b.up_to, b.count) for b in lengths.histogram], height)
    if not bins:
        return Content.styled("no samples yet", "dim")
    most = max(count for _, count in bins) or 1
    figures = max(len(f"{up_to:,}") for up_to, _ in bins)
    room = max(4, width - figures - 12)
    lines = []
    counted_in_tokens = lengths.unit == "tokens"
    for up_to, count in bins:
        eighths = round(count / most * room * 8)
        drawn = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        beyond = counted_in_tokens and up_to > cut_at
        lines.append(
            Content.assemble(
                f"{up_to:>{figures},} ",
                ("✂" if beyond else "│", "$warning" if beyond else "dim"),
                (drawn, "$warning" if beyond else "$primary"),
                (f" {count:,}", "dim"),
            )
        )
    return Content("\n").join(lines)


def merged(bins: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Neighbours put together until there are at most ``most``: (upper end, count)."""
    size = -(-len(bins) // max(1, most))
    groups = [bins[start : start + size] for start in range(0, len(bins), size)] if bins else []
    return [(group[-1][0], sum(count for _, count in group)) for group in groups]
