"""What happens to a sample longer than a row: dropped, cut, or split, as the recipe says."""

from __future__ import annotations

from typing import Literal

from qlora_tui.data.render import Rendered

TooLong = Literal["drop", "cut-left", "cut-right", "split"]


def fit(sample: Rendered, max_length: int, too_long: TooLong, bos_id: int | None = None) -> list[Rendered]:
    """``sample`` as rows of at most ``max_length`` tokens; those in which nothing trains are left out.

    Cutting at the left keeps a begin token at the start. Empty if nothing is left to learn.
    """
    ids, trained = sample.token_ids, sample.trained
    if len(ids) <= max_length:
        return [sample] if 1 in trained else []
    if too_long == "drop":
        return []
    if too_long == "split":
        starts = range(0, len(ids), max_length)
        parts = [(ids[s : s + max_length], trained[s : s + max_length]) for s in starts]
    elif too_long == "cut-right":
        parts = [(ids[:max_length], trained[:max_length])]
    elif bos_id is not None and ids[0] == bos_id:
        parts = [([bos_id, *ids[1 - max_length :]], b"\x00" + trained[1 - max_length :])]
    else:
        parts = [(ids[-max_length:], trained[-max_length:])]
    return [Rendered(part, flags, sample.notes) for part, flags in parts if 1 in flags]
