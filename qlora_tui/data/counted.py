"""The lengths of a run's training samples, counted before launch and stored by data and settings.

Samples are counted as in the trainer: every row is rendered, tokenized, truncated, dropped or split, and
validation rows are chosen. The stored lengths determine the number of steps of a run
(:func:`.step_plan.count_steps`) for any batch, packing, weights and number of epochs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.answer_cache import AnswerCache
from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.dataset_report import Counts
from qlora_tui.data.excluded_rows import all_excluded
from qlora_tui.data.quick_check import file_fingerprint, tokenizer_fingerprint
from qlora_tui.data.sources import every_source, is_hub_dataset, local_files, paths_of
from qlora_tui.data.store import GOOD, epoch_order
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data, Recipe

RENDERING = 9
"""Version of the rendering, increased when the same data and settings give different tokens or splits."""
_KEPT = 200
"""Number of stored counts, one for each state of data and settings."""
_MAX_BYTES = 64 << 20


class SampleLengths:
    """The training samples of a run, of which only lengths and sources are known."""

    def __init__(self, lengths: Sequence[int], sources: Sequence[int], data: Data) -> None:
        """Set lengths and sources; ``data`` has the weight of each source."""
        self._lengths = lengths
        self._sources = sources
        self._data = data

    def __len__(self) -> int:
        return len(self._lengths)

    def length(self, i: int, /) -> int:
        """Return the length of sample ``i`` in tokens."""
        return self._lengths[i]

    def epoch(self, epoch: int, seed: int, /) -> array[int]:
        """Return the samples of one epoch in random order."""
        return epoch_order(self._sources, [source.weight for source in self._data.sources], epoch, seed)

    def of_side(self, side: int, /) -> SampleLengths:
        """Return the chosen sides of pairs, or the rejected ones."""
        first = 0 if side == GOOD else 1
        return SampleLengths(self._lengths[first::2], self._sources[first::2], self._data)


class Counted(Struct, frozen=True):
    """Lengths and sources of a run's samples. They are empty if every row is left out."""

    counts: Counts
    lengths: bytes
    """Number of tokens of each training sample, 32-bit unsigned."""
    sources: bytes
    """Index of each sample's source, 16-bit unsigned."""

    def samples(self, data: Data) -> SampleLengths:
        """Return the lengths of the training samples, weighted as the sources of ``data`` specify."""
        return SampleLengths(array("I", self.lengths), array("H", self.sources), data)


_cache = AnswerCache("counted", Counted, max_bytes=_MAX_BYTES)


def find_counted(recipe: Recipe, model: ModelFiles) -> Counted | None:
    """Return the stored counts for this data, model and settings; None without counts or after changes."""
    key = counted_key(recipe, model)
    return None if key is None else _cache.find(key)


def keep_counted(key: bytes, counted: Counted) -> None:
    """Store counts under their :func:`counted_key`."""
    _cache.keep(key, counted, _KEPT)


def counted_key(recipe: Recipe, model: ModelFiles) -> bytes | None:
    """Return a key of everything that affects a sample or the split; None if a file is not here."""
    replace = msgspec.structs.replace
    sources = tuple(replace(source, weight=1.0) for source in recipe.data.sources)
    data = replace(recipe.data, packing=True, sources=sources)
    stamps: list[tuple[str, int, int]] = []
    with suppress(OSError, UserError):
        for source in every_source(recipe.data):
            paths = local_files(source.path) if is_hub_dataset(source.path) else paths_of(source)[0]
            if paths is None:
                return None
            stamps += [(str(path.resolve()), *file_fingerprint(path)) for path in paths]
        what = (RENDERING, data, recipe.split_seed, stamps, _tokenizer(recipe, model))
        return repr(what).encode(errors="surrogateescape")
    return None


def _tokenizer(recipe: Recipe, model: ModelFiles) -> tuple[object, ...]:
    """Return the values that identify the tokenizer and its template. Raises OSError."""
    if model.gguf_file is None:
        return tokenizer_fingerprint(model.folder, recipe.model.chat_template, recipe.data.train_on)
    file: Path = model.folder / model.gguf_file
    return (str(file.resolve()), file_fingerprint(file), recipe.model.chat_template)


def nothing_left(counts: Counts, recipe: Recipe) -> UserError:
    """Build the error for data in which no row yields a sample."""
    if counts.excluded and not counts.rows:
        return all_excluded(counts.excluded)
    if counts.dropped and recipe.data.overflow == "drop":
        fix = 'Raise Sequence length (data.max_length), or cut long samples: data.overflow = "cut-right".'
    elif counts.dropped:
        fix = "Raise Sequence length (data.max_length): the answers are beyond the cut."
    else:
        fix = "Look at the file with: qlora-tui data inspect FILE"
    reasons = [f"{counts.left_out:,} are left out"] if counts.left_out or not counts.dropped else []
    if counts.dropped:
        length = f"{recipe.data.max_length:,} tokens"
        reasons.append(f"{counts.dropped:,} are dropped because of the limit of {length}")
    return UserError(
        "Nothing to train on",
        what=f"None of the {pluralize(counts.rows, 'row')} yields a sample: {' and '.join(reasons)}.",
        fix=fix,
    )
