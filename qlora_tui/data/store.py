"""Tokenized samples on disk, in flat files that are mapped and never read completely.

One folder per data set. The files are little-endian and have no headers:

* ``tokens.u32``: every token id, sample after sample.
* ``trained.u8``: one byte per token, 1 if it is in the loss.
* ``weights.f32``: the loss weight of each token; exists only if some weight is neither 0 nor 1.
* ``offsets.u64``: start of each sample, and the end of the last.
* ``trained_counts.u32``, ``rows.u32``, ``sources.u16``: one entry per sample.
* ``files.u32``: number of the file of each sample, and ``files.json``: the name of each file in its source;
  they exist only if a source is a folder or has several files.
* ``sides.u8``: one byte per sample, ``GOOD`` or ``BAD``; exists only if a preference method trains on both.
  In a pair the good side is first, and the bad side is the next sample.
* ``train.u32``, ``validation.u32``: sample numbers of the two splits.
* ``meta.json``: the fields of ``dataset.PreparedDataset``.

``dataset`` writes these files; the trainer wraps the views with ``torch.frombuffer``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import sys
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from qlora_tui.data.samples import TokenizedSample

if sys.byteorder != "little" or array("I").itemsize != 4:
    raise ImportError("The tokenized store needs a little-endian machine with 32-bit integers.")

_OFFSETS = "offsets.u64"
_TOKENS, _LOSS_MASK, _WEIGHTS = "tokens.u32", "trained.u8", "weights.f32"
_PER_TOKEN = {_TOKENS: "I", _LOSS_MASK: "B", _WEIGHTS: "f"}
_COUNTS, _ROWS, _SOURCES = "trained_counts.u32", "rows.u32", "sources.u16"
_FILE_NUMBERS, _FILE_NAMES, _SIDES = "files.u32", "files.json", "sides.u8"
_PER_SAMPLE = {_COUNTS: "I", _ROWS: "I", _SOURCES: "H", _FILE_NUMBERS: "I", _SIDES: "B"}
"""Files with an entry for each token or sample, and the array types of their entries."""
_OPTIONAL = (_WEIGHTS, _FILE_NUMBERS, _SIDES)
GOOD, BAD = 1, 2
"""The side of a preference that a sample is on: GOOD if its answer was chosen or rated good, BAD if its
answer was rejected or rated bad.
"""


class Writer:
    """Appends samples to a folder. A context manager; call ``finish`` before leaving the context."""

    def __init__(self, folder: Path, file_names: Sequence[str] = ()):
        """Start a data set in ``folder``; ``file_names`` are all files in order, empty for a single file."""
        self.folder = folder
        self._file_names = list(file_names) if any(file_names) else []
        self._hash = hashlib.sha256()
        self._end = 0
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self.keys = array("Q")
        """Key of the source row of each sample."""
        self.sources = array("H")
        """Source index of each sample."""

    def __enter__(self) -> Writer:
        for name in (_OFFSETS, *_PER_TOKEN, *_PER_SAMPLE):
            if name not in _OPTIONAL:
                self._open(name)
        if self._file_names:
            self._open(_FILE_NUMBERS)
            (self.folder / _FILE_NAMES).write_text(json.dumps(self._file_names))
        self._write(_OFFSETS, array("Q", [0]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, sample: TokenizedSample, source: int, row: int, key: int, file: int = 0) -> None:
        """Add one sample of a row of file number ``file``."""
        tokens = array("I", sample.token_ids)
        self._add_weights(sample.loss_mask, sample.weights)
        self._end += len(tokens)
        write = self._write
        write(_TOKENS, tokens)
        write(_LOSS_MASK, sample.loss_mask)
        write(_OFFSETS, array("Q", [self._end]))
        write(_COUNTS, array("I", [sample.trained_count]))
        write(_ROWS, array("I", [row]))
        write(_SOURCES, array("H", [source]))
        if self._file_names:
            write(_FILE_NUMBERS, array("I", [file]))
        self.keys.append(key)
        self.sources.append(source)
        self._hash.update(tokens)
        self._hash.update(sample.loss_mask)
        if sample.side:
            if _SIDES not in self._files:
                self._open(_SIDES)
            self._write(_SIDES, bytes([sample.side]))
            self._hash.update(bytes([sample.side]))

    def finish(self, validation: frozenset[int], validation_source: int | None) -> str:
        """Write the two splits; return a hash of the tokens, loss masks, weights, sides and splits.

        The validation split has the samples of ``validation_source``. If that is None, it has the samples
        whose keys are in ``validation``.
        """
        sides = {"train.u32": array("I"), "validation.u32": array("I")}
        for number, (key, source) in enumerate(zip(self.keys, self.sources, strict=True)):
            held = source == validation_source or (validation_source is None and key in validation)
            sides["validation.u32" if held else "train.u32"].append(number)
        for name, numbers in sides.items():
            (self.folder / name).write_bytes(numbers.tobytes())
            self._hash.update(numbers)
            self._hash.update(b"|")
        return self._hash.hexdigest()

    def _add_weights(self, loss_mask: bytes, weights: array[float] | None) -> None:
        if weights is not None:
            self._hash.update(weights)
            if _WEIGHTS not in self._files:
                self._open(_WEIGHTS)
                self._files[_LOSS_MASK].flush()
                with (self.folder / _LOSS_MASK).open("rb") as earlier:
                    while flags := earlier.read(1 << 20):
                        self._write(_WEIGHTS, array("f", iter(flags)))
        if _WEIGHTS in self._files:
            self._write(_WEIGHTS, weights or array("f", iter(loss_mask)))

    def _open(self, name: str) -> None:
        self._files[name] = self._stack.enter_context((self.folder / name).open("wb", buffering=1 << 20))

    def _write(self, name: str, values: bytes | array[int] | array[float]) -> None:
        self._files[name].write(values)


class Store:
    """A finished folder, memory-mapped. Raises ``ValueError`` or ``OSError`` for damaged files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.offsets = _mapped(folder / _OFFSETS, "Q")
        columns = {
            name: _mapped(folder / name, kind)
            for name, kind in (_PER_TOKEN | _PER_SAMPLE).items()
            if name not in _OPTIONAL or (folder / name).exists()
        }
        for name, column in columns.items():
            if len(column) != (self.offsets[-1] if name in _PER_TOKEN else len(self.offsets) - 1):
                raise ValueError(f"{folder / name} is incomplete")
        self.tokens, self.loss_mask = columns[_TOKENS], columns[_LOSS_MASK]
        self.trained_counts, self.rows, self.sources = columns[_COUNTS], columns[_ROWS], columns[_SOURCES]
        self.weights, self.sides = columns.get(_WEIGHTS), columns.get(_SIDES)
        self.files = columns.get(_FILE_NUMBERS)
        names = (folder / _FILE_NAMES).read_bytes() if self.files is not None else b"[]"
        self.file_names: list[str] = json.loads(names)

    def side(self, name: str, weights: Sequence[float]) -> Samples:
        """Return the samples of the split ``name``, ``train`` or ``validation``."""
        numbers = array("I")
        numbers.frombytes((self.folder / f"{name}.u32").read_bytes())
        return Samples(self, numbers, weights)


class Samples:
    """The samples of one split, numbered from 0. Every view is read-only memory of the mapped files."""

    def __init__(self, store: Store, numbers: array[int], weights: Sequence[float]):
        self._store = store
        self._numbers = numbers
        self._weights = tuple(weights)

    def __len__(self) -> int:
        return len(self._numbers)

    def token_ids(self, i: int) -> memoryview:
        """Return the token ids of sample ``i``, 32-bit unsigned."""
        return self._store.tokens[self._slice(i)]

    def loss_mask(self, i: int) -> memoryview:
        """Return the loss mask of sample ``i``, one byte per token: 1 if it is in the loss."""
        return self._store.loss_mask[self._slice(i)]

    @property
    def weighted(self) -> bool:
        """Return whether some tokens have a loss weight other than 0 and 1."""
        return self._store.weights is not None

    def weights(self, i: int) -> memoryview | None:
        """Return the loss weights of sample ``i``, 32-bit; None if no row sets weights."""
        return None if self._store.weights is None else self._store.weights[self._slice(i)]

    def side(self, i: int) -> int:
        """Return ``GOOD`` or ``BAD`` if a preference method trains on both sides, else 0."""
        return 0 if self._store.sides is None else self._store.sides[self._numbers[i]]

    def of_side(self, side: int) -> Samples:
        """Return the samples of one side, in order; all of them if there are no sides."""
        if self._store.sides is None:
            return self
        sides = self._store.sides
        return Samples(self._store, array("I", (n for n in self._numbers if sides[n] == side)), self._weights)

    def spread(self, most: int) -> Samples:
        """Return up to ``most`` of the samples, spread evenly, in order."""
        count = min(len(self), most)
        numbers = array("I", (self._numbers[i * len(self) // count] for i in range(count)))
        return Samples(self._store, numbers, self._weights)

    def length(self, i: int) -> int:
        """Return the number of tokens in sample ``i``."""
        n = self._numbers[i]
        return int(self._store.offsets[n + 1] - self._store.offsets[n])

    def trained_count(self, i: int) -> int:
        """Return the number of tokens of sample ``i`` in the loss."""
        return int(self._store.trained_counts[self._numbers[i]])

    def origin(self, i: int) -> tuple[int, int]:
        """Return source and row number of sample ``i``."""
        n = self._numbers[i]
        return int(self._store.sources[n]), int(self._store.rows[n])

    def file_name(self, i: int) -> str:
        """Return the name of the file of sample ``i`` in its source; empty if the source is a single file."""
        store = self._store
        return "" if store.files is None else store.file_names[store.files[self._numbers[i]]]

    def lengths(self) -> array[int]:
        """Return the number of tokens of every sample."""
        return array("I", (self.length(i) for i in range(len(self))))

    def epoch(self, epoch: int, seed: int) -> array[int]:
        """Return the samples of one epoch in random order (:func:`epoch_order`)."""
        return epoch_order([self._store.sources[n] for n in self._numbers], self._weights, epoch, seed)

    def _slice(self, i: int) -> slice:
        n = self._numbers[i]
        return slice(self._store.offsets[n], self._store.offsets[n + 1])


def epoch_order(sources: Sequence[int], weights: Sequence[float], epoch: int, seed: int) -> array[int]:
    """Return the samples of one epoch in random order, with each source repeated according to its weight.

    A weight of 2 gives each sample of a source twice. A weight of 0.5 gives half of the samples, and the
    other half in the next epoch. Deterministic for ``epoch`` and ``seed``.

    Args:
        sources: index of the source of each sample.
        weights: weight of each source; 1 for a source beyond the last entry.
    """
    by_source: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        by_source.setdefault(source, []).append(i)
    order: list[int] = []
    for source, samples in by_source.items():
        weight = weights[source] if source < len(weights) else 1.0
        times, part = int(weight), round((weight - int(weight)) * len(samples))
        order += samples * times
        if part:
            random.Random(f"{seed}/{source}").shuffle(samples)
            first = epoch * part
            order += [samples[k % len(samples)] for k in range(first, first + part)]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return array("I", order)


def _mapped(path: Path, kind: str) -> memoryview:
    if path.stat().st_size == 0:
        return memoryview(b"").cast(kind)  # type: ignore[call-overload, no-any-return]
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(whole).cast(kind)  # type: ignore[call-overload, no-any-return]
