"""Tokenized samples on disk for a recipe, made once and reused.

The trainer calls ``prepare_dataset``. The data set is stored in the cache directory under a key of content,
template, tokenizer and settings. It is made batch by batch, so tokens do not accumulate in memory.
"""

from __future__ import annotations

import errno
import hashlib
import re
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.checksums import mismatch, sha256, write_checksums
from qlora_tui.data.counted import RENDERING, Counted, counted_key, keep_counted, nothing_left
from qlora_tui.data.dataset_report import Counts
from qlora_tui.data.dataset_scan import DatasetScanner, open_worker_pool
from qlora_tui.data.excluded_rows import EVERY_FILE, parse_excluded_rows
from qlora_tui.data.formats import RowFormat
from qlora_tui.data.problems import DataProblem, raise_first_error
from qlora_tui.data.render import RenderOptions
from qlora_tui.data.row_result import RowProcessor
from qlora_tui.data.samples import TokenizedSample
from qlora_tui.data.sources import SourceFile, every_source, open_source
from qlora_tui.data.split import Split
from qlora_tui.data.store import Samples, Store, Writer
from qlora_tui.data.text_reader import Position
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir, sync_tree
from qlora_tui.paths import cache_dir
from qlora_tui.publishing import abandoned_in, delete_abandoned, discard, new_draft
from qlora_tui.recipe.preference_methods import PAIR_METHODS
from qlora_tui.recipe.schema import Recipe, Source

_MAX_UNUSED_AGE_S = 60 * 24 * 3600


class PrepareProgress(Struct, frozen=True):
    """Progress of the preparation."""

    share: float
    """Share of the bytes that have been read, 0 to 1."""
    rows: int
    tokens: int


class PreparedDataset(Struct, frozen=True):
    """A tokenized data set."""

    folder: Path
    data_hash: str
    """Hash of every token, mask and split, which is equal only for exactly the same training data."""
    counts: Counts
    train: Samples
    validation: Samples
    """Validation samples; may be empty."""
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]
    """Number of conversations with each kind of note (see ``TokenizedSample.notes``)."""
    cached: bool
    """Whether the data set came from the cache."""
    source_notes: tuple[str, ...] = ()
    """Notes on which part of a source is read, and which files of a folder are not."""


class _FileVersion(Struct, frozen=True):
    """The state of a file when it was hashed."""

    modified_ns: int
    """Modification time in nanoseconds; detects a change that was reverted."""
    sha256: str
    """Content hash, which detects changes on file systems with coarse times, or if times were reset."""

    @classmethod
    def of(cls, path: Path) -> _FileVersion:
        # Read before the hash, so that a change from here on is detected.
        return cls(path.stat().st_mtime_ns, sha256(path))


class _Meta(Struct, frozen=True):
    data_hash: str
    counts: Counts
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]


_META = msgspec.json.Decoder(_Meta)


def prepare_dataset(
    recipe: Recipe, tokenizer: ChatTokenizer, progress: Callable[[PrepareProgress], None] | None = None
) -> PreparedDataset:
    """Return the tokenized data set of ``recipe.data``, from the cache if possible.

    Raises ``UserError`` if a file cannot be used, a row has a blocking error, or nothing is left to train
    on.
    """
    if not recipe.data.sources:
        raise UserError(
            "No data",
            what="The recipe has no data source.",
            fix="Add a file, folder or dataset under data.sources.",
        )
    validation_source = len(recipe.data.sources) if recipe.data.validation_path else None
    files, source_notes = _open_sources(recipe)
    versions = [_FileVersion.of(file.path) for file in files]
    folder = private_dir(cache_dir() / "tokenized") / _key(recipe, files, versions, tokenizer)[:32]
    weights = [source.weight for source in every_source(recipe.data)]
    cached = _load(folder, weights, cached=True)
    if cached is not None:
        (folder / "meta.json").touch()
        return msgspec.structs.replace(cached, source_notes=source_notes)
    _forget_old_sets(folder.parent)
    try:
        with new_draft(folder.parent) as temporary:
            _make(temporary, recipe, files, tokenizer, validation_source, progress)
            _refuse_changed(files, versions)
            write_checksums(temporary)
            sync_tree(temporary)
            temporary.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(folder, error) from error
        if not (folder / "meta.json").exists():  # otherwise another process made the same set
            raise
    prepared = _load(folder, weights, cached=False)
    assert prepared is not None
    return msgspec.structs.replace(prepared, source_notes=source_notes)


def _open_sources(recipe: Recipe) -> tuple[list[SourceFile], tuple[str, ...]]:
    """Return the files of all sources, and notes on how they are read. Raises UserError."""
    files: list[SourceFile] = []
    notes = []
    for number, source in enumerate(every_source(recipe.data)):
        of_source, note = open_source(source, recipe.data.preferences, number)
        files += of_source
        if note:
            notes.append(f"{source.path}: {note}")
    return files, tuple(notes)


def _forget_old_sets(folder: Path) -> None:
    """Delete data sets that no run has used for a long time, and leftovers of killed processes."""
    for abandoned in abandoned_in(folder):
        with suppress(OSError, UserError):
            delete_abandoned(abandoned)
    for old in folder.iterdir():
        if re.fullmatch("[0-9a-f]{32}", old.name):
            # A set that another process deletes is gone; a set that cannot be deleted only takes disk space.
            with suppress(OSError):
                if time.time() - (old / "meta.json").stat().st_mtime > _MAX_UNUSED_AGE_S:
                    discard(old)


class ScannedDataset(Struct, frozen=True):
    """The facts about a data set after every row was read."""

    counts: Counts
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]
    held_back: frozenset[int]
    """Keys of the rows that are used for validation."""


def scan_dataset(
    recipe: Recipe,
    files: Sequence[SourceFile],
    tokenizer: ChatTokenizer,
    folder: Path,
    add: Callable[[TokenizedSample, int, int, int, int], object],
    progress: Callable[[PrepareProgress], None] | None = None,
) -> ScannedDataset:
    """Tokenize all rows of a recipe's data, and choose the validation rows.

    Args:
        folder: holds temporary sketches of the rows.
        add: called with each sample, and with source, row, key and file number of its row.

    Raises:
        UserError: a row has a blocking error.
    """
    # A validation file replaces the validation fraction.
    fraction = 0.0 if recipe.data.validation_path else recipe.data.validation_fraction
    total = sum(file.path.stat().st_size for file in files)
    outcomes = RowProcessor(recipe.data, tokenizer, recipe.split_seed)
    split = Split(folder, fraction)
    with open_worker_pool(outcomes, total) as work:
        scanner = DatasetScanner(recipe.data, work, sketched=split.wanted)
        done = 0
        for number, file in enumerate(files):
            position = Position()
            for results in scanner.scan(file, position):
                for one in results:
                    if one.samples and one.key is not None:
                        split.add(file.source, one.key, array("I", one.sketch))
                        for sample in one.samples:
                            add(sample, file.source, one.row, one.key, number)
                if progress is not None:
                    so_far = scanner.counts
                    share = min(1.0, (done + position.bytes) / (total or 1))
                    progress(PrepareProgress(share, so_far.rows, so_far.tokens))
            done += file.path.stat().st_size
        problems = scanner.problems()
        raise_first_error(problems)
    return ScannedDataset(scanner.counts, tuple(problems), scanner.notes, split.held_back())


def count_samples(
    recipe: Recipe,
    model: ModelFiles,
    tokenizer: ChatTokenizer,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> None:
    """Count the samples of a recipe, and store the result unless the data changed meanwhile.

    Raises:
        UserError: a file cannot be used, or a row has a blocking error.
    """
    key = counted_key(recipe, model)
    files, _ = _open_sources(recipe)
    lengths, sources, keys = array("I"), array("H"), array("Q")

    def add(sample: TokenizedSample, source: int, row: int, row_key: int, file: int) -> None:
        lengths.append(len(sample.token_ids))
        sources.append(source)
        keys.append(row_key)

    with new_draft(private_dir(cache_dir() / "tokenized")) as folder:
        scanned = scan_dataset(recipe, files, tokenizer, folder, add, progress)
    trained = [
        n
        for n, source in enumerate(sources)
        if source < len(recipe.data.sources) and keys[n] not in scanned.held_back
    ]
    counted = Counted(
        scanned.counts,
        array("I", (lengths[n] for n in trained)).tobytes(),
        array("H", (sources[n] for n in trained)).tobytes(),
    )
    if key is not None and counted_key(recipe, model) == key:
        keep_counted(key, counted)


def _make(
    folder: Path,
    recipe: Recipe,
    files: Sequence[SourceFile],
    tokenizer: ChatTokenizer,
    validation_source: int | None,
    progress: Callable[[PrepareProgress], None] | None,
) -> None:
    with Writer(folder, [file.name for file in files]) as writer:
        scanned = scan_dataset(recipe, files, tokenizer, folder, writer.add, progress)
        if not scanned.counts.samples:
            raise nothing_left(scanned.counts, recipe)
        data_hash = writer.finish(scanned.held_back, validation_source)
    meta = _Meta(data_hash, scanned.counts, scanned.problems, scanned.notes)
    atomic_write(folder / "meta.json", msgspec.json.encode(meta))


def _key(
    recipe: Recipe, files: Sequence[SourceFile], versions: Sequence[_FileVersion], tokenizer: ChatTokenizer
) -> str:
    """Return a key that changes with anything that can change a token, a mask or the split."""
    data = recipe.data
    excluded = [_excluded_key(source) for source in every_source(data)]
    names = [file.name for file in files]
    what = (
        RENDERING,
        tokenizer.fingerprint,
        [
            (version.sha256, file.source, _layout_key(file.detection.layout))
            for file, version in zip(files, versions, strict=True)
        ],
        (data.max_length, data.overflow, data.validation_fraction, bool(data.validation_path)),
        data.bad_rows,
        RenderOptions.of(data),
        recipe.split_seed,
        # Added only if there are any, so that earlier keys stay valid.
        *([excluded] if any(excluded) else ()),
        *([names] if any(names) else ()),
    )
    return hashlib.sha256(msgspec.json.encode(what)).hexdigest()


def _excluded_key(source: Source) -> list[int] | dict[str, list[int]]:
    """Return the rows that a source leaves out; only numbers if possible, as in earlier versions."""
    excluded = {name: sorted(rows) for name, rows in parse_excluded_rows(source.excluded_rows).items()}
    return excluded if any(excluded) else excluded.get(EVERY_FILE, [])


def _layout_key(layout: RowFormat) -> dict[str, object]:
    """Return the settings that affect how rows are read. Without a preference method, the result equals that
    of earlier versions.
    """
    fields: dict[str, object] = msgspec.structs.asdict(layout)
    if not layout.method:
        del fields["method"]
    # Methods for pairs share their samples.
    elif layout.method in PAIR_METHODS:
        fields["method"] = "pairs"
    return fields


def _refuse_changed(files: Sequence[SourceFile], versions: Sequence[_FileVersion]) -> None:
    """Raise UserError if a file has changed since it was hashed, because its tokens then match no key."""
    for file, version in zip(files, versions, strict=True):
        try:
            is_same = _FileVersion.of(file.path) == version
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                "The data changed while it was read",
                what=f"{file.path} was written to, replaced or deleted in the meantime.",
                why="The tokens may come from the old content, the new content, or a mixture.",
                fix="Start again once nothing writes to the file.",
            )


def _load(folder: Path, weights: Sequence[float], cached: bool) -> PreparedDataset | None:
    try:
        meta = decode_json((folder / "meta.json").read_bytes(), _META)
        if damage := mismatch(folder):
            raise ValueError(damage)
        store = Store(folder)
        train, validation = store.side("train", weights), store.side("validation", weights)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        if folder.exists():
            with suppress(OSError):
                discard(folder)
        return None
    return PreparedDataset(
        folder=folder,
        data_hash=meta.data_hash,
        counts=meta.counts,
        train=train,
        validation=validation,
        problems=meta.problems,
        notes=meta.notes,
        cached=cached,
    )


def _no_space(folder: Path, error: OSError) -> UserError:
    return UserError(
        "No disk space",
        what=f"The tokenized data does not fit on the disk that holds {folder.parent}: {error.strerror}.",
        fix="Free some space, or set XDG_CACHE_HOME to a folder on a larger disk.",
    )
