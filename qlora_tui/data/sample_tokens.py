"""Token ids, loss mask and loss weights of one rendered sample."""

from __future__ import annotations

import re
from array import array

from msgspec import Struct

from qlora_tui.data.assistant_spans import PRIVATE, SampleText
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.word_cache import Marked

_LITERAL, _END_LITERAL = "\U000f0000", "\U000f0001"
_LITERALS = re.compile(f"{_LITERAL}(.*?){_END_LITERAL}|[{_LITERAL}{_END_LITERAL}]", re.DOTALL)


class TokenizedSample(Struct, frozen=True):
    """One training sample."""

    token_ids: list[int]
    loss_mask: bytes
    """One byte per token: 1 if the token is in the loss, else 0."""
    notes: tuple[str, ...] = ()
    """Changes made for the template: ``system-in-user``, ``tools-as-text``, ``calls-as-text``,
    ``tool-as-user``, ``control-tokens`` (some were neutralized), ``answer-changed`` (by the template);
    ``weights``; and the handling of reasoning, see ``_notes_on_thinking`` in ``render``."""
    weights: array[float] | None = None
    """Loss weight of each token, 32-bit; None where each token in the loss has weight 1."""

    @property
    def trained_count(self) -> int:
        """Return the number of tokens in the loss."""
        return self.loss_mask.count(1)


def mark_control_tokens(text: str, pattern: re.Pattern[str]) -> tuple[str, bool]:
    """Put what matches ``pattern`` between marks; return the text and whether anything matched.

    What is between marks is encoded as ordinary text.
    """
    if not text.isascii():
        text = PRIVATE.sub("", text)
    marked, count = pattern.subn(f"{_LITERAL}\\g<0>{_END_LITERAL}", text)
    return marked, count > 0


def span_edges(sample: SampleText) -> list[int]:
    """Return where spans begin and end, except at both ends of the text."""
    return sorted({place for span in sample.spans for place in span if 0 < place < len(sample.text)})


def tokenize_sample(
    sample: SampleText, marked: Marked, tokenizer: ChatTokenizer, notes: tuple[str, ...]
) -> TokenizedSample:
    """Return the tokens of a sample whose text is encoded already, with the ``span_edges`` marked in it."""
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
    """Tokenize the spans inside and outside the loss separately, marked tokens as plain text.

    Also used for a sample whose answer begins inside a token of the whole text: at inference, the prompt
    is tokenized separately.
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
    """Split text at marks; return each piece and whether it is literal text."""
    result: list[tuple[str, bool]] = []
    at = 0
    for match in _LITERALS.finditer(text):
        result += [(text[at : match.start()], False), (match[1] or "", True)]
        at = match.end()
    return [(part, literal) for part, literal in (*result, (text[at:], False)) if part]
