"""Cached errors of earlier inspections, so that a launch is rejected at once even with a large file.

``inspection`` writes them, ``quick_check`` and the Train screen read it. An entry is valid for one state of a
file (its time and size) and one way of reading it, with or without bad rows; an error that shows only in
tokens also depends on tokenizer and template.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from qlora_tui.data.problems import DataProblem, raise_first_error
from qlora_tui.decoding import decode_json
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.paths import cache_dir
from qlora_tui.recipe.schema import Source

_OF_TOKENS = ("turn-end-untrained", "pad-hides-end")
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template*",
    "*/tool_use.jinja",
)
_MAX_AGE_S = 60 * 24 * 3600
_READING = 4
"""Version of the row checks; increased when rows that were an error become readable."""

_DECODER = msgspec.json.Decoder(DataProblem)

Tokens = tuple[object, ...]
"""Inputs that errors in tokens depend on; see ``tokenizer_fingerprint``."""


def tokenizer_fingerprint(folder: Path, template: str, train_on: str) -> Tokens:
    """Return a tokenizer's file states with the recipe's ``model.chat_template`` and ``data.train_on``."""
    files = sorted(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))
    stamps = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return (str(folder.resolve()), stamps, template, train_on)


Stamp = tuple[int, int]
"""Modification time and size of a file."""


def file_fingerprint(path: Path) -> Stamp:
    """Return the current state of a file; call it before reading, because the file may be fixed meanwhile."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def cache_errors(
    source: Source,
    path: Path,
    stamp: Stamp,
    problems: Iterable[DataProblem],
    tokens: Tokens | None,
    *,
    read: bool,
    skips_bad_rows: bool = False,
) -> None:
    """Store the first error of each kind among the problems of a file, and remove errors that are gone if the
    whole file was ``read``."""
    errors = [problem for problem in problems if problem.severity == "error" and problem.path == str(path)]
    for of_tokens in (False, True):
        if of_tokens and tokens is None:
            continue
        first_error = next((e for e in errors if (e.kind in _OF_TOKENS) == of_tokens), None)
        note = _note(source, path, stamp, tokens if of_tokens else None, skips_bad_rows=skips_bad_rows)
        if first_error is not None:
            _forget_old(private_dir(note.parent))
            # A file whose name is not UTF-8 is refused by the recipe in any case.
            with suppress(UnicodeEncodeError):
                atomic_write(note, msgspec.json.encode(first_error))
        elif read:
            note.unlink(missing_ok=True)


def raise_cached_error(
    files: Sequence[tuple[Source, Path]], tokens: Tokens | None = None, *, skips_bad_rows: bool = False
) -> None:
    """Raise ``UserError`` for the first file with a cached error."""
    for source, path in files:
        for one in dict.fromkeys((None, tokens)):
            try:
                note = _note(source, path, file_fingerprint(path), one, skips_bad_rows=skips_bad_rows)
                raise_first_error([decode_json(note.read_bytes(), _DECODER)])
            except (OSError, msgspec.MsgspecError):
                continue


def _note(source: Source, path: Path, stamp: Stamp, tokens: Tokens | None, *, skips_bad_rows: bool) -> Path:
    what = (
        _READING,
        str(path.resolve()),
        *stamp,
        source.format,
        source.columns,
        tokens,
        skips_bad_rows,
        # Only where there are any, so that earlier notes stay valid.
        *([source.excluded_rows] if source.excluded_rows else ()),
    )
    # In a name that is not UTF-8, bytes become surrogates.
    key = hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_dir() / "findings" / f"{key}.json"


def _forget_old(folder: Path) -> None:
    for note in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{32}\.json", note.name):
            # One that another process deletes is gone; one that cannot be deleted takes a few bytes.
            with suppress(OSError):
                if time.time() - note.stat().st_mtime > _MAX_AGE_S:
                    note.unlink()
