"""Detection of the role of each column, by its name or its values. Used by ``formats``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_tui.data import preferences
from qlora_tui.data.chat_formats import EXCHANGES, are_alternate, count_texts, decoded, turn_keys

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "preference": preferences.PARTS,
    "messages": {
        "messages": (
            *("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "contents"),
        )
    },
    "sharegpt": {
        "messages": (
            *("conversations", "conversation", "messages", "items", "dialog", "dialogue", "dialogs", "turns"),
            "data",
        )
    },
    "alpaca": {
        "instruction": ("instruction", "definition"),
        "output": ("output", "response", "answer", "completion", "targets"),
    },
    "prompt-completion": {
        "prompt": ("prompt", "input"),
        "completion": ("completion", "response", "output", "answer", "target", "generation"),
    },
    "question-answer": {
        "question": ("question", "query", "problem", "q", "question_stem"),
        "answer": (
            *("answer", "answers", "response", "solution", "a", "output", "completion", "answerkey"),
            "correct_answer",
        ),
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
"""Parts that each format needs, with their usual column names, likeliest first."""

OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "preference": preferences.OPTIONAL,
    "messages": {"system": ("system", "system_prompt"), "tools": ("tools", "functions")},
    "sharegpt": {"system": ("system", "system_prompt"), "tools": ("tools", "functions")},
    "alpaca": {
        "input": ("input", "context", "inputs"),
        "system": ("system", "system_prompt"),
        "history": ("history",),
    },
    "prompt-completion": {
        "system": ("system", "system_prompt"),
        "tools": ("tools",),
        "history": ("history",),
    },
    "question-answer": {
        "context": ("context", "passage", "article"),
        "choices": ("choices", "options"),
        "history": ("history",),
        "system": ("system", "system_prompt"),
        "tools": ("tools", "functions"),
    },
    "label": {"system": ("system", "system_prompt")},
    "text": {},
}
_PAIRS = (
    *(("article", "highlights"), ("article", "summary"), ("dialogue", "summary"), ("document", "summary")),
    *(("text", "summary"), ("text", "code"), ("src", "tgt"), ("prompt", "canonical_solution")),
    *(("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "bot")),
    *(("message_1", "message_2"), ("inputs", "targets")),
    ("source", "target"),
)
"""Columns that mean prompt and completion only as a pair."""
_NAMES_NO_SOURCE = ("prompt", "question", "text")
"""Next to one of these columns ``source`` is the origin of the row, not a text."""
_ALTERNATING_COLUMNS = ("conversations", "conversation", "messages", "dialogs", "dialog", "dialogue", "data")
"""Columns whose plain texts alternate between user and assistant."""
_PROSE = ("text", "instruction", "prompt", "question")
"""Parts that are texts, or typed parts of text, and never an object."""
_ANSWERS = ("output", "completion")
"""Parts that are one answer, as a text or turns, and never a list of alternative answers."""
_PAIRED = frozenset(
    name
    for format_ in ("alpaca", "prompt-completion", "question-answer")
    for names in PARTS[format_].values()
    for name in names
)
"""Columns that hold the last question or its answer, next to a history."""
_HALVES = ("prompt", "completion", "history", *preferences.CHOSEN, *preferences.REJECTED)
"""Columns that may hold turns, but only half of a conversation, or one side of a comparison."""


def detect_columns(
    format_: str, values: list[dict[str, Any]], mapping: Mapping[str, str], by_hand: bool
) -> dict[str, str] | None:
    """Return the column of each part where most rows have all that a format needs, else None.

    A format chosen ``by_hand`` accepts turns of either spelling.
    """
    if format_ == "preference":
        columns = preferences.preference_columns(values, mapping)
        return columns if "chosen" in columns else None
    detected = _named(format_, values, mapping, by_hand)
    if mapping or (by_hand and detected is not None):
        return detected
    if format_ == "sharegpt" and detected is not None and _texts_in_turn(values, detected["messages"]):
        others = ("alpaca", "prompt-completion", "question-answer")
        return None if any(_named(other, values, {}, False) for other in others) else detected
    if format_ != "prompt-completion" or detected is not None:
        return detected
    pair = _pair_of(values)
    if pair is None or not (by_hand or _named("question-answer", values, {}, False) is None):
        return None
    return dict(zip(PARTS[format_], pair, strict=True)) | _optional(format_, values, {}, pair)


def _named(
    format_: str, values: list[dict[str, Any]], mapping: Mapping[str, str], by_hand: bool
) -> dict[str, str] | None:
    """Return the column of each part, without columns that have a meaning only as a pair."""
    columns: dict[str, str] = {}
    for part, names in PARTS[format_].items():
        column = mapping.get(part) or _pick(format_, part, names, values, columns.values(), by_hand)
        if not column:
            return None
        columns[part] = column
    return columns | _optional(format_, values, mapping, columns.values())


def _optional(
    format_: str, values: list[dict[str, Any]], mapping: Mapping[str, str], taken: Iterable[str]
) -> dict[str, str]:
    columns: dict[str, str] = {}
    spelled = {c.lower(): c for v in values for c in v}
    for part, names in OPTIONAL[format_].items():
        column = mapping.get(part) or next((spelled[n] for n in names if n in spelled), "")
        if column and column not in (*taken, *columns.values()):
            columns[part] = column
    return columns


def _pair_of(values: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Return two columns that form a prompt and completion pair in at least half of the rows."""
    spelled = {c.lower(): c for v in values for c in v}
    for one, other in _PAIRS:
        if one == "source" and any(name in spelled for name in _NAMES_NO_SOURCE):
            continue
        if one in spelled and other in spelled:
            pair = spelled[one], spelled[other]
            # A list of completions is one of the pair too: its rows are refused, not read as plain text.
            having = sum(
                isinstance(v.get(pair[0]), str) and isinstance(v.get(pair[1]), str | list) for v in values
            )
            if 2 * having >= max(1, len(values)):
                return pair
    return None


def _pick(
    format_: str,
    part: str,
    names: tuple[str, ...],
    values: list[dict[str, Any]],
    taken: Iterable[str],
    by_hand: bool,
) -> str:
    """Return the column that holds a part in at least half of the rows."""
    taken = set(taken)
    spelled = {c.lower(): c for v in values for c in v}
    candidates = [spelled[n] for n in names if n in spelled]
    named = set(candidates) if part == "messages" else set()
    if part == "messages":
        candidates += [c for c in spelled.values() if c not in candidates and c.lower() not in _HALVES]
        if "completion" in spelled and "prompt" not in spelled:  # then this column is the whole conversation
            candidates.append(spelled["completion"])
        if "history" in spelled and not spelled.keys() & _PAIRED:
            candidates.append(spelled["history"])
        kinds: tuple[str, ...] = ("messages", "sharegpt") if by_hand else (format_,)
    elif part in ("prompt", "completion"):
        kinds = ("", "messages", "sharegpt")
    else:
        kinds = ("",)
    for column in candidates:
        fitting = sum(
            column in v
            and _turn_format(v[column], column, column in named) in kinds
            and (part != "label" or _is_label(v[column]))
            and (part not in _PROSE or not _is_object(v[column]))
            and (part not in _ANSWERS or turn_keys(v[column]) is not None or count_texts(v[column]) < 2)
            for v in values
        )
        if column not in taken and 2 * fitting >= max(1, len(values)):
            return column
    return ""


def _is_object(value: Any) -> bool:
    """Return whether ``value`` is an object, or a list of objects that are neither turns nor typed parts."""
    value = decoded(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return not turn_keys(value) and "type" not in value[0] and "text" not in value[0]
    return isinstance(value, dict)


def _is_label(value: Any) -> bool:
    """Return whether ``value`` is a label or a list of labels rather than a list of objects."""
    return not any(isinstance(one, dict | list) for one in (value if isinstance(value, list) else [value]))


def _texts_in_turn(values: list[dict[str, Any]], column: str) -> bool:
    return 2 * sum(are_alternate(v.get(column)) for v in values) >= max(1, len(values))


def _turn_format(value: Any, column: str, named: bool) -> str:
    """Return ``messages`` or ``sharegpt`` for a list of turns, else empty.

    A list of texts or of question and answer pairs counts only in a column ``named`` like a conversation.
    """
    keys = turn_keys(value)
    if keys is None:
        in_turn = named and column.lower() in _ALTERNATING_COLUMNS and are_alternate(value)
        return "sharegpt" if in_turn else ""
    if keys in EXCHANGES:
        return "sharegpt" if named else ""
    return "messages" if keys[0] == "role" and keys[1] != "value" else "sharegpt"
