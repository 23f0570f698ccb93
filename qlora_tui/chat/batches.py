"""Completions of one adapter, computed together: one pass of the model computes the next token of each.

A decoding step reads all weights, no matter how many rows it computes. A prompt is processed alone. Then its
row joins the rows that are being generated. All rows of a pass end at the same place of the buffers, and
padding precedes the shorter rows. A sliding window therefore reaches back equally far in each row. The
model's own masks are valid for every kind of layer, because each pass tells the model which places are
padding, and which position each row's token has. Recurrent states have no places, so they are only stacked. A
row that has ended leaves the batch; its keys and values are kept for the next turn.

Before rows are computed together for the first time, a trial compares rows that join and leave a batch with
the same rows computed alone (:meth:`Batches.allows`). If the logits differ, requests take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from qlora_tui.chat.decoding import (
    MAX_SHARE_OF_FREE_MEMORY,
    STRIDE_TOKENS,
    BufferSize,
    GrowingLayer,
    PrefixCache,
    bytes_per_token,
    reusable_prefix,
)
from qlora_tui.chat.generation import PREFILL_CHUNK_TOKENS
from qlora_tui.chat.logits import TOKENS, LogitsComparison
from qlora_tui.errors import first_line
from qlora_tui.gpu.cuda_errors import is_out_of_memory

if TYPE_CHECKING:
    from qlora_tui.chat.session import ChatSession

_STACKABLE = (
    GrowingLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Classes of layers whose rows can be stacked.

They hold nothing but states of constant size, and keys and values whose second-to-last dimension is tokens.
"""
_ROWS_WORTH_LAUNCHING = 4
"""Minimum number of rows in a common pass on a GPU, if a step of one row can be recorded but a step of
several cannot.

Fewer rows take turns with recorded steps, because a recorded step takes a fraction of the time of a launched
one.
"""
_SMALLEST_CHECKED = 12
"""Minimum number of tokens in a text that is used to compare passes of several rows with passes of one row.
"""
_CHECKED_STEPS = 3
"""Number of tokens that each row decodes in :meth:`Batches._difference`."""
_MOST_KEPT = 8
"""Maximum number of ended conversations whose keys and values are kept."""


@dataclass(frozen=True)
class Rows:
    """Selected rows of a cache, without the padding at their beginning."""

    layers: Sequence[Any]
    rows: Sequence[int]
    start: int = 0
    """Number of padding tokens at the beginning, which are left out."""


def stack(parts: Sequence[Rows], size: BufferSize) -> list[Any]:
    """Return the layers of one cache with the rows of all parts, aligned at their ends."""
    return [
        _stack_layers([(part.layers[index], part.rows, part.start) for part in parts], size)
        for index in range(len(parts[0].layers))
    ]


def _stack_layers(parts: Sequence[tuple[Any, Sequence[int], int]], size: BufferSize) -> Any:
    first = parts[0][0]
    stacked = copy.copy(first)
    if isinstance(first, LinearAttentionCacheLayerMixin):
        for name in ("conv_states", "recurrent_states"):
            states = {
                number: None
                if state is None
                else torch.cat([getattr(layer, name)[number][list(rows)] for layer, rows, _ in parts])
                for number, state in getattr(first, name).items()
            }
            setattr(stacked, name, states)
    if isinstance(first, DynamicLayer) and first.is_initialized:
        if isinstance(first, DynamicSlidingWindowLayer):
            stacked.cumulative_length = max(layer.cumulative_length - start for layer, _, start in parts)
        columns = [_columns(layer, start) for layer, _, start in parts]
        buffers = tuple(
            _right_aligned(
                [
                    getattr(layer, name)[list(rows), :, -count:]
                    for (layer, rows, _), count in zip(parts, columns, strict=True)
                ],
                size.tokens if isinstance(first, GrowingLayer) else max(columns),
            )
            for name in ("keys", "values")
        )
        stacked.keys, stacked.values = (buffer[:, :, : max(columns)] for buffer in buffers)
        if isinstance(first, GrowingLayer):
            stacked.buffers, stacked.size = buffers, size
    return stacked


def _columns(layer: Any, start: int) -> int:
    """Return the number of tokens that a layer holds, not counting its first ``start`` tokens."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(layer.cumulative_length - start, layer.sliding_window - 1)
    return int(layer.keys.shape[-2]) - start


def _right_aligned(tensors: Sequence[Tensor], tokens: int) -> Tensor:
    """Return one tensor (rows, heads, tokens, width) of all rows, aligned at their ends.

    Zeros precede the shorter rows, and follow all rows if the longest one has fewer than ``tokens`` tokens.
    """
    _, heads, _, width = tensors[0].shape
    longest = max(tensor.shape[-2] for tensor in tensors)
    result = tensors[0].new_zeros((sum(map(len, tensors)), heads, max(tokens, longest), width))
    row = 0
    for tensor in tensors:
        result[row : row + len(tensor), :, longest - tensor.shape[-2] : longest] = tensor
        row += len(tensor)
    return result


class Row:
    """A completion that is computed together with the other completions of its adapter."""

    def __init__(self, batch: Batch, prefix_cache: PrefixCache) -> None:
        self._batch = batch
        self.prefix_cache = prefix_cache
        """Processed tokens of the row, and their keys and values unless these are in the common cache."""
        self.pending: int | None = None
        """Token that was fed and is not processed yet."""
        self.logits: Tensor | None = None
        """Logits (1, vocabulary) after the token that was fed last."""
        self.lost: list[int] = []
        """Processed tokens whose keys and values were lost in a failed pass."""
        self.most_rows = 1
        """Largest number of rows that were computed in one pass with this one, including itself."""

    def feed(self, token: Tensor) -> int:
        """Add the next token (1, 1), and return its id."""
        batch, self.logits = self._batch, None
        if len(batch.rows) < batch.fewest_rows and self not in batch.together:
            ahead = batch.session.next_logits_ahead(batch.adapter_name, token, self.prefix_cache)
            if ahead is not None:
                token_id, self.logits = ahead
                return token_id
        self.pending = int(token)
        return self.pending

    def next_logits(self) -> Tensor:
        """Return the logits (1, vocabulary) after the token that was fed last."""
        self._batch.session.batches.tokens_read = 0
        if self.logits is None:
            self._batch.step()
        if self.logits is None:
            self.logits = self._alone()
        return self.logits

    def _alone(self) -> Tensor:
        assert self.pending is not None
        session, name = self._batch.session, self._batch.adapter_name
        lost, self.lost = self.lost, []
        for start in range(0, len(lost), session.prefill_tokens):
            session.next_logits(name, lost[start : start + session.prefill_tokens], self.prefix_cache)
        logits = session.next_logits(name, [self.pending], self.prefix_cache)
        self.pending = None
        return logits

    def join(self) -> None:
        """Mark the prompt as processed: from now on the row can be computed together with others."""
        self._batch.rows.append(self)

    def leave(self) -> None:
        """End the row, and keep its keys and values for a later prompt that begins with the same tokens."""
        self._batch.remove(self)


def _tokens(row: Row) -> int:
    return len(row.prefix_cache.token_ids)


def _padding(rows: Sequence[Row]) -> int:
    """Return the number of places in the common buffers that are padding, given rows sorted by length."""
    return sum(_tokens(rows[-1]) - _tokens(row) for row in rows)


class Batch:
    """The completions of one adapter that are in progress."""

    def __init__(self, batches: Batches, adapter_name: str, *, is_trial: bool = False) -> None:
        self._batches = batches
        self.session = batches.session
        self.adapter_name = adapter_name
        self._is_trial = is_trial
        """Whether this batch only serves the comparison that decides if rows may be computed together."""
        self.rows: list[Row] = []
        """Rows whose prompts are processed."""
        self.open_rows = 0
        """Number of rows that have not ended."""
        self.together: list[Row] = []
        """Rows whose keys and values are in the common cache, in its order. Some may have ended."""
        self._cache: Any = None
        self._length = 0
        """Number of places in the common cache, including padding."""
        self._size = BufferSize()
        self._most_rows = 1 << 30
        """Maximum number of rows in one pass; lowered when a pass runs out of memory."""

    @property
    def fewest_rows(self) -> int:
        """Return the minimum number of rows for which a common pass is faster than separate passes."""
        steps = self.session.steps
        return _ROWS_WORTH_LAUNCHING if steps is not None and steps.in_use else 2

    def remove(self, row: Row) -> None:
        """Remove a row that has ended, even if it never joined, and keep its keys and values."""
        if row in self.rows:
            self.rows.remove(row)
        row.pending = row.logits = None
        self.open_rows -= 1
        if row not in self.together:
            self._batches.keep(self.adapter_name, row.prefix_cache)
        elif not any(each in self.rows for each in self.together):
            with self._broken_up_on_failure([]):
                self._arrange([])

    def step(self) -> None:
        """In one pass, process the pending tokens of the rows that can be computed together."""
        due = [row for row in self.rows if row.pending is not None]
        wanted: list[Row] = []
        if len(due) >= self.fewest_rows and not self._batches.why_not:
            wanted = self._compatible(due)
        if len(wanted) < self.fewest_rows or not (
            self._is_trial or self._batches.allows(self.adapter_name, wanted[-1].prefix_cache.token_ids)
        ):
            wanted = []
        with self._broken_up_on_failure(wanted):
            if set(wanted) != set(self.together):
                self._arrange(wanted)
            if self.together:
                self._compute()

    def _compatible(self, due: list[Row]) -> list[Row]:
        """Return the rows that can be computed in one pass.

        If ``due`` are the rows of the previous pass, they are returned unchanged. Otherwise, the rows are
        sorted by length, and some are left out: rows whose keys and values were lost, rows whose cache has
        different kinds of layers, rows for which reading the padding would take longer than reading the
        weights again, and rows for which memory is too small.
        """
        if set(due) == set(self.together):
            return due
        whole = [row for row in due if not row.lost]
        kinds = {row: self._cache if row in self.together else row.prefix_cache.cache for row in whole}
        first = [type(layer) for layer in kinds[whole[0]].layers] if whole else []
        same = [row for row in whole if [type(layer) for layer in kinds[row].layers] == first]
        if not all(issubclass(kind, _STACKABLE) for kind in first):
            self._batches.turn_off("it keeps more than keys, values and states")
            return []
        rows = sorted(same, key=_tokens)[: self._most_rows]
        each = bytes_per_token(kinds[rows[0]]) if rows else 0
        while len(rows) > 1 and _padding(rows) * each > self.session.memory_bytes:
            rows = min(rows[1:], rows[:-1], key=_padding)
        room = self.session.free_bytes() * MAX_SHARE_OF_FREE_MEMORY
        while len(rows) > 1 and len(rows) * (_tokens(rows[-1]) + STRIDE_TOKENS) * each > room:
            rows.pop()
        return rows

    def _arrange(self, wanted: list[Row]) -> None:
        """Rearrange the common cache, so that its rows are exactly ``wanted``."""
        former, cache, length = self.together, self._cache, self._length
        places = {row: place for place, row in enumerate(former)}
        staying = [row for row in former if row in wanted]
        coming = [row for row in wanted if row not in places]
        parts, caches = [], [row.prefix_cache.release() for row in coming]
        for row in former:
            if row not in wanted:
                size = BufferSize(_tokens(row) + STRIDE_TOKENS)
                own = Rows(cache.layers, [places[row]], length - _tokens(row))
                row.prefix_cache.restore(_with_layers(cache, stack([own], size)), size)
                if row not in self.rows and not self._is_trial:
                    self._batches.keep(self.adapter_name, row.prefix_cache)
        self.together = staying + coming
        self._length = max(map(_tokens, self.together), default=0)
        self._size = BufferSize(self._length + STRIDE_TOKENS)
        if staying:
            start = length - max(map(_tokens, staying))
            parts.append(Rows(cache.layers, [places[row] for row in staying], start))
        parts += [Rows(each.layers, [0]) for each in caches]
        self._cache = _with_layers(cache or caches[0], stack(parts, self._size)) if parts else None

    def _compute(self) -> None:
        rows = self.together
        if self._length >= self._size.tokens:
            self._size.tokens = max(self._length + STRIDE_TOKENS, self._length * 3 // 2)
        pending = [row.pending for row in rows if row.pending is not None]
        logits = self.session.batch_logits(
            self.adapter_name, pending, [_tokens(row) for row in rows], self._length, self._cache
        )
        self._length += 1
        for place, (row, token_id) in enumerate(zip(rows, pending, strict=True)):
            row.prefix_cache.token_ids.append(token_id)
            row.pending, row.logits = None, logits[place : place + 1]
            row.most_rows = max(row.most_rows, len(rows))

    @contextmanager
    def _broken_up_on_failure(self, wanted: list[Row]) -> Iterator[None]:
        """Separate the rows if a pass, or the rearrangement before it, fails inside the block.

        After a failure, some layers have processed the pass's tokens and others have not, or the keys and
        values of some rows have already been moved. Therefore all rows are processed again, each by itself.
        In a trial, the exception is raised again instead.
        """
        involved = [*self.together, *(row for row in wanted if row not in self.together)]
        try:
            yield
        # models raise any exception; computed alone, each request raises only its own error
        except Exception as error:
            if self._is_trial:
                raise
            if is_out_of_memory(error):
                self._most_rows = max(len(involved) // 2, 1)
                self._batches.release_kept()
            else:
                self._batches.turn_off(f"a pass of {len(involved)} rows failed: {first_line(error)}")
            for row in involved:
                row.lost = row.prefix_cache.token_ids
                row.prefix_cache = self.session.new_cache()
            self.together, self._cache = [], None


def _with_layers(cache: Any, layers: list[Any]) -> Any:
    changed = copy.copy(cache)
    changed.layers = layers
    return changed


class Batches:
    """The completions of a session, grouped by adapter."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self._batches: dict[str, Batch] = {}
        self._kept: list[tuple[str, PrefixCache]] = []
        """Keys and values of ended conversations with their adapter's name, the latest last."""
        self._agreed = False
        self.why_not = ""
        """Why requests take turns; empty while they are computed together."""
        self._is_noted = False
        self.tokens_read = 0
        """Number of prompt tokens that were processed since an answer last received a token."""

    def row(self, adapter_name: str, prompt: Sequence[int], *, anew: bool = False) -> tuple[Row, int]:
        """Return a row for ``prompt``, and the number of its tokens that are processed already.

        With ``anew``, no earlier conversation is reused and the number is 0.
        """
        batch = self._batches.setdefault(adapter_name, Batch(self, adapter_name))
        batch.open_rows += 1
        kept = None if anew else self._best(adapter_name, prompt)
        if kept is None:
            return Row(batch, self.session.new_cache()), 0
        self._kept.remove((adapter_name, kept))
        return Row(batch, kept), kept.reuse(prompt)

    def may_read(self, tokens: int) -> bool:
        """Return whether ``tokens`` more prompt tokens may be processed before answers get their next token.

        If they may, they are counted in ``tokens_read``.
        """
        is_generating = any(batch.rows for batch in self._batches.values())
        if is_generating and self.tokens_read and self.tokens_read + tokens > PREFILL_CHUNK_TOKENS:
            return False
        self.tokens_read += tokens
        return True

    def _best(self, adapter_name: str, prompt: Sequence[int]) -> PrefixCache | None:
        """Return the cached conversation that shares the longest prefix with the prompt; None if reusing it
        would discard more than half of it.
        """
        known = [
            (reusable_prefix(cache.token_ids, prompt), number)
            for number, (name, cache) in enumerate(self._kept)
            if name == adapter_name
        ]
        tokens, number = max(known, default=(0, 0))
        if not tokens or 2 * tokens < len(self._kept[number][1].token_ids):
            return None
        return self._kept[number][1]

    def keep(self, adapter_name: str, prefix_cache: PrefixCache) -> None:
        """Keep the keys and values of an ended conversation.

        The oldest ones are dropped if there are too many, or if memory is short.
        """
        if not prefix_cache.token_ids or not self.session.keeps_keys:
            return
        self._kept.append((adapter_name, prefix_cache))
        room = self.session.free_bytes() * MAX_SHARE_OF_FREE_MEMORY
        while len(self._kept) > _MOST_KEPT or sum(cache.size_bytes for _, cache in self._kept) > room:
            del self._kept[0]

    def forget(self, adapter_name: str) -> bool:
        """Free the kept conversations of an adapter, and return True.

        If one of the adapter's answers is in progress, free nothing and return False.
        """
        if (batch := self._batches.get(adapter_name)) is not None and batch.open_rows:
            return False
        self._batches.pop(adapter_name, None)
        self._kept = [each for each in self._kept if each[0] != adapter_name]
        return True

    def release_kept(self) -> None:
        """Free the memory of all ended conversations."""
        self._kept.clear()

    def turn_off(self, why_not: str) -> None:
        """Make requests take turns from now on."""
        self.why_not = f"Requests to this model take turns: {why_not.rstrip('.')}."

    def take_note(self) -> str:
        """Return why requests take turns, the first time that this is known; otherwise an empty text."""
        note = "" if self._is_noted else self.why_not
        self._is_noted = bool(self.why_not)
        return note

    def allows(self, adapter_name: str, token_ids: Sequence[int]) -> bool:
        """Return whether rows may be computed together.

        The first call with enough tokens decides this: it computes the end of the text in several rows
        together and in each row alone, and compares the logits.
        """
        if self.why_not or self._agreed:
            return not self.why_not
        comparison = self.session.checked.get(adapter_name)
        if not self.session.keeps_keys:
            self.turn_off("it is run without a cache of keys and values")
        elif self.session.new_cache().depends_on_length:
            self.turn_off("its rotary frequencies depend on the length of the text")
        elif comparison is None:
            self.turn_off("its answers could not be checked")
        elif len(token_ids) < _SMALLEST_CHECKED:
            return False
        else:
            text = list(token_ids[-TOKENS:])
            try:
                # A window that is longer than the rows involves padding, a shorter one does not: compare
                # both.
                worst = self._difference(adapter_name, text)
                if any(
                    getattr(layer, "is_sliding", False) for layer in self.session.new_cache().cache.layers
                ):
                    with self.session.short_windows():
                        worst = max(worst, self._difference(adapter_name, text))
            except Exception as error:  # models raise any exception
                self.turn_off(f"several rows cannot be computed together: {first_line(error)}")
                return False
            self._agreed = LogitsComparison(worst, comparison.noise).agrees
            if not self._agreed:
                self.turn_off(
                    f"computed together, the rows' logits differed by {worst:.2g} of the logits' standard "
                    f"deviation, of which rounding accounts for about {comparison.noise:.2g}"
                )
        return self._agreed

    def _difference(self, adapter_name: str, token_ids: list[int]) -> float:
        """Return the largest difference between a row's logits within a batch and its logits when computed
        alone.

        Three texts of different lengths and ends join one after another and leave in the same order.
        """
        quarter = len(token_ids) // 4
        texts = [token_ids[quarter:-1], token_ids[quarter + 1 : -2], token_ids]
        batch = Batch(self, adapter_name, is_trial=True)
        rows: list[Row] = []
        logits: list[list[Tensor]] = [[] for _ in texts]
        for number in range(len(texts) + _CHECKED_STEPS - 1):
            if number < len(texts):
                row = Row(batch, self.session.new_cache())
                self.session.next_logits(adapter_name, texts[number][:-_CHECKED_STEPS], row.prefix_cache)
                batch.rows.append(row)
                rows.append(row)
            taking = [row for row in rows if row in batch.rows]
            for row in taking:
                place = len(logits[rows.index(row)]) - _CHECKED_STEPS
                row.logits, row.pending = None, texts[rows.index(row)][place]
            for row in taking:
                logits[rows.index(row)].append(row.next_logits().clone())
                if len(logits[rows.index(row)]) == _CHECKED_STEPS:
                    batch.rows.remove(row)
        worst = 0.0
        for text, given in zip(texts, logits, strict=True):
            cache = self.session.new_cache()
            self.session.next_logits(adapter_name, text[:-_CHECKED_STEPS], cache)
            for place, row_logits in enumerate(given):
                token_id = text[place - _CHECKED_STEPS]
                alone = self.session.next_logits(adapter_name, [token_id], cache)
                worst = max(worst, LogitsComparison.of(row_logits, alone).difference)
        return worst
