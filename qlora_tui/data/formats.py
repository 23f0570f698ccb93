"""Detects the format of a file's rows, with evidence, and converts rows to conversations.

``detect`` reads the first rows; ``parse`` turns one row into a ``Conversation``. Used by ``dataset`` and
``inspection``.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui.data import chat_formats, preferences
from qlora_tui.data.chat_formats import (
    NAMES,
    Cell,
    Columns,
    are_calls,
    decoded,
    json_text,
    messages_of,
    text_of,
    tools_of,
    turn_keys,
)
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, media_column, placeholder
from qlora_tui.data.decisions import decision_of
from qlora_tui.data.preferences import RATING, compared, preferred, rated
from qlora_tui.data.problems import CHECKS
from qlora_tui.data.repetition import words
from qlora_tui.data.row import Row
from qlora_tui.data.unsupported import compared_answers, mapping_hint, single_turns, without_text, written_out
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.preference_methods import PREFERENCE_METHODS

PARTS = {name: format_.required for name, format_ in NAMES.formats.items()} | {
    "preference": preferences.PARTS
}
"""Parts that each format requires, with their usual column names, the most likely first."""
OPTIONAL = {name: format_.optional for name, format_ in NAMES.formats.items()}
_NAMES_NO_SOURCE = ("prompt", "question", "text")
"""If one of these columns exists, ``source`` is the origin of the row and not a text."""
_ALTERNATING_COLUMNS = ("conversations", "conversation", "messages", "dialogs", "dialog", "dialogue", "data")
"""Columns whose plain texts alternate between user and assistant."""
_PROSE = ("text", "instruction", "prompt", "question")
"""Parts of a row that are text, as a string or as typed content, and never objects."""
_ANSWERS = ("output", "completion")
"""Parts that are one answer, as a text or turns, and never a list of alternative answers."""
_ANSWER_PARTS = ("label", "completion", "output", "answer")
"""Parts that a row without an answer lacks."""
_PAIRED = frozenset(
    name
    for format_ in ("alpaca", "prompt-completion", "question-answer")
    for names in PARTS[format_].values()
    for name in names
)
"""Names of columns that hold only the last question or its answer if another column holds the earlier turns.
"""
_PROSE_WORDS = 3
"""Minimum number of words of a text that is prose, rather than a name, a date or a number."""
_HALVES = ("prompt", "completion", "history", *preferences.CHOSEN, *preferences.REJECTED)
"""Columns that may hold turns, but only half of a conversation, or one side of a comparison."""


def detect_columns(
    format_: str, columns: Columns, mapping: Mapping[str, str], by_hand: bool
) -> dict[str, str] | None:
    """Return the column of each part if most rows have everything that a format requires, else None.

    A format chosen ``by_hand`` accepts turns with the keys of OpenAI or of ShareGPT.
    """
    if format_ == "preference":
        sides = preferences.preference_columns(columns, mapping)
        return sides if "chosen" in sides else None
    detected = _named(format_, columns, mapping, by_hand)
    if mapping or (by_hand and detected is not None):
        return detected
    if format_ == "decision" and detected is not None:
        labels = [value.get(detected["label"]) for value in columns.values]
        has_objects = any(isinstance(label, dict) for label in labels)
        if has_objects and not by_hand and decision_of(Counter(map(json_text, labels))) is None:
            return None
    if format_ == "sharegpt" and detected is not None:
        others = ("alpaca", "prompt-completion", "question-answer")
        if columns.mostly(detected["messages"], lambda cell: cell.turns == "texts") and any(
            _named(other, columns, {}, False) for other in others
        ):
            return None
    if format_ == "prompt-completion" and detected is None:
        pair = _pair_of(columns)
        if pair is not None and (by_hand or _named("question-answer", columns, {}, False) is None):
            return dict(zip(PARTS[format_], pair, strict=True)) | _optional(format_, columns, {}, pair)
    return detected


def _named(
    format_: str, columns: Columns, mapping: Mapping[str, str], by_hand: bool
) -> dict[str, str] | None:
    """Return the column of each part; None if a required part has no column.

    Names that have a meaning only as a pair are left to :func:`_pair_of`.
    """
    parts: dict[str, str] = {}
    for part in PARTS[format_]:
        column = mapping.get(part) or _pick(format_, part, columns, parts.values(), by_hand)
        if not column and (format_, part) == ("decision", "text"):
            column = _only_prose(columns)
        if not column:
            return None
        parts[part] = column
    return parts | _optional(format_, columns, mapping, parts.values())


def _optional(
    format_: str, columns: Columns, mapping: Mapping[str, str], taken: Iterable[str]
) -> dict[str, str]:
    parts: dict[str, str] = {}
    for part, names in OPTIONAL[format_].items():
        column = mapping.get(part) or columns.first(names)
        if column and column not in (*taken, *parts.values()):
            parts[part] = column
    return parts


def _pair_of(columns: Columns) -> tuple[str, str] | None:
    """Return two columns that form a prompt and completion pair in at least half of the rows."""
    spelled, values = columns.spelled, columns.values
    for one, other in NAMES.pairs:
        if one == "source" and any(name in spelled for name in _NAMES_NO_SOURCE):
            continue
        if one in spelled and other in spelled:
            pair = spelled[one], spelled[other]
            # A list of completions also forms a pair: its rows are refused instead of read as plain text.
            having = sum(
                isinstance(v.get(pair[0]), str) and isinstance(v.get(pair[1]), str | list) for v in values
            )
            if 2 * having >= max(1, len(values)):
                return pair
    return None


def _pick(format_: str, part: str, columns: Columns, taken: Iterable[str], by_hand: bool) -> str:
    """Return the column that holds a part in at least half of the rows."""
    spelled, taken = columns.spelled, set(taken)
    named = [spelled[name] for name in PARTS[format_][part] if name in spelled]
    others: list[str] = []
    if part == "messages":
        others = [c for c in spelled.values() if c not in named and c.lower() not in _HALVES]
        if "completion" in spelled and "prompt" not in spelled:  # then this column is the whole conversation
            others.append(spelled["completion"])
        if "history" in spelled and not spelled.keys() & _PAIRED:
            others.append(spelled["history"])
    for column in (*named, *others):
        # Lists of texts, or of question and answer pairs, count only in a column with a name for
        # conversations.
        pairs, texts = column in named, column in named and column.lower() in _ALTERNATING_COLUMNS

        def fits(cell: Cell, pairs: bool = pairs, texts: bool = texts) -> bool:
            if part != "messages":
                return _may_be(part, cell)
            is_sharegpt = cell.turns == "sharegpt" or (cell.turns == "pairs" and pairs)
            turns = "sharegpt" if is_sharegpt or (cell.turns == "texts" and texts) else cell.turns
            return turns in (("messages", "sharegpt") if by_hand else (format_,))

        if column not in taken and columns.mostly(column, fits):
            return column
    return ""


def _only_prose(columns: Columns) -> str:
    """Return the only column of prose besides the label; empty if there is none or more than one.

    Also empty if the labels do not form a decision.
    """
    label = columns.first(PARTS["decision"]["label"])
    if not label or decision_of(Counter(json_text(value.get(label)) for value in columns.values)) is None:
        return ""

    def is_prose(column: str) -> bool:
        texts = [value[column] for value in columns.values if isinstance(value.get(column), str)]
        return 2 * sum(len(words(text)) >= _PROSE_WORDS for text in texts) >= len(columns.values)

    prose = [column for column in columns.names if column != label and is_prose(column)]
    return prose[0] if len(prose) == 1 else ""


def _may_be(part: str, cell: Cell) -> bool:
    """Return whether a value can be ``part``, which is any part except ``messages``."""
    return (
        (cell.turns not in ("messages", "sharegpt") or part in ("prompt", "completion"))
        and (part != "label" or cell.is_label)
        and (part not in _PROSE or not cell.is_object)
        and (
            part not in _ANSWERS
            or cell.turns in ("messages", "sharegpt", "pairs")
            or not cell.has_several_texts
        )
    )


SNIFFED_ROWS = 200
_COLUMNS_NAMED = 12

NOT_IN_FORMAT = "not-in-format"
"""Error code for rows that lack parts of the requested format."""
LABEL_NAMES = "label_names"
"""A part that is not a column: the names of integer labels in order, separated by commas."""


class RowFormat(Struct, frozen=True):
    """How to read the rows of one source."""

    format: str
    columns: dict[str, str]
    """Column of each part."""
    label_names: tuple[str, ...] = ()
    method: str = ""
    """The preference method, if it trains on bad answers too; otherwise empty."""


class Detection(Struct, frozen=True):
    """A format, and the evidence for it."""

    layout: RowFormat
    evidence: tuple[str, ...]
    """Sentences for the Data screen."""
    columns: tuple[str, ...]
    """All columns seen, in order."""
    note: str = ""
    """Which content of the file is not read; empty if all of it is read."""


def parts_of(format_: str) -> tuple[str, ...]:
    """Return the parts of a format, required ones first; ``Source.columns`` may map them."""
    parts = (*PARTS[format_], *OPTIONAL[format_])
    if format_ in preferences.RATABLE:
        return (*parts, RATING)
    return (*parts, LABEL_NAMES) if format_ == "decision" else parts


def detect(
    rows: Iterable[Row],
    name: str,
    wanted: str = "auto",
    mapping: Mapping[str, str] | None = None,
    preference_choice: str = "refuse",
) -> Detection:
    """Detect the format of the first rows of ``name``.

    ``wanted``, ``mapping`` and ``preference_choice`` are the recipe's format, columns and
    ``data.preferences``. Raises ``UserError`` if nothing fits, naming the columns, and for preference data
    without opt-in.
    """
    seen_rows = [row for row in rows if not row.error]
    columns = Columns([as_fields(row.value) for row in seen_rows])
    mapping = dict(mapping or {})
    _check_mapping(mapping, wanted, columns.names, name)
    layout = _layout_of(columns, name, wanted, mapping, preference_choice)
    if isinstance(layout, UserError):
        raise _media_problem(seen_rows, columns.values, name) or layout
    evidence = (*_evidence(layout, columns.values, wanted), *_decided(layout, seen_rows))
    return Detection(layout, evidence, columns.names)


def _layout_of(
    columns: Columns, name: str, wanted: str, mapping: dict[str, str], preference_choice: str
) -> RowFormat | UserError:
    """Return how to read rows, or the error that explains why they cannot be read.

    Comparisons are tried first, then the formats in their order.
    """
    label_names = tuple(n.strip() for n in mapping.pop(LABEL_NAMES, "").split(",") if n.strip())
    rating = mapping.pop(RATING, "")
    by_hand, method = wanted != "auto", preference_choice if preference_choice in PREFERENCE_METHODS else ""
    if sides := preferences.compared_columns(mapping, columns, name, wanted):
        problem = preferences.sides_problem(name, sides, columns, preference_choice)
        return problem or RowFormat("preference", sides, method=method)
    if problem := compared_answers(name, columns.values, mapping):
        return problem
    for format_ in [wanted] if by_hand else PARTS:
        required = PARTS[format_].keys()
        is_mapped = mapping.keys() & required and mapping.keys() <= required | OPTIONAL[format_].keys()
        if mapping and not by_hand and not is_mapped:
            continue
        parts = detect_columns(format_, columns, mapping, by_hand)
        if parts is None:
            continue
        if (
            format_ in ("decision", "text")
            and not by_hand
            and (why := single_turns(columns.values, columns.names))
        ):
            return _turn_a_row(name, why)
        ratings = preferences.rating_of(format_, columns, parts, rating)
        if problem := preferences.ratings_problem(name, ratings, preference_choice):
            return problem
        return RowFormat(format_, parts | ({RATING: ratings[0]} if ratings else {}), label_names, method)
    return without_text(name, columns.values) or _nothing_fits(name, wanted, columns)


def parse(row: Row, layout: RowFormat, source: int = 0) -> Conversation:
    """Convert one row to a conversation. Raises ``RowRejectedError`` with kind and reason."""
    if row.error:
        raise RowRejectedError(row.kind, row.error)
    fields = as_fields(row.value)
    if not fields:
        what = "is empty" if row.value in ({}, [], "", None) else f"is a {type(row.value).__name__}"
        raise RowRejectedError("bad-row", f"Row {row.number} {what}.")
    if media := media_column(fields):
        raise RowRejectedError("media", media)
    cells = {part: fields.get(column) for part, column in layout.columns.items()}
    for part in PARTS[layout.format]:
        if layout.columns.get(part) not in fields:
            raise RowRejectedError("wrong-format", f"The row has no {layout.columns.get(part, part)!r}.")
    _check_not_rejected(fields, cells, layout)
    conversation = _conversation(cells, layout, source, row.number)
    if layout.method and RATING in layout.columns:
        conversation = rated(conversation, is_good=bool(preferences.is_good(cells[RATING])))
    for one in (conversation, *conversation.rejected):
        if tag := placeholder(one.messages):
            raise RowRejectedError("media", tag)
    return conversation


def question_parts(layout: RowFormat) -> tuple[str, ...]:
    """Return the required parts of a format that are not its answer."""
    return tuple(part for part in PARTS[layout.format] if part not in _ANSWER_PARTS)


def parse_question(row: Row, layout: RowFormat, answer: str) -> Conversation:
    """Convert one row, with or without an answer, to the conversation before the answer.

    ``answer`` replaces the answer in layouts that require one. Raises ``RowRejectedError``.
    """
    fields = as_fields(row.value)
    answers = {layout.columns[part]: answer for part in PARTS[layout.format] if part in _ANSWER_PARTS}
    conversation = parse(
        msgspec.structs.replace(row, value=fields | answers if fields else row.value), layout
    )
    turns = conversation.messages
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowRejectedError("empty-row", "The row has no question.")
    return Conversation(turns, conversation.tools, source=conversation.source, row=conversation.row)


def _check_not_rejected(fields: Mapping[str, Any], cells: Mapping[str, Any], layout: RowFormat) -> None:
    """Raise ``RowRejectedError`` for an answer that is not to be learned.

    Such an answer has no valid rating, or a bad one that no preference method uses. Or a column of the row
    marks it as rejected, although the first rows of the file have no such column.
    """
    if RATING in layout.columns:
        column, good = layout.columns[RATING], preferences.is_good(cells[RATING])
        if good is None:
            raise RowRejectedError(
                "rated-bad", f"{column!r} is {cells[RATING]!r}: the answer does not have a good rating."
            )
        if not good and not layout.method:
            raise RowRejectedError("rated-bad", f"{column!r} is {cells[RATING]!r}: the answer is rated bad.")
    elif layout.format != "preference" and (
        column := preferences.rejected_column(fields, layout.columns.values())
    ):
        if any(c.lower() in preferences.CHOSEN for c in layout.columns.values()):
            return  # chosen by the user's own mapping
        if layout.format in preferences.RATABLE or column.lower() in preferences.REJECTED:
            raise RowRejectedError(
                "wrong-format",
                f"{column!r} marks this answer as rejected; the first rows of the file have no rejected "
                "answers.",
            )


def _conversation(cells: Mapping[str, Any], layout: RowFormat, source: int, row: int) -> Conversation:
    if layout.format == "preference":
        return (compared if layout.method else preferred)(cells, source, row)
    if layout.format == "text":
        text = text_of(cells["text"], "the text")
        if not text.strip():
            raise RowRejectedError("empty-row", "The text is empty.")
        return Conversation((), text=text, source=source, row=row)
    messages = _READERS[layout.format](cells, layout)
    if not any(map(_says_something, messages)):
        raise RowRejectedError("empty-row", "The conversation is empty.")
    answers = [m for m in messages if m.role == "assistant"]
    if answers and not any(map(_says_something, answers)):
        raise RowRejectedError("empty-row", "The answer is empty.")
    return Conversation(messages, tools_of(cells.get("tools")), source=source, row=row)


def _says_something(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls or message.reasoning.strip())


def _chat(cells: Mapping[str, Any], layout: RowFormat) -> tuple[Message, ...]:
    return chat_formats.with_system(cells, messages_of(cells["messages"]))


_READERS: dict[str, Callable[[Mapping[str, Any], RowFormat], tuple[Message, ...]]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": lambda cells, layout: chat_formats.alpaca(cells),
    "prompt-completion": lambda cells, layout: chat_formats.prompt_completion(cells),
    "question-answer": lambda cells, layout: chat_formats.question_answer(cells),
    "decision": lambda cells, layout: chat_formats.decision(cells, layout.label_names),
}


def as_fields(value: Any) -> dict[str, Any]:
    """Return a row as an object: a bare list of turns becomes ``messages``, a bare string ``text``."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and turn_keys(value):
        return {"messages": value}
    return {}


def _evidence(layout: RowFormat, values: list[dict[str, Any]], wanted: str) -> Iterable[str]:
    if wanted != "auto":
        yield "format set by hand"
    for part in PARTS[layout.format]:
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
    for part in OPTIONAL[layout.format]:
        if part in layout.columns:
            yield f"column {layout.columns[part]!r} as {part}"
    used = set(layout.columns.values())
    unused = sorted({c for v in values for c in v} - used)
    if unused:
        yield f"not used: {', '.join(unused)}"
    if layout.format == "question-answer" and (several := _several_answers(values, layout.columns)):
        yield f"the first of several answers is trained on in {pluralize(several, 'row')}"
    if layout.format == "text" and (mark := written_out([v.get(layout.columns["text"]) for v in values])):
        yield f"the texts hold conversations ({mark}): as plain text, the questions are in the loss too"
    if layout.format == "preference":
        yield (
            f"{layout.method} compares both sides, from the first turn in which they differ"
            if layout.method
            else "neither rejected answers nor turns that both sides share are trained on"
        )
    if RATING in layout.columns:
        column = layout.columns[RATING]
        ratings = [preferences.is_good(v.get(column)) for v in values]
        yield (
            f"column {column!r} rates the answers: {ratings.count(True)} good, {ratings.count(False)} bad in "
            f"the first {len(values)} rows; "
            + (f"{layout.method} learns from both" if layout.method else "only good ones are trained on")
        )
    if layout.format == "decision" and not layout.label_names and values:
        numbers = all(isinstance(v.get(layout.columns["label"]), int) for v in values)
        if numbers:
            yield f"labels are numbers without names: set columns.{LABEL_NAMES} to name them"


def _decided(layout: RowFormat, rows: Iterable[Row]) -> Iterable[str]:
    """Yield a phrase on the decision that the answers form, if they form one.

    If they do not, yield one only for the format ``decision``, on how the answers are evaluated instead.
    """
    answers: Counter[str] = Counter()
    for row in () if layout.method else rows:
        with suppress(RowRejectedError):
            last = parse(row, layout).messages[-1:]
            answers.update(message.content.strip() for message in last if message.role == "assistant")
    if (decision := decision_of(answers)) is not None:
        yield f"the answers are {decision.describe()}; their probabilities are evaluated"
    elif layout.format == "decision" and answers:
        seen = f"{len(answers):,} different answers in "
        if answers.total() < SNIFFED_ROWS:
            yield f"{seen}{answers.total():,} rows: trained and evaluated as text"
        else:
            first = f"the first {answers.total():,} rows"
            yield (
                f"{seen}{first}: evaluated as text, unless the whole data set has few different answers "
                "relative to its number of rows"
            )


def _several_answers(values: list[dict[str, Any]], columns: Mapping[str, str]) -> int:
    """Count the rows with several different answers."""
    answers = [decoded(value.get(columns["answer"])) for value in values]
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    lists = [text for text in texts if isinstance(text, list)]
    return sum(any(other != text[0] for other in text[1:]) for text in lists if not are_calls(text))


def _check_mapping(mapping: Mapping[str, str], wanted: str, columns: tuple[str, ...], name: str) -> None:
    formats = [wanted] if wanted != "auto" else list(PARTS)
    known = list(dict.fromkeys(part for f in formats for part in parts_of(f)))
    for part, column in mapping.items():
        if part not in known:
            raise UserError(
                "Unknown part",
                what=f"columns.{part} for {name} is not part of the format {wanted}.",
                why=f"Parts are {', '.join(known)}.",
                fix=_near(part, known),
            )
        if part != LABEL_NAMES and columns and column not in columns:
            raise UserError(
                "No such column",
                what=f"{name} has no column {column!r}, which columns.{part} names.",
                why=f"The columns are {', '.join(columns)}.",
                fix=_near(column, columns),
            )


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"Did you mean {close[0]!r}?" if close else "Choose one of these names."


def _turn_a_row(name: str, why: str) -> UserError:
    return UserError(
        "Conversations are split across rows",
        what=f"{name}: {why}",
        why="A conversation must be in one row, with all of its turns.",
        fix="Join the turns of each conversation into a list of messages, or use a file with joined turns; "
        'to train on every turn as plain text, set format = "text".',
    )


def _media_problem(rows: Sequence[Row], values: Sequence[Mapping[str, Any]], name: str) -> UserError | None:
    """Return the error if some of the first rows hold images, video or audio; None if none does.

    No setting can fix such rows.
    """
    with_media = [
        (row.number, media) for row, v in zip(rows, values, strict=True) if (media := media_column(v))
    ]
    if not with_media:
        return None
    numbers = ", ".join(str(number) for number, _ in with_media[:5])
    more = f" and {len(with_media) - 5} more" if len(with_media) > 5 else ""
    check, word = CHECKS["media"], "rows" if len(with_media) > 1 else "row"
    what = f"{name}, {word} {numbers}{more}: {with_media[0][1]}"
    return UserError(check.title, what=what, fix=check.fix)


def _nothing_fits(name: str, wanted: str, columns: Columns) -> UserError:
    names = columns.names
    if not columns.values:
        return UserError(
            "No rows",
            what=f"{name} has no row that can be read.",
            fix="Choose another file, or correct this one.",
        )
    more = f" and {len(names) - _COLUMNS_NAMED} more" if len(names) > _COLUMNS_NAMED else ""
    named = ", ".join(names[:_COLUMNS_NAMED]) + more
    what = f"in the columns {named}" if names else "in its rows, which are not objects"
    if wanted != "auto":
        needs = " and ".join(PARTS[wanted])
        return UserError(
            "The data is not in this format",
            what=f"{name} is not in the format {wanted}, which needs {needs}.",
            why=f"The parts of the format were not found {what}.",
            fix='Map the columns by hand, or let format = "auto" choose.',
            code=NOT_IN_FORMAT,
        )
    fix, code = "A row is an object with named fields. If the file is one array of rows, name it .json.", ""
    if names:
        fix, code = mapping_hint(columns.values, names)
    return UserError(
        "No usable field",
        what=f"No known format fits {name}: there is nothing to train on {what}.",
        why=f"Known formats: {', '.join(PARTS)}.",
        fix=fix,
        code=code,
    )
