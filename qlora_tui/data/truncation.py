"""What happens to a sample longer than ``data.max_length``: dropped, cut or split, as the recipe says."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Literal

from qlora_tui.data.sample_tokens import TokenizedSample

Overflow = Literal["drop", "cut-left", "cut-right", "split"]


def truncate(
    sample: TokenizedSample, max_length: int, overflow: Overflow, bos_id: int | None = None
) -> list[TokenizedSample]:
    """Return samples of at most ``max_length`` tokens each, without any that has no token in the loss.

    The first token of a sample is predicted from nothing, so it does not count. Cutting on the left keeps a
    begin token at the start. Empty if nothing is left to learn.
    """
    length = len(sample.token_ids)
    if length <= max_length:
        parts = [sample]
    elif overflow == "drop":
        return []
    elif overflow == "split":
        parts = [_part(sample, start, end) for start, end in _pieces(sample.loss_mask, max_length)]
    elif overflow == "cut-right":
        parts = [_part(sample, 0, max_length)]
    elif bos_id is not None and sample.token_ids[0] == bos_id:
        parts = [_after_bos(_part(sample, length + 1 - max_length, length), bos_id)]
    else:
        parts = [_part(sample, length - max_length, length)]
    return [part for part in parts if 1 in part.loss_mask[1:]]


def _pieces(loss_mask: bytes, max_length: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the pieces of a split sample, in tokens.

    Each ends after the last answer that fits, so that the next begins with a turn. An answer that does not
    fit is cut at the limit. Of a question that fills a whole piece only the end is kept, before its answer.
    """
    start = 0
    while len(loss_mask) - start > max_length:
        end = start + max_length
        answer = loss_mask.find(b"\x01", start)
        if answer < 0:
            return
        if answer >= end:
            over = loss_mask.find(b"\x00", answer) if 0 in loss_mask[answer:] else len(loss_mask)
            start = max(start, min(over - max_length, answer - max_length // 2))
            continue
        # The end of the last answer within the limit: a token in the loss before one that is not.
        turn_end = loss_mask.rfind(b"\x01\x00", start, end + 1) + 1
        yield start, turn_end or end
        start = turn_end or end
    yield start, len(loss_mask)


def _part(sample: TokenizedSample, start: int, end: int) -> TokenizedSample:
    weights = None if sample.weights is None else sample.weights[start:end]
    return TokenizedSample(sample.token_ids[start:end], sample.loss_mask[start:end], sample.notes, weights)


def _after_bos(part: TokenizedSample, bos_id: int) -> TokenizedSample:
    weights = None if part.weights is None else array("f", [0.0]) + part.weights
    return TokenizedSample([bos_id, *part.token_ids], b"\x00" + part.loss_mask, part.notes, weights)
