"""What each format would read of a file: the choices of the Data screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from qlora_tui.data.column_detection import PARTS
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.formats import NOT_IN_FORMAT, SNIFFED_ROWS, RowFormat, detect, parse
from qlora_tui.data.problems import shorten
from qlora_tui.data.read import first_rows
from qlora_tui.data.row import Row
from qlora_tui.errors import UserError
from qlora_tui.formatting import uncapitalize
from qlora_tui.recipe.schema import Source

AUTO = "auto"


class FormatChoice(Struct, frozen=True):
    """A format, and what it reads of the first rows of a file."""

    format: str
    rows: int
    """Rows that were tried."""
    read: int = 0
    """Those of them that give a conversation."""
    example: str = ""
    """``question → answer`` of the first conversation, shortened; a text alone for plain text."""
    detected: str = ""
    """For ``auto``, the format that it chooses."""
    problem: str = ""
    """Why no row is read, in a clause; empty where one is."""


def format_choices(
    path: Path, source: Source, formats: Sequence[str], preferences: str
) -> tuple[FormatChoice, ...]:
    """Try the first rows of a file in each of ``formats``, which are in the order of the choices.

    ``preferences`` is the recipe's ``data.preferences``. Raises ``UserError`` if the file cannot be read.
    """
    first = first_rows(path, SNIFFED_ROWS)
    return tuple(_choice(first, str(path), format_, source, preferences) for format_ in formats)


def _choice(first: Sequence[Row], name: str, format_: str, source: Source, preferences: str) -> FormatChoice:
    readable = [row for row in first if not row.error]
    try:
        layout = detect(readable, name, format_, source.columns, preferences).layout
    except UserError as problem:
        return FormatChoice(format_, len(first), problem=_reason(problem, format_))
    conversations = [one for row in first if (one := _conversation(row, layout)) is not None]
    return FormatChoice(
        format_,
        len(first),
        read=len(conversations),
        example=_example(conversations[0]) if conversations else "",
        detected=layout.format if format_ == AUTO else "",
        problem="" if conversations else "none of the rows is complete",
    )


def _conversation(row: Row, layout: RowFormat) -> Conversation | None:
    try:
        return parse(row, layout)
    except RowRejectedError:
        return None


def _reason(problem: UserError, format_: str) -> str:
    if problem.code == NOT_IN_FORMAT:
        return f"needs {' and '.join(PARTS[format_])}"
    return uncapitalize(problem.title)


def _example(conversation: Conversation) -> str:
    if conversation.text:
        return shorten(" ".join(conversation.text.split()))
    turns = [message for message in conversation.messages if message.role != "system"]
    return " → ".join(shorten(" ".join(message.content.split())) for message in turns[:2])
