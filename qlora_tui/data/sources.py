"""Resolves a recipe's sources to files with formats, and converts their rows to conversations.

A source is a file, a folder, or a dataset of the Hub. ``datasets`` imports numpy, pandas and more, so a child
process downloads Hub datasets. Their Arrow files are read in place in the Hugging Face cache, and their
location is stored, so that the next use makes no request. ``format_choices`` shows what each format would
read from a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.excluded_rows import EVERY_FILE, excluded_by_path, file_names
from qlora_tui.data.formats import NOT_IN_FORMAT, PARTS, SNIFFED_ROWS, Detection, detect, parse
from qlora_tui.data.problems import shorten
from qlora_tui.data.read import SUFFIXES, cannot_read, first_rows, kind_of, rows, unreadable
from qlora_tui.data.row import Row
from qlora_tui.data.text_reader import Position
from qlora_tui.decoding import read_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir, walk_files
from qlora_tui.formatting import uncapitalize
from qlora_tui.gpu.torch_env import online_environ
from qlora_tui.paths import cache_dir
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.worker import run_job


class SourceFile(Struct, frozen=True):
    """One file of one source, and how to read it."""

    path: Path
    source: int
    """Index of the source in the recipe."""
    detection: Detection
    name: str = EVERY_FILE
    """Name in its source; empty if the source is a single file."""
    excluded: frozenset[int] = frozenset()
    """Rows of this file that the source leaves out."""


class ValidationSource(Source, frozen=True, kw_only=True):
    """The source in ``data.validation_path``. In a folder, :func:`files_of` selects the validation files."""


def every_source(data: Data) -> list[Source]:
    """Return all sources that a run reads: the training sources, then the validation source."""
    validation = [ValidationSource(path=data.validation_path)] if data.validation_path else []
    return [*data.sources, *validation]


def open_source(source: Source, preferences: str, index: int = 0) -> tuple[list[SourceFile], str]:
    """Return the files of a source, each with its format, and a note on which part of the source is read.

    ``preferences`` is the recipe's ``data.preferences``. Raises ``UserError`` for a source that does not
    exist, is empty, has no usable field, or holds preferences that the recipe rejects.
    """
    paths, note = paths_of(source)
    files = list(open_files(source, paths, preferences, index))
    notes = [f"{file.path.name}: {file.detection.note}" for file in files if file.detection.note]
    return files, "; ".join(filter(None, [note, *notes]))


def open_files(
    source: Source, paths: Sequence[Path], preferences: str, index: int = 0
) -> Iterator[SourceFile]:
    """Yield all files of a source, each with its format and its excluded rows."""
    excluded = excluded_by_path(source, paths)
    for path, name in zip(paths, file_names(source.path, paths), strict=True):
        detection = sniff(path, source, preferences)
        yield SourceFile(path, index, detection, name, excluded.get(path, frozenset()))


def open_file_of(source: Source, preferences: str, path: str = "") -> SourceFile:
    """Open the file ``path`` of a source, or its first file. Raises ``UserError``."""
    paths, _ = paths_of(source)
    chosen = next((one for one in paths if str(one) == path), paths[0])
    return SourceFile(chosen, 0, sniff(chosen, source, preferences))


def paths_of(source: Source) -> tuple[list[Path], str]:
    """Return the files of a source, with a note; downloads a Hub dataset. Raises ``UserError``."""
    if is_hub_dataset(source.path):
        return hub_files(source.path)
    return files_of(Path(source.path).expanduser(), validation=isinstance(source, ValidationSource))


def first_exchanges(data: Data, count: int) -> list[tuple[str, str]]:
    """Return (first user turn, its answer) of the first ``count`` rows of the validation file, or else of the
    last source. Rows without a user turn and repeated turns are left out. A missing answer is empty.

    Nothing is downloaded.
    """
    answers: dict[str, str] = {}
    for prompt, answer in _exchanges(data, len(every_source(data)) - 1, "", range(1, count + 1)):
        if prompt:
            answers.setdefault(prompt, answer)
    return list(answers.items())


def prompt_at(data: Data, source: int, row: int, file: str = "") -> str:
    """Return the first user turn of row number ``row``, from 1, in a source's file; empty if it has none.

    Earlier rows are read too. Nothing is downloaded.
    """
    return next((prompt for prompt, _ in _exchanges(data, source, file, range(row, row + 1))), "")


def _exchanges(data: Data, source: int, file: str, numbers: range) -> list[tuple[str, str]]:
    """Return (first user turn, the answer to it) of these rows of a file, without rows that cannot be read.
    A missing turn is empty.
    """
    sources = every_source(data)
    if not 0 <= source < len(sources) or is_hub_dataset(sources[source].path):
        return []
    try:
        paths, _ = paths_of(sources[source])
        path = paths[file_names(sources[source].path, paths).index(file)] if file else paths[0]
        opened = open_file_of(sources[source], data.preferences, str(path))
        read = [each for each in islice(rows(path), numbers[-1]) if each.number in numbers and not each.error]
    except (UserError, OSError, ValueError):
        return []
    exchanges = []
    for row in read:
        conversation = conversation_of(row, opened)
        turns = iter(conversation.messages if isinstance(conversation, Conversation) else ())
        prompt = next((turn.content.strip() for turn in turns if turn.role == "user"), "")
        answer = next((turn.content.strip() for turn in turns if turn.role == "assistant"), "")
        exchanges.append((prompt, answer))
    return exchanges


def is_hub_dataset(name: str) -> bool:
    """Return whether a source's path is a Hub dataset ID rather than a file or folder."""
    path = Path(name).expanduser()
    return is_hub_id(name) and not path.exists() and not kind_of(path)


def source_stamps(source: Source) -> tuple[tuple[str, int, int], ...]:
    """Return path, modification time and size of a source's files; empty for a Hub dataset or a missing file.

    If a file changes, the result changes.
    """
    path = Path(source.path).expanduser()
    try:
        files = [path / name for name in files_inside(path)] if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, UserError):
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def sniff(path: Path, source: Source, preferences: str) -> Detection:
    """Detect the format of one file from its first rows, under ``data.preferences``. Raises ``UserError``."""
    first = first_rows(path, SNIFFED_ROWS)
    readable = [row for row in first if not row.error]
    if not readable and first:
        raise unreadable(path, first[0].kind, first[0].error)
    detection = detect(readable, str(path), source.format, source.columns, preferences)
    note = first[0].file_note if first else ""
    return replace(detection, note=note) if note else detection


def conversations(
    file: SourceFile, position: Position | None = None
) -> Iterator[tuple[Row, Conversation | RowRejectedError]]:
    """Yield every row of a file with its conversation, or with the error that explains why it has none."""
    for row in rows(file.path, position):
        yield row, conversation_of(row, file)


def conversation_of(row: Row, file: SourceFile) -> Conversation | RowRejectedError:
    """Return the conversation of one row of a file, or the error that explains why it has none."""
    try:
        return parse(row, file.detection.layout, file.source)
    except RowRejectedError as refused:
        return refused


_VALIDATION = ("valid", "validation", "val", "dev", "eval", "evaluation")


_HELD_OUT = (*_VALIDATION, "test", "heldout", "holdout")
"""Words that, in the name of a file or of a folder above it, mark the file as held out from training."""


_DOCUMENTS = ("readme", "license", "licence")
"""Names, up to the first dot, of text files that describe the data: ``.md``, ``.txt`` or ``.text``."""


_METADATA = {
    "dataset_info.json": ("features", "splits", "builder_name", "file_name", "hf_hub_url", "ms_hub_url"),
    "dataset_infos.json": ("features", "splits"),
    "dataset_dict.json": ("splits",),
    "state.json": ("_data_files", "_fingerprint"),
}
"""Files in which ``datasets`` and LLaMA-Factory describe data; each has at least one of these keys.

The key is at the top level or one level below. A file of the same name that holds rows is data.
"""


_MAX_METADATA_BYTES = 4 << 20


_LEFT_OUT_NAMED = 5
"""Maximum number of files that a note names for each reason why files are left out."""


def files_of(path: Path, *, validation: bool = False) -> tuple[list[Path], str]:
    """Return the data files of ``path``, and a note on which files of a folder are left out, and why.

    A folder gives its files, sorted by name, including subfolders and linked files. Files whose names mark
    them as held out from training are left out, unless all are marked. With ``validation``, the files named
    as validation are used; without any, all files that are held out from training; and without any of these,
    all files.
    """
    if not path.exists():
        raise UserError(
            "No such data",
            what=f"{path} does not exist.",
            fix="Check the path; relative paths start at the current folder.",
        )
    if not path.is_dir():
        _check_regular(path)
        return [path], ""
    left_out: dict[str, list[str]] = {}
    files = []
    for relative in files_inside(path):
        file = path / relative
        if file.is_dir() and not relative.name.startswith("."):
            left_out.setdefault("a link to a folder that contains it", []).append(str(relative))
        elif relative.name.startswith("."):
            left_out.setdefault("hidden", []).append(str(relative))
        elif not kind_of(file):
            left_out.setdefault("of an unknown kind", []).append(str(relative))
        elif _describes_data(file):
            left_out.setdefault("about the data", []).append(str(relative))
        elif os.path.lexists(file):  # otherwise deleted since the search
            _check_regular(file)
            files.append(relative)
    if not files:
        raise UserError(
            "No data in the folder",
            what=f"{path} has no file whose name ends in {', '.join(SUFFIXES)}, with or without .gz or .zst.",
            why=_left_out_note(left_out),
            fix="Specify a folder that contains data files, or a file.",
        )
    held_out = [file for file in files if _is_named(file, _HELD_OUT)]
    if validation:
        chosen = [file for file in files if _is_named(file, _VALIDATION)] or held_out or files
    else:
        chosen = [file for file in files if file not in held_out] or files
    if others := [str(file) for file in files if file not in chosen]:
        reason = "not named as validation" if validation else "named as validation or test"
        left_out = {reason: others} | left_out
    return [path / file for file in chosen], _left_out_note(left_out)


def files_inside(folder: Path) -> list[Path]:
    """Return the result of :func:`qlora_tui.files.walk_files`.

    Raises UserError for a subfolder that cannot be searched.
    """
    try:
        return walk_files(folder)
    except OSError as error:
        raise cannot_read(Path(error.filename), error) from error


def _check_regular(path: Path) -> None:
    if path.is_file():
        return
    is_dangling = path.is_symlink() and not path.exists()
    what = "a link to a file that does not exist" if is_dangling else "a pipe, a socket or a device"
    raise UserError(
        "Not a file",
        what=f"{path} is {what}.",
        why="" if is_dangling else "Data is read more than once.",
        fix="Fetch the file, or delete the link."
        if is_dangling
        else "Save its content to a file, and use that file.",
    )


def _describes_data(path: Path) -> bool:
    """Return whether a file describes data rather than being data, by its name or its JSON content."""
    name = path.name.lower()
    if name.split(".")[0] in _DOCUMENTS:
        return kind_of(path) == "text"
    keys = _METADATA.get(name)
    try:
        if keys is None or path.stat().st_size > _MAX_METADATA_BYTES:
            return False
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError):
        return False  # read as data, which reports the error
    levels = [value, *value.values()] if isinstance(value, dict) else []
    return any(isinstance(level, dict) and key in level for level in levels for key in keys)


def _is_named(path: Path, words: Sequence[str]) -> bool:
    """Return whether the name of a file, or of a folder that holds it, contains one of ``words``."""
    name = path.as_posix().lower().replace("held-out", "heldout").replace("held_out", "heldout")
    return any(word in words for word in re.split(r"[^a-z]+", name.replace("hold-out", "holdout")))


def _left_out_note(left_out: dict[str, list[str]]) -> str:
    """Return the names of the files that are left out, grouped by reason; empty if there are none."""
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - _LEFT_OUT_NAMED:,} more" if len(names) > _LEFT_OUT_NAMED else ""
        parts.append(f"{', '.join(names[:_LEFT_OUT_NAMED])}{more} ({reason})")
    return f"not read: {'; '.join(parts)}" if parts else ""


TRAINING_SPLITS = ("train", "training", "train_sft", "sft")
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class HubFiles(Struct, frozen=True):
    """The files that the child process downloaded."""

    files: tuple[str, ...]
    split: str


_FILES = msgspec.json.Decoder(HubFiles)


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` may be a dataset ID: ``owner/name``, optionally with ``:subset``."""
    return _ID.fullmatch(name) is not None and not name.startswith(("./", "../", "~"))


def hub_files(name: str) -> tuple[list[Path], str]:
    """Return the files of a dataset's training split and a note on them, downloading the files if needed.

    Without a training split, the first split is used. Raises ``UserError`` if the dataset does not exist or
    cannot be reached.
    """
    cached = _read_cached(name)
    if cached is None:
        cached = _fetch(name)
        if not cached.files:
            raise UserError(
                "No such data",
                what=f"{name} has no files in the cache after its download: split {cached.split} is empty.",
                fix="Choose another dataset, or download its files and specify their folder.",
            )
        atomic_write(_cache_path(name), msgspec.json.encode(cached))
    other = "" if cached.split in TRAINING_SPLITS else ", because it has none for training"
    return [Path(file) for file in cached.files], f"hub dataset {name}, split {cached.split}{other}"


def is_training_split(name: str) -> bool:
    """Return whether the split of an earlier download is for training. Makes no request to the Hub."""
    cached = _read_cached(name)
    return cached is not None and cached.split in TRAINING_SPLITS


def local_files(name: str) -> list[Path] | None:
    """Return the files of an earlier download; None if there is none. Makes no request to the Hub."""
    cached = _read_cached(name)
    return None if cached is None else [Path(file) for file in cached.files]


def _cache_path(name: str) -> Path:
    return private_dir(cache_dir() / "datasets") / f"{name.replace('/', '--').replace(':', '@')}.json"


def _read_cached(name: str) -> HubFiles | None:
    cached = read_json(_cache_path(name), _FILES)
    return cached if cached and cached.files and all(map(os.path.isfile, cached.files)) else None


def _fetch(name: str) -> HubFiles:
    return run_job(
        "qlora_tui.data.sources:download_split",
        name,
        result=HubFiles,
        title="No such data",
        subject=f"The process that downloads {name}",
        fix="Check the name and the connection.",
        environ=online_environ(),
    )


def download_split(name: str) -> HubFiles:
    """Download the training split of a dataset, or else its first split, as a job. Raises UserError.

    ``trust_remote_code`` is never set, so the library refuses a dataset that is a script.
    """
    import datasets

    path, _, subset = name.partition(":")
    try:
        names = datasets.get_dataset_split_names(path, subset or None)
        split = next((s for s in TRAINING_SPLITS if s in names), names[0])
        loaded = datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # the library raises a dozen types, its own and those of its HTTP client
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            "No such data",
            what=f"{name} is neither a local file nor a dataset that the Hub provides: {text[:400]}",
            fix=_fix(text, type(error).__name__),
        ) from None
    return HubFiles(tuple(file["filename"] for file in loaded.cache_files), split)


def _fix(text: str, kind: str) -> str:
    if "Missing config name" in text:
        return "Add the subset after a colon: owner/name:subset."
    if "Gated" in kind or "401" in text or "403" in text or "gated" in text:
        return "Accept its terms on its page, then log in: hf auth login."
    if "script" in text:
        return "Dataset scripts are never run. Download the data files and use their paths."
    return "Check the name and the connection."


AUTO = "auto"


class FormatChoice(Struct, frozen=True):
    """A format, with the result of reading a file's first rows in it."""

    format: str
    rows: int
    """Number of rows that were tried."""
    read: int = 0
    """Number of tried rows that give a conversation."""
    example: str = ""
    """``question → answer`` of the first conversation, shortened; for plain text, the shortened text."""
    detected: str = ""
    """For ``auto``, the format that was detected."""
    problem: str = ""
    """Why no row can be read, in a clause; empty if one can be."""


def format_choices(
    path: Path, source: Source, formats: Sequence[str], preferences: str
) -> tuple[FormatChoice, ...]:
    """Try to read the first rows of a file in each of ``formats``, and return the results in the same order.

    ``preferences`` is the recipe's ``data.preferences``. Raises ``UserError`` if the file cannot be read.
    """
    first = first_rows(path, SNIFFED_ROWS)
    return tuple(_choice(first, str(path), format_, source, preferences) for format_ in formats)


def _choice(first: Sequence[Row], name: str, format_: str, source: Source, preferences: str) -> FormatChoice:
    readable = [row for row in first if not row.error]
    try:
        detection = detect(readable, name, format_, source.columns, preferences)
    except UserError as problem:
        return FormatChoice(format_, len(first), problem=_reason(problem, format_))
    file = SourceFile(Path(name), 0, detection)
    read = (conversation_of(row, file) for row in first)
    conversations = [one for one in read if isinstance(one, Conversation)]
    return FormatChoice(
        format_,
        len(first),
        read=len(conversations),
        example=_example(conversations[0]) if conversations else "",
        detected=detection.layout.format if format_ == AUTO else "",
        problem="" if conversations else "none of the rows is complete",
    )


def _reason(problem: UserError, format_: str) -> str:
    if problem.code == NOT_IN_FORMAT:
        return f"needs {' and '.join(PARTS[format_])}"
    return uncapitalize(problem.title)


def _example(conversation: Conversation) -> str:
    if conversation.text:
        return shorten(" ".join(conversation.text.split()))
    turns = [message for message in conversation.messages if message.role != "system"]
    return " → ".join(shorten(" ".join(message.content.split())) for message in turns[:2])
