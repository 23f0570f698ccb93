"""Which format the rows of a file are in, with the evidence, and conversations from them.

``detect`` looks at the first rows; ``parse`` turns one row into a ``Conversation``. Used by
``dataset`` and ``inspect``.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from qlora_tui.data import pair_formats
from qlora_tui.data.chat_formats import messages_of, text_of, tools_of, turn_keys
from qlora_tui.data.conversation import Conversation, Message, RowRefused
from qlora_tui.data.row import Row
from qlora_tui.errors import Problem

SNIFFED_ROWS = 200

_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {
        "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
    },
    "sharegpt": {"messages": ("conversations", "conversation", "messages", "items")},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response", "answer", "completion")},
    "prompt-completion": {
        "prompt": ("prompt", "input", "source"),
        "completion": ("completion", "response", "output", "answer", "target", "chosen"),
    },
    "question-answer": {
        "question": ("question", "query", "problem", "q"),
        "answer": ("answer", "answers", "response", "solution", "a", "output"),
    },
    "label": {
        "text": ("text", "sentence", "review", "content", "comment", "tweet", "document", "title", "input"),
        "label": (
            "label_text",
            "label_name",
            "label",
            "labels",
            "sentiment",
            "category",
            "class",
            "emotion",
            "intent",
            "target",
        ),
    },
    "text": {"text": ("text", "content", "document", "body")},
}
"""What each format needs, and the column names it is known by, likeliest first."""

_OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"system": ("system", "system_prompt"), "tools": ("tools", "functions")},
    "sharegpt": {"system": ("system", "system_prompt"), "tools": ("tools", "functions")},
    "alpaca": {"input": ("input", "context"), "system": ("system", "system_prompt"), "history": ("history",)},
    "prompt-completion": {"system": ("system", "system_prompt"), "tools": ("tools",)},
    "question-answer": {"context": ("context", "passage"), "system": ("system", "system_prompt")},
    "label": {"system": ("system", "system_prompt")},
    "text": {},
}
_HALVES = ("prompt", "completion", "chosen", "rejected")
"""Columns that may hold turns, but only half of a conversation."""
LABEL_NAMES = "label_names"
"""A part that is no column: the names of integer labels in order, with commas between."""


class Layout(Struct, frozen=True):
    """How to read the rows of one source."""

    format: str
    columns: dict[str, str]
    """Column by part."""
    label_names: tuple[str, ...] = ()


class Detection(Struct, frozen=True):
    """A layout, and what speaks for it."""

    layout: Layout
    evidence: tuple[str, ...]
    """Sentences for the Data screen."""
    columns: tuple[str, ...]
    """Every column seen, in order."""


def parts_of(format_: str) -> tuple[str, ...]:
    """The parts a format has, those it needs first: what ``Source.columns`` may map."""
    parts = (*_PARTS[format_], *_OPTIONAL[format_])
    return (*parts, LABEL_NAMES) if format_ == "label" else parts


def detect(
    rows: Iterable[Row], name: str, wanted: str = "auto", mapping: Mapping[str, str] | None = None
) -> Detection:
    """The layout of the first rows of ``name``.

    ``wanted`` and ``mapping`` are the recipe's format and columns. Raises ``Problem`` if nothing
    fits, naming what was found.
    """
    values = [_as_fields(row.value) for row in rows if not row.error]
    seen = Counter(column for value in values for column in value)
    columns = tuple(seen)
    mapping = dict(mapping or {})
    _check_mapping(mapping, wanted, columns, name)
    names = tuple(n.strip() for n in mapping.pop(LABEL_NAMES, "").split(",") if n.strip())
    for format_ in [wanted] if wanted != "auto" else _PARTS:
        if wanted == "auto" and not mapping.keys() <= {*_PARTS[format_], *_OPTIONAL[format_]}:
            continue
        found = _columns(format_, values, mapping, by_hand=wanted != "auto")
        if found is None or (wanted == "auto" and mapping and not mapping.keys() & _PARTS[format_].keys()):
            continue
        layout = Layout(format_, found, names)
        return Detection(layout, tuple(_evidence(layout, values, wanted)), columns)
    raise _nothing_fits(name, wanted, columns, values)


def parse(row: Row, layout: Layout, source: int = 0) -> Conversation:
    """The conversation of one row. Raises ``RowRefused`` with kind and reason."""
    if row.error:
        raise RowRefused(row.kind, row.error)
    fields = _as_fields(row.value)
    if not fields:
        what = "is empty" if row.value in ({}, [], "", None) else f"is a {type(row.value).__name__}"
        raise RowRefused("bad-row", f"Row {row.number} {what}.")
    cells = {part: fields.get(column) for part, column in layout.columns.items()}
    missing = [p for p in _PARTS[layout.format] if layout.columns.get(p) not in fields]
    if missing:
        raise RowRefused("wrong-format", f"The row has no {layout.columns.get(missing[0], missing[0])!r}.")
    if layout.format == "text":
        text = text_of(cells["text"], "the text")
        if not text.strip():
            raise RowRefused("empty-row", "The text is empty.")
        return Conversation((), text=text, source=source, row=row.number)
    messages = _READERS[layout.format](cells, layout)
    if not any(_says_something(m) for m in messages):
        raise RowRefused("empty-row", "The conversation is empty.")
    answers = [m for m in messages if m.role == "assistant"]
    if answers and not any(_says_something(m) for m in answers):
        raise RowRefused("empty-row", "The answer is empty.")
    return Conversation(messages, tools_of(cells.get("tools")), source=source, row=row.number)


def _says_something(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls or message.reasoning.strip())


def _chat(cells: Mapping[str, Any], layout: Layout) -> tuple[Message, ...]:
    messages = messages_of(cells["messages"])
    system = text_of(cells.get("system"), "the system prompt")
    if system.strip() and not (messages and messages[0].role == "system"):
        return (Message("system", system), *messages)
    return messages


_READERS: dict[str, Callable[[Mapping[str, Any], Layout], tuple[Message, ...]]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": lambda cells, layout: pair_formats.alpaca(cells),
    "prompt-completion": lambda cells, layout: pair_formats.prompt_completion(cells),
    "question-answer": lambda cells, layout: pair_formats.question_answer(cells),
    "label": lambda cells, layout: pair_formats.label(cells, layout.label_names),
}


def _as_fields(value: Any) -> dict[str, Any]:
    """A row as fields: a bare list of turns is ``messages``, a bare string is ``text``."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and turn_keys(value):
        return {"messages": value}
    return {}


def _columns(
    format_: str, values: list[dict[str, Any]], mapping: Mapping[str, str], by_hand: bool
) -> dict[str, str] | None:
    """Column by part where most rows have all a format needs, else None.

    A format chosen ``by_hand`` takes turns of either spelling.
    """
    found: dict[str, str] = {}
    for part, names in _PARTS[format_].items():
        column = mapping.get(part) or _pick(format_, part, names, values, found.values(), by_hand)
        if not column:
            return None
        found[part] = column
    for part, names in _OPTIONAL[format_].items():
        column = mapping.get(part) or next((n for v in values for n in names if n in v), "")
        if column and column not in found.values():
            found[part] = column
    return found


def _pick(
    format_: str,
    part: str,
    names: tuple[str, ...],
    values: list[dict[str, Any]],
    taken: Iterable[str],
    by_hand: bool,
) -> str:
    """The column that plays a part in at least half of the rows."""
    taken = set(taken)
    spelled = {c.lower(): c for v in values for c in v}
    candidates = [spelled[n] for n in names if n in spelled]
    if part == "messages":
        candidates += [c for c in spelled.values() if c not in candidates and c.lower() not in _HALVES]
        kinds: tuple[str, ...] = ("messages", "sharegpt") if by_hand else (format_,)
    elif part in ("prompt", "completion"):
        kinds = ("", "messages", "sharegpt")
    else:
        kinds = ("",)
    for column in candidates:
        fitting = sum(column in v and _turn_format(v[column]) in kinds for v in values)
        if column not in taken and 2 * fitting >= max(1, len(values)):
            return column
    return ""


def _turn_format(value: Any) -> str:
    """``messages`` or ``sharegpt`` for a list of turns, else empty."""
    keys = turn_keys(value)
    if keys is None:
        return ""
    return "messages" if keys[0] == "role" and keys[1] != "value" else "sharegpt"


def _evidence(layout: Layout, values: list[dict[str, Any]], wanted: str) -> Iterable[str]:
    if wanted != "auto":
        yield "format set by hand"
    for part in _PARTS[layout.format]:
        column = layout.columns[part]
        having = sum(column in v for v in values)
        what = ""
        if part == "messages":
            keys = Counter(turn_keys(v.get(column)) for v in values).most_common(1)
            if keys and keys[0][0]:
                what = f" holds turns with {keys[0][0][0]!r} and {keys[0][0][1]!r}"
        name = (
            f"column {column!r}" if column == part or part == "messages" else f"column {column!r} as {part}"
        )
        yield f"{name}{what} in {having} of {len(values)} rows"
    for part in _OPTIONAL[layout.format]:
        if part in layout.columns:
            yield f"column {layout.columns[part]!r} as {part}"
    used = set(layout.columns.values())
    unused = sorted({c for v in values for c in v} - used)
    if unused:
        yield f"not used: {', '.join(unused)}"
    if layout.format == "label" and not layout.label_names and values:
        numbers = all(isinstance(v.get(layout.columns["label"]), int) for v in values)
        if numbers:
            yield f"labels are numbers without names: set columns.{LABEL_NAMES} to name them"


def _check_mapping(mapping: Mapping[str, str], wanted: str, columns: tuple[str, ...], name: str) -> None:
    formats = [wanted] if wanted != "auto" else list(_PARTS)
    known = list(dict.fromkeys(part for f in formats for part in parts_of(f)))
    for part, column in mapping.items():
        if part not in known:
            raise Problem(
                "Unknown part",
                what=f"columns.{part} for {name} is no part of the format {wanted}.",
                why=f"Parts are {', '.join(known)}.",
                fix=_near(part, known),
            )
        if part != LABEL_NAMES and columns and column not in columns:
            raise Problem(
                "No such column",
                what=f"{name} has no column {column!r}, which columns.{part} names.",
                why=f"Its columns are {', '.join(columns)}.",
                fix=_near(column, columns),
            )


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"Did you mean {close[0]!r}?" if close else "Choose one of these."


def _nothing_fits(name: str, wanted: str, columns: tuple[str, ...], values: list[dict[str, Any]]) -> Problem:
    if not values:
        return Problem(
            "No rows",
            what=f"{name} has no row that can be read.",
            fix="Choose another file, or mend this one.",
        )
    what = f"in the columns {', '.join(columns)}" if columns else "in its rows, which are not objects"
    if wanted != "auto":
        needs = ", ".join(_PARTS[wanted])
        return Problem(
            "Not in that format",
            what=f"{name} is not in the format {wanted}: it lacks one of {needs}.",
            why=f"This was looked for {what}.",
            fix='Map the columns by hand, or let format = "auto" choose.',
        )
    return Problem(
        "No usable field",
        what=f"No known format fits {name}: nothing to learn from was found {what}.",
        why=f"Known are {', '.join(_PARTS)}.",
        fix='Say which column plays which part: columns = { prompt = "…", completion = "…" }.',
    )
