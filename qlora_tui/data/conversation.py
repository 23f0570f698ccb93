"""Conversation types, independent of the file format, and detection of media that a row holds besides text.

Images, video and audio are detected in columns, typed parts and placeholders, so that no run trains on only
the text of such rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(Struct, frozen=True):
    """One function call by the assistant."""

    name: str
    arguments: Any = {}
    """The parsed JSON arguments: an object in data, but any value in a generated answer."""
    id: str = ""


class Message(Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str
    train: bool = True
    """Whether the model learns this turn; used for assistant turns only."""
    reasoning: str = ""
    """The assistant's reasoning before the answer, if the file stores it separately."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    """Id of the call that a tool turn answers."""
    name: str = ""
    """Name of the tool that answers, for a tool turn."""
    weight: float = 1.0
    """Loss weight of each token of the turn, from the file; 0 excludes the turn from training."""


class Conversation(Struct, frozen=True):
    """One row of a data file."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Functions offered to the assistant, as JSON schemas in OpenAI's format."""
    text: str = ""
    """Plain text to learn; there are then no messages."""
    source: int = 0
    """Index of the recipe's source."""
    row: int = 0
    """Row number in the file, from 1; in JSONL and text files the line number."""
    rejected: tuple[Conversation, ...] = ()
    """Copies of this conversation, each with a rejected answer in place of the chosen one.

    Empty unless the run trains on both sides.
    """
    rated_good: bool | None = None
    """Whether the answer is rated good, if a run trains on ratings; otherwise None."""

    @property
    def answers(self) -> list[Message]:
        """Return the assistant turns in the loss."""
        return [m for m in self.messages if m.role == "assistant" and m.train]


class RowRejectedError(Exception):
    """Raised for a row that cannot become a conversation, or that a template cannot render.

    ``kind`` names the check (see ``problems.CHECKS``); the message is the reason.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowRejectedError], tuple[str, str]]:
        return (RowRejectedError, (self.kind, self.reason))


_MEDIA = {"image": "an image", "video": "a video", "audio": "audio"}
_COLUMN = re.compile(r"(?:input_|output_)?(image|video|audio)s?(?:_(?:url|path|file|bytes))?s?")
"""Column names such as ``images``, ``image_path`` and ``audios``.

They are those of LLaVA, LLaMA-Factory, ms-swift and data sets on the Hub.
"""
_PART = re.compile(r"(?:input_)?(image|video|audio)(?:_url|_file)?")
_FILE_COLUMNS = ("file_name", "file", "path")
"""Columns in the ``metadata.jsonl`` of an ImageFolder or AudioFolder."""
_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"),
    *(".wav", ".mp3", ".flac", ".ogg", ".mp4", ".avi", ".mov", ".mkv", ".webm"),
)
_TAG = r"<(?:image|video|audio)>"
_PLACEHOLDER = re.compile(
    rf"\A\s*{_TAG}"  # before the question
    rf"|^\s*(?:{_TAG}\s*)+$"  # on a separate line
    rf"|[.?!:\n]\s*{_TAG}\s*\Z",  # after the question
    re.MULTILINE,
)
"""Pattern of placeholders in their usual positions only.

In the middle of a sentence, a question about HTML may contain ``<video>``.
"""
_EMBEDDED = re.compile(
    r"<(img|image|video|audio)>(?P<path>[^\s<>]+)</\1>"  # Qwen-VL and Qwen-Audio
    r"|<\|(?:image|vision|video|audio)\w*\|>"  # control tokens of a vision model
    r"|<(?:image|video|audio)[ _]?\d+>"  # in MMMU
)
"""Pattern of media inside a sentence. ``_embedded`` checks that ``path`` is one, not text in HTML tags."""
_CODE_BLOCK = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
"""Pattern of Markdown's fenced code blocks."""
_STRUCTS = ({"bytes", "path"}, {"array", "sampling_rate"}, {"array", "path", "sampling_rate"})
"""Keys of an image or a sound as the ``datasets`` library stores them in Parquet."""


def medium_of(part_type: Any) -> str | None:
    """Return ``an image`` for a content part type such as ``image_url``; None for other types."""
    match = _PART.fullmatch(str(part_type))
    return _MEDIA[match[1]] if match else None


def media_column(fields: Mapping[str, Any]) -> str:
    """Return a sentence on the first column with an image, video or audio; empty if there is none."""
    suspects = _suspect_columns(tuple(fields))
    for column, value in fields.items():
        if isinstance(value, str):
            if column not in suspects:
                continue
        elif _is_struct(value):
            return f"The column {column!r} holds an image, a video or audio as bytes."
        if not value or column not in suspects or isinstance(value, bool | int | float):
            continue  # a flag, or a count of images
        if medium := suspects[column]:
            return f"The column {column!r} holds {medium}."
        if isinstance(value, str) and value.lower().endswith(_ENDINGS):
            return f"The column {column!r} names an image, a video or audio: {value}."
    return ""


def placeholder(messages: Iterable[Message]) -> str:
    """Return a sentence on the first turn with a placeholder for a medium; empty if there is none.

    Code blocks are skipped. In an answer ``<video>`` and ``<audio>`` are HTML elements, but ``<image>`` is
    not.
    """
    for number, message in enumerate(messages, 1):
        text = message.content
        if ">" not in text or message.role not in ("user", "assistant"):
            continue
        if message.role == "user" and (medium := _embedded(text)):
            return f"Turn {number} has the placeholder {medium}."
        if not _PLACEHOLDER.search(text):
            continue
        prose = _CODE_BLOCK.sub("\ncode\n", text)
        match = _PLACEHOLDER.search(prose)
        tag = re.search(_TAG, match[0]) if match else None
        if tag is None or f"</{tag[0][1:]}" in text:
            continue
        if message.role == "user" or tag[0] == "<image>":
            return f"Turn {number} has the placeholder {tag[0]}."
    return ""


def _embedded(text: str) -> str:
    """Return the first medium inside the sentences of a question; empty if there is none."""
    if not _EMBEDDED.search(text):
        return ""
    for match in _EMBEDDED.finditer(_CODE_BLOCK.sub("\ncode\n", text)):
        path = match["path"]
        if path is None or "/" in path or path.lower().endswith(_ENDINGS):
            return match[0]
    return ""


@lru_cache(maxsize=1024)
def _suspect_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """Map each column whose name suggests a medium to the medium, which is empty for a file name column.

    Cached, because this runs for every row and most rows have the same columns.
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
