"""Images, video and audio in a row: found so that no run trains on the text that is left without them.

Read by ``formats`` for columns and placeholders, by ``chat_formats`` for typed parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from qlora_tui.data.conversation import Message

_MEDIA = {"image": "an image", "video": "a video", "audio": "audio"}
_COLUMN = re.compile(r"(?:input_|output_)?(image|video|audio)s?(?:_(?:url|path|file|bytes))?s?")
"""``images``, ``image_path``, ``audios``: the names that LLaVA, LLaMA-Factory, ms-swift and the hub use."""
_PART = re.compile(r"(?:input_)?(image|video|audio)(?:_url|_file)?")
_FILE_COLUMNS = ("file_name", "file", "path")
"""In ``metadata.jsonl`` of an ImageFolder or AudioFolder."""
_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"),
    *(".wav", ".mp3", ".flac", ".ogg", ".mp4", ".avi", ".mov", ".mkv", ".webm"),
)
_TAG = r"<(?:image|video|audio)>"
_PLACEHOLDER = re.compile(
    rf"\A\s*{_TAG}"  # before the question
    rf"|^\s*(?:{_TAG}\s*)+$"  # on a line of its own
    rf"|[.?!:\n]\s*{_TAG}\s*\Z",  # after it
    re.MULTILINE,
)
"""Only where placeholders stand: a question about HTML may name ``<video>`` in the middle of a sentence."""
_CODE_BLOCK = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
"""Fenced, as Markdown has it."""
_STRUCTS = ({"bytes", "path"}, {"array", "sampling_rate"}, {"array", "path", "sampling_rate"})
"""Keys of an image or a sound as the ``datasets`` library keeps it in Parquet."""


def medium_of(part_type: Any) -> str | None:
    """``an image`` for the type of a content part such as ``image_url``; None where it is no medium."""
    match = _PART.fullmatch(str(part_type))
    return _MEDIA[match[1]] if match else None


def media_column(fields: Mapping[str, Any]) -> str:
    """A sentence that names the first column of a row with an image, a video or audio; empty if none has."""
    suspects = _suspect_columns(tuple(fields))
    for column, value in fields.items():
        if isinstance(value, str):
            if column not in suspects:
                continue
        elif _is_struct(value):
            return f"The column {column!r} holds an image, a video or audio as bytes."
        if not value or column not in suspects or _is_switch(value):
            continue
        if medium := suspects[column]:
            return f"The column {column!r} holds {medium}."
        if isinstance(value, str) and value.lower().endswith(_ENDINGS):
            return f"The column {column!r} names an image, a video or audio: {value}."
    return ""


def placeholder(messages: Iterable[Message]) -> str:
    """A sentence that names the first turn with a placeholder for a medium; empty if none has.

    Code blocks are skipped. In an answer ``<video>`` and ``<audio>`` are elements of HTML; ``<image>`` is not
    one.
    """
    for number, message in enumerate(messages, 1):
        text = message.content
        if ">" not in text or message.role not in ("user", "assistant") or not _PLACEHOLDER.search(text):
            continue
        prose = _CODE_BLOCK.sub("\ncode\n", text)
        match = _PLACEHOLDER.search(prose)
        tag = re.search(_TAG, match[0]) if match else None
        if tag is None or f"</{tag[0][1:]}" in text:
            continue
        if message.role == "user" or tag[0] == "<image>":
            return f"Turn {number} has the placeholder {tag[0]}."
    return ""


@lru_cache(maxsize=1024)
def _suspect_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """Columns whose names say that they hold a medium, with the medium; empty for one that names a file.

    Cached, for it is asked of every row and most rows have the same columns.
    """
    suspects = {}
    for column in columns:
        name = str(column).lower()
        if match := _COLUMN.fullmatch(name):
            suspects[column] = _MEDIA[match[1]]
        elif name in _FILE_COLUMNS:
            suspects[column] = ""
    return suspects


def _is_struct(value: Any) -> bool:
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, dict) and value.keys() in _STRUCTS


def _is_switch(value: Any) -> bool:
    """Whether the value is a number or a flag, such as a count of images, rather than a medium."""
    return isinstance(value, bool | int | float)
