"""Preference data, whose rows have a chosen and a rejected answer, or an answer rated good or bad.

``data.preferences`` selects the treatment: ``refuse`` stops with the reason, ``chosen`` trains only on the
chosen or good answers, and a preference method trains on both kinds. ``preferred`` and ``compared`` build the
conversations that end with the chosen or a rejected answer of a row. Used by ``formats``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgspec

from qlora_tui.data.chat_formats import (
    CONTENT_KEYS,
    NAMES,
    Columns,
    decoded,
    history_of,
    messages_of,
    text_of,
    tools_of,
    turn_keys,
    with_system,
)
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.errors import UserError
from qlora_tui.recipe.preference_methods import PAIR_METHODS, PREFERENCE_METHODS

CHOSEN, REJECTED = NAMES.chosen, NAMES.rejected
PARTS = {"chosen": (*CHOSEN, *NAMES.better), "rejected": REJECTED}
OPTIONAL = NAMES.formats["preference"].optional

RATING = "rating"
"""A part that each format in ``RATABLE`` may have: the column that rates the answer as good or bad."""
_RATED = (*NAMES.always_ratings, *NAMES.ratings)
RATABLE = tuple(name for name, format_ in NAMES.formats.items() if format_.is_ratable)
"""Conversation formats whose rows may have a column that rates the answer good or bad."""

PAIRS = "preference-pairs"
"""Error code for rows that compare answers; a preference method for pairs, such as DPO, resolves it."""
RATED = "rated-answers"
"""Error code for rows that rate answers; ``data.preferences = "kto"`` resolves it."""
NOTHING_COMPARED = "nothing-compared"
"""Error code for a preference method on data without preferences."""
UNMAPPED_SIDES = "unmapped-sides"
"""Error code for pairs whose columns must be mapped by hand."""
_PAIRS_TITLE = "Preference data"
_RATED_TITLE = "Rated answers"


def preference_columns(columns: Columns, mapping: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each part in preference rows; empty if no row has a rejected side.

    ``chosen`` is missing if the rejected side has no counterpart.
    """
    parts: dict[str, str] = {}
    for part, names in {"rejected": REJECTED, "chosen": PARTS["chosen"], **OPTIONAL}.items():
        candidates = (columns.spelled[name] for name in names if name in columns.spelled)
        column = mapping.get(part) or next(
            (
                candidate
                for candidate in candidates
                if candidate not in parts.values()
                and any(_is_answer(value.get(candidate)) for value in columns.values)
            ),
            "",
        )
        if column:
            parts[part] = column
        elif part == "rejected":
            return {}
    return parts


def rejected_column(fields: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Return the column with a row's rejected answer or bad rating; empty if there is none.

    Checks rows of files whose first rows have no such column; ``known`` columns are skipped.
    """
    for column, name in _suspect_columns(tuple(fields)):
        value = fields[column]
        if name in REJECTED:
            is_bad = _is_answer(value)
        else:
            is_bad = is_good(value) is False if name in NAMES.always_ratings else value is False
        if is_bad and column not in known:
            return column
    return ""


@lru_cache(maxsize=1024)
def _suspect_columns(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (column, lowercase name) for each column whose name suggests a rejected answer or a rating.

    Cached, because this runs for every row and most rows have the same columns.
    """
    names = [(column, str(column).lower()) for column in columns]
    return tuple((column, name) for column, name in names if name in (*REJECTED, *_RATED))


def _rating_column(columns: Columns, taken: Iterable[str], *, numbers: bool) -> tuple[str, int, int]:
    """Return the column that rates the answers of most rows, with the counts of good and bad rows.

    Ratings are true and false; with ``numbers`` also 1 and 0, or 1 and -1. Empty if there is no such column.
    A grade from 1 to 5 or a class is not a rating, unless the column's name marks it as one (``kto_tag``).
    """
    for name in (*_RATED, *NAMES.scores):
        column = columns.spelled.get(name, "")
        if not column or column in taken:
            continue
        given_ratings = [value[column] for value in columns.values if value.get(column) is not None]
        ratings = [is_good(one) for one in given_ratings]
        if given_ratings and name in NAMES.always_ratings:
            return column, ratings.count(True), ratings.count(False)
        flags = [
            isinstance(one, bool) or str(one).strip().lower() in ("true", "false") for one in given_ratings
        ]
        if not given_ratings or not (all(flags) or numbers) or 2 * len(given_ratings) < len(columns.values):
            continue
        if None not in ratings:
            return column, ratings.count(True), ratings.count(False)
    return "", 0, 0


def is_good(rating: Any) -> bool | None:
    """Return whether a rating is good; None if the value is not a rating."""
    word = str(rating).strip().lower()
    return True if word in NAMES.good else False if word in NAMES.bad else None


def sides_problem(
    name: str, sides: Mapping[str, str], columns: Columns, preference_choice: str
) -> UserError | None:
    """Return why rows that compare answers are not used: no opt-in, or an unknown side or prompt."""
    rejected, values = sides["rejected"], columns.values
    if "chosen" not in sides:
        return UserError(
            _PAIRS_TITLE + " without a chosen side",
            what=f"{name} has rejected answers in {rejected!r}, but no column with chosen ones.",
            why="Rejected answers are never trained on.",
            fix='Specify the column that contains the better answers: columns = { chosen = "…", '
            f'rejected = "{rejected}" }}, or choose another file.',
            code=UNMAPPED_SIDES,
        )
    chosen = sides["chosen"]
    if preference_choice == "refuse":
        having = sum(_is_answer(value.get(rejected)) for value in values)
        return UserError(
            _PAIRS_TITLE,
            what=f"{name} compares answers: {chosen!r} is preferred to {rejected!r} in {having} of "
            f"the first {len(values)} rows.",
            why="You must choose how to use the pairs; otherwise, the rejected answers would be ignored.",
            fix='To learn from both sides, set data.preferences = "orpo" (or "dpo", "simpo"). '
            f"{_choice('chosen')}",
            code=PAIRS,
        )
    if not _without_prompt(values, sides):
        return None
    texts = (
        c for c in columns.names if c not in sides.values() and any(isinstance(v.get(c), str) for v in values)
    )
    example = next(texts, "…")
    return UserError(
        f"{_PAIRS_TITLE} without a prompt",
        what=f"{name} has answers in {chosen!r} and {rejected!r}, but no column with the question.",
        why=f"The columns are {', '.join(columns.names)}.",
        fix=f'Specify the column that contains the question: columns = {{ prompt = "{example}", '
        f'chosen = "{chosen}", rejected = "{rejected}" }}.',
        code=UNMAPPED_SIDES,
    )


def ratings_problem(
    name: str, ratings: tuple[str, int, int] | None, preference_choice: str
) -> UserError | None:
    """Return why answers are not used for training; None if they are.

    Rated answers are not used without opt-in, or by a method for pairs. Answers without ratings are not used
    by any preference method.
    """
    if ratings is not None and preference_choice == "refuse":
        column, good, bad = ratings
        return UserError(
            _RATED_TITLE,
            what=f"{name} rates its answers: of the first {good + bad} rows, {column!r} calls {good} good "
            f"and {bad} bad.",
            why="You must choose how to use the ratings; otherwise, they would be ignored.",
            fix='To learn from both kinds, set data.preferences = "kto". '
            f"{_choice('good')} If {column!r} means something else, rename or remove that column.",
            code=RATED,
        )
    if ratings is not None and preference_choice in PAIR_METHODS:
        return UserError(
            _RATED_TITLE,
            what=f'{name} rates its answers, and data.preferences = "{preference_choice}" compares two '
            "answers to one prompt.",
            fix='To learn from ratings, set data.preferences = "kto". ' + _choice("good"),
            code=RATED,
        )
    if ratings is not None or preference_choice not in PREFERENCE_METHODS:
        return None
    needs = "a chosen and a rejected answer in each row"
    if preference_choice == "kto":
        needs = "rated answers or pairs"
    return UserError(
        "No preferences in the data",
        what=f'data.preferences = "{preference_choice}" needs {needs}, and {name} has neither a rejected '
        "side nor ratings.",
        why="The file does not say which answers are better.",
        fix='Choose a file with preferences, name its columns, or set data.preferences = "refuse" to train '
        "on the answers as they are.",
        code=NOTHING_COMPARED,
    )


def _choice(which: str) -> str:
    return (
        f'To train on the {which} answers only, set data.preferences = "chosen" '
        "(on the command line: --set data.preferences=chosen)."
    )


def _without_prompt(values: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Return whether most rows have two bare answers without a prompt.

    Texts with a common beginning contain the prompt (TRL's implicit prompt).
    """
    if any(part in columns for part in ("prompt", "messages", "history")):
        return False
    bare = 0
    for value in values:
        chosen, rejected = (value.get(columns[part]) for part in ("chosen", "rejected"))
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            bare += is_turn(chosen)
            continue
        if dialogue(chosen) is None and not turn_keys(chosen):
            bare += chosen.split()[:1] != rejected.split()[:1]
    return 2 * bare > len(values)


def compared_columns(mapping: Mapping[str, str], columns: Columns, name: str, wanted: str) -> dict[str, str]:
    """Return the column of each part in preference rows.

    Empty if there are no preferences, or if the user's mapping already uses the chosen side as the answer.
    """
    own = {part: column for part, column in mapping.items() if part in (*PARTS, *OPTIONAL)}
    sides = own.keys() & PARTS.keys()
    compared = preference_columns(columns, own if sides else {})
    for part, column in mapping.items():
        if part != "rejected" and column.lower() in REJECTED:
            raise UserError(
                "Rejected answers as training data",
                what=f"columns.{part} for {name} names {column!r}, the rejected side of a comparison.",
                why="Rejected answers are never trained on.",
                fix="Name the chosen side, or remove the setting `columns`.",
            )
    by_hand = any(column.lower() in CHOSEN for column in mapping.values())
    if not compared or (by_hand and not sides and wanted != "preference"):
        return {}
    if mapping and not sides and not mapping.keys() <= own.keys():
        raise UserError(
            _PAIRS_TITLE,
            what=f"{name} compares answers, but the setting `columns` names parts of another format: "
            f"{', '.join(mapping)}.",
            why=f"{compared['rejected']!r} contains rejected answers.",
            fix='Name the sides, as in columns = { chosen = "…", rejected = "…" }, or remove that setting.',
            code=UNMAPPED_SIDES,
        )
    return compared | own


def rating_of(
    format_: str, columns: Columns, parts: Mapping[str, str], by_hand: str
) -> tuple[str, int, int] | None:
    """Return the column that rates the answers, with the counts of good and bad answers in the first rows.

    None if there is no such column.
    """
    if format_ not in RATABLE:
        return None
    if by_hand:
        ratings = [is_good(value.get(by_hand)) for value in columns.values]
        return by_hand, ratings.count(True), ratings.count(False)
    column, good, bad = _rating_column(
        columns, parts.values(), numbers=NAMES.formats[format_].is_rated_by_numbers
    )
    if not column or ("messages" in parts and not _are_answered(columns.values, parts["messages"])):
        return None
    return column, good, bad


def _are_answered(values: list[dict[str, Any]], column: str) -> bool:
    """Return whether most lists of turns contain an answer. If they do not, a label next to them is a class,
    and not a rating of an answer.
    """
    answered = 0
    for value in values:
        with suppress(RowRejectedError):
            answered += any(m.role == "assistant" for m in messages_of(value.get(column)))
    return 2 * answered >= max(1, len(values))


def _is_answer(value: Any) -> bool:
    """Return whether a cell can be an answer or a conversation, rather than a flag or a number."""
    return bool(value) and isinstance(value, str | list | dict)


_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]?")


def preferred(cells: Mapping[str, Any], source: int, row: int) -> Conversation:
    """Return the conversation that ends with the chosen answer. Raises ``RowRejectedError``.

    Turns that both sides share are the prompt, which is outside the loss. A side may be a whole conversation,
    only the answer, as turns or text, or a dialogue in one text as in Anthropic's data sets.
    """
    conversation, _ = _sides(cells, source, row)
    return conversation


def compared(cells: Mapping[str, Any], source: int, row: int) -> Conversation:
    """Return the conversation that ends with the chosen answer, with its alternatives in ``rejected``.

    Raises ``RowRejectedError``, also if a rejected answer is empty.
    """
    conversation, rejected = _sides(cells, source, row)
    if not rejected:
        raise RowRejectedError("empty-row", "The rejected answer is empty.")
    if not conversation.messages:
        texts = [side[-1].content for side in rejected]
        others = tuple(Conversation((), text=text, source=source, row=row) for text in texts)
        return msgspec.structs.replace(conversation, rejected=others)
    if not all(map(_has_answer, rejected)):
        raise RowRejectedError("empty-row", "The rejected answer is empty.")
    others = tuple(
        msgspec.structs.replace(
            conversation, messages=_trained_from(side, _shared(conversation.messages, side))
        )
        for side in rejected
    )
    return msgspec.structs.replace(conversation, rejected=others)


def rated(conversation: Conversation, *, is_good: bool) -> Conversation:
    """Return a conversation with a rating for its last answer; earlier turns are the prompt.

    Raises ``RowRejectedError`` if the conversation has no prompt or does not end with an answer.
    """
    messages = conversation.messages
    start = len(_before_answer(messages))
    if start == len(messages) or not start:
        raise RowRejectedError("no-answer", "A rating needs a prompt, and an answer after it.")
    return msgspec.structs.replace(conversation, messages=_trained_from(messages, start), rated_good=is_good)


def _sides(cells: Mapping[str, Any], source: int, row: int) -> tuple[Conversation, list[tuple[Message, ...]]]:
    """Return the conversation with the chosen answer and, for each rejected answer, its turns."""
    prompt, tools = _question(cells)
    chosen = _side(cells.get("chosen"), prompt, "chosen")
    if not _has_answer(chosen):
        raise RowRejectedError("empty-row", "The chosen answer is empty.")
    turns = _before_answer(chosen) if chosen[0].role != "assistant" else prompt
    rejected = [_side(one, turns, "rejected") for one in _alternatives(cells.get("rejected"))]
    if any(_same(chosen, one) for one in rejected):
        raise RowRejectedError("same-answers", "The chosen and the rejected answer are the same.")
    if not any(m.role == "user" for m in chosen):
        if len(chosen) > 1 or cells.keys() & {"prompt", "messages", "history"}:
            raise RowRejectedError("empty-row", "The prompt is empty.")
        return Conversation((), text=chosen[0].content, source=source, row=row), rejected
    shared = min((_shared(chosen, one) for one in rejected), default=len(_before_answer(chosen)))
    return Conversation(_trained_from(chosen, shared), tools, source=source, row=row), rejected


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(m.content.strip() or m.tool_calls for m in messages if m.role == "assistant")


def _trained_from(messages: Sequence[Message], first: int) -> tuple[Message, ...]:
    """Return ``messages`` with the turns before index ``first`` excluded from the loss."""
    return tuple(
        msgspec.structs.replace(m, train=m.train and number >= first) for number, m in enumerate(messages)
    )


def _question(cells: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """Return the turns before the answer, and the tools."""
    prompt, tools = decoded(cells.get("prompt")), tools_of(cells.get("tools"))
    if isinstance(prompt, dict) and "messages" in prompt:  # OpenAI's format
        tools = tools_of(prompt.get("tools")) or tools
        prompt = prompt["messages"]
    given = text_of(cells.get("input"), "the input") if "input" in cells else ""
    messages: tuple[Message, ...]
    if turn_keys(prompt):
        messages = messages_of(prompt)
    elif prompt is not None and text_of(prompt, "the prompt").strip():
        text = text_of(prompt, "the prompt")
        together = f"{text}\n\n{given}" if given.strip() else text
        messages = dialogue(text) or (Message("user", together),)
    elif cells.get("messages"):
        messages = _before_answer(messages_of(cells["messages"]))
    else:
        messages = ()
    return with_system(cells, (*history_of(cells.get("history")), *messages)), tools


def _alternatives(value: Any) -> list[Any]:
    """Return the rejected side as a list: one item, or several texts."""
    value = decoded(value)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    return [value] if value else []


def _side(value: Any, prompt: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Return the whole conversation of one side."""
    value = decoded(value)
    if is_turn(value):
        value = [value]
    elif isinstance(value, dict):
        value = next((value[key] for key in CONTENT_KEYS if isinstance(value.get(key), str)), value)
    if turn_keys(value):
        messages = messages_of(value)
        if messages and messages[0].role not in ("assistant", "tool"):
            system = prompt[:1] if prompt and prompt[0].role == "system" else ()
            return (*system, *messages) if messages[0].role != "system" else messages
        return (*prompt, *messages)
    text = text_of(value, f"the {name} answer")
    return dialogue(text) or (*prompt, Message("assistant", text))


def dialogue(text: str) -> tuple[Message, ...] | None:
    """Parse a text that begins with ``Human:``, as in Anthropic's data sets; None for any other text."""
    pieces = _SPEAKER.split(text)
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        return None
    turns = [
        Message("user" if name == "Human" else "assistant", content.strip())
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()
    return tuple(turns)


def _before_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns up to the last one that is not the assistant's."""
    end = len(messages)
    while end and messages[end - 1].role == "assistant":
        end -= 1
    return messages[:end]


def _said(message: Message) -> tuple[object, ...]:
    return message.role, message.content.strip(), message.reasoning.strip(), message.tool_calls


def _same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    return [_said(m) for m in one] == [_said(m) for m in other]


def _shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Count the turns at the beginning that both sides share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if _said(a) != _said(b)), min(len(one), len(other)))


def is_turn(value: Any) -> bool:
    return isinstance(value, dict) and turn_keys([value]) is not None
