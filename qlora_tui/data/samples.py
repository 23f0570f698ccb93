"""Samples of one conversation: token ids, loss mask and loss weights, within the length limit.

A sample longer than ``data.max_length`` is dropped, cut or split, depending on the recipe. Preference methods
for pairs store two samples for each rejected answer of a row, the chosen side first; ``kto`` stores one
sample for each answer, good or bad.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.assistant_spans import PRIVATE, SampleText
from qlora_tui.data.conversation import Conversation
from qlora_tui.data.store import BAD, GOOD
from qlora_tui.data.tokenizer import ChatTokenizer, Marked
from qlora_tui.recipe.preference_methods import PAIR_METHODS, PreferenceMethod

_LITERAL, _END_LITERAL = "\U000f0000", "\U000f0001"
_LITERALS = re.compile(f"{_LITERAL}(.*?){_END_LITERAL}|[{_LITERAL}{_END_LITERAL}]", re.DOTALL)


class TokenizedSample(Struct, frozen=True):
    """One training sample."""

    token_ids: list[int]
    loss_mask: bytes
    """One byte per token: 1 if the token is in the loss, else 0."""
    notes: tuple[str, ...] = ()
    """Changes made for the template, and the handling of reasoning (``_notes_on_thinking`` in ``render``).

    The changes are ``system-in-user``, ``tools-as-text``, ``calls-as-text``, ``tool-as-user``,
    ``control-tokens`` (some were neutralized), ``answer-changed`` (by the template), and ``weights``.
    """
    weights: array[float] | None = None
    """Loss weight of each token, 32-bit; None if each token in the loss has weight 1."""
    side: int = 0
    """``GOOD`` or ``BAD`` (see ``store``) if a preference method trains on both sides, else 0."""

    @property
    def trained_count(self) -> int:
        """Number of tokens in the loss."""
        return self.loss_mask.count(1)


def mark_control_tokens(text: str, pattern: re.Pattern[str]) -> tuple[str, bool]:
    """Put matches of ``pattern`` between marks; return the text and whether anything matched.

    Text between marks is encoded as ordinary text.
    """
    if not text.isascii():
        text = PRIVATE.sub("", text)
    marked, count = pattern.subn(f"{_LITERAL}\\g<0>{_END_LITERAL}", text)
    return marked, count > 0


def span_edges(sample: SampleText) -> list[int]:
    """Return the positions at which spans begin or end, without the start and the end of the text."""
    return sorted({place for span in sample.spans for place in span if 0 < place < len(sample.text)})


def tokenize_sample(
    sample: SampleText, marked: Marked, tokenizer: ChatTokenizer, notes: tuple[str, ...]
) -> TokenizedSample:
    """Build the sample of a text that has been encoded.

    ``marked`` is the result of ``ChatTokenizer.encode_marked`` for the text and its ``span_edges``.
    """
    if _LITERAL in sample.text or _END_LITERAL in sample.text:
        return tokenize_by_span(sample, tokenizer, notes)
    ids = marked.ids
    cuts = dict(zip(span_edges(sample), marked.cuts, strict=True))
    cuts[0], cuts[len(sample.text)] = (0, False), (len(ids), False)
    loss_mask = bytearray(len(ids))
    weights = array("f", bytes(4 * len(ids))) if sample.weights else None
    for number, (start, end) in enumerate(sample.spans):
        first, straddles = cuts[start]
        if straddles:
            return tokenize_by_span(sample, tokenizer, notes)
        last = cuts[end][0]
        loss_mask[first:last] = b"\x01" * (last - first)
        if weights is not None:
            weights[first:last] = array("f", [sample.weights[number]]) * (last - first)
    return TokenizedSample(ids, bytes(loss_mask), notes, weights)


def tokenize_by_span(sample: SampleText, tokenizer: ChatTokenizer, notes: tuple[str, ...]) -> TokenizedSample:
    """Tokenize the spans inside and outside the loss separately, and marked tokens as plain text.

    Used if the text contains marks, or if an answer begins inside a token of the whole text: at inference,
    the prompt is tokenized separately.
    """
    ids: list[int] = []
    loss_mask = bytearray()
    weights = array("f")
    at = 0
    spans = (*sample.spans, (len(sample.text), len(sample.text)))
    span_weights = (*(sample.weights or [1.0] * len(sample.spans)), 0.0)
    for (start, end), weight in zip(spans, span_weights, strict=True):
        for flag, (first, last) in ((0, (at, start)), (1, (start, end))):
            for text, literal in _stretches(sample.text[first:last]):
                new = tokenizer.encode_inside(text, literal) if ids or literal else tokenizer.encode(text)
                ids += new
                loss_mask += bytes([flag]) * len(new)
                weights.extend([flag * weight] * len(new))
        at = end
    return TokenizedSample(ids, bytes(loss_mask), notes, weights if sample.weights else None)


def _stretches(text: str) -> list[tuple[str, bool]]:
    """Split text at marks; return each part and whether it is literal text."""
    result: list[tuple[str, bool]] = []
    at = 0
    for match in _LITERALS.finditer(text):
        result += [(text[at : match.start()], False), (match[1] or "", True)]
        at = match.end()
    return [(part, literal) for part, literal in (*result, (text[at:], False)) if part]


Overflow = Literal["drop", "cut-left", "cut-right", "split"]


def truncate(
    sample: TokenizedSample, max_length: int, overflow: Overflow, bos_id: int | None = None
) -> list[TokenizedSample]:
    """Return samples of at most ``max_length`` tokens, leaving out those with no token in the loss.

    No token precedes the first token of a sample, so it is never predicted, and does not count as being in
    the loss. Cutting on the left keeps the BOS token at the start.
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
        part = _part(sample, length + 1 - max_length, length)
        weights = None if part.weights is None else array("f", [0.0]) + part.weights
        begun = [bos_id, *part.token_ids], b"\x00" + part.loss_mask
        parts = [TokenizedSample(*begun, part.notes, weights)]
    else:
        parts = [_part(sample, length - max_length, length)]
    return [part for part in parts if 1 in part.loss_mask[1:]]


def _pieces(loss_mask: bytes, max_length: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the pieces of a split sample, in tokens.

    Each piece ends after the last answer that fits, so that the next piece begins with a turn. An answer that
    does not fit is cut at the limit. If a question fills a whole piece, only the part just before the answer
    is kept.
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
        # The end of the last answer within the limit, which is a token in the loss before one that is not.
        turn_end = loss_mask.rfind(b"\x01\x00", start, end + 1) + 1
        yield start, turn_end or end
        start = turn_end or end
    yield start, len(loss_mask)


def _part(sample: TokenizedSample, start: int, end: int) -> TokenizedSample:
    weights = None if sample.weights is None else sample.weights[start:end]
    return TokenizedSample(sample.token_ids[start:end], sample.loss_mask[start:end], sample.notes, weights)


def last_samples(
    conversation: Conversation, rendered: Sequence[Sequence[TokenizedSample]]
) -> list[TokenizedSample]:
    """Return the sample that holds the answer, for the conversation and each of its rejected alternatives.

    If the texts have no turns, their common beginning is taken as the prompt, and is not in the loss.
    """
    samples = [each[-1] for each in rendered]
    if not conversation.text or len(samples) < 2:
        return samples
    shared = _shared(samples)
    return [replace(s, loss_mask=bytes(shared) + s.loss_mask[shared:]) for s in samples]


def side_names(conversation: Conversation) -> tuple[str, ...]:
    """Return display names for the samples of :func:`last_samples`; empty without a preference method."""
    if conversation.rated_good is not None:
        return ("good" if conversation.rated_good else "bad",)
    return ("chosen", *["rejected"] * len(conversation.rejected)) if conversation.rejected else ()


def sides_of(
    conversation: Conversation, fitted: Sequence[TokenizedSample | None], method: PreferenceMethod
) -> list[TokenizedSample]:
    """Return the samples to store, each with its side. A pair that lacks one of its sides is left out.

    Args:
        fitted: the samples within the length limit, in the order of :func:`last_samples`; None for a sample
            with no tokens left to learn.
    """
    first, *others = fitted
    good = BAD if conversation.rated_good is False else GOOD
    chosen = first and replace(first, side=good)
    rejected = [other and replace(other, side=BAD) for other in others]
    if method in PAIR_METHODS:
        return [one for other in rejected if chosen and other for one in (chosen, other)]
    return [sample for sample in (chosen, *rejected) if sample]


def _shared(samples: Sequence[TokenizedSample]) -> int:
    """Count the tokens at the beginning that all samples share."""
    columns = zip(*(sample.token_ids for sample in samples), strict=False)
    count = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        count += 1
    return count
