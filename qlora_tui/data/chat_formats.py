"""Builds conversations from rows, which have lists of turns (OpenAI, ShareGPT) or a column for each part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from qlora_tui.data.conversation import Message, Role, RowRejectedError, ToolCall, media_column, medium_of
from qlora_tui.formatting import capitalize, uncapitalize


class FormatNames(Struct, frozen=True):
    """The parts of a format, with the usual names of their columns."""

    required: dict[str, tuple[str, ...]] = {}
    optional: dict[str, tuple[str, ...]] = {}
    is_ratable: bool = False
    is_rated_by_numbers: bool = False


class Names(Struct, frozen=True):
    """The content of ``formats.toml``; the file explains the fields."""

    role_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[str, str], ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    better: tuple[str, ...]
    always_ratings: tuple[str, ...]
    ratings: tuple[str, ...]
    scores: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    roles: dict[Role, tuple[str, ...]]
    formats: dict[str, FormatNames]


NAMES = msgspec.toml.decode(Path(__file__).with_name("formats.toml").read_bytes(), type=Names)
ROLE_KEYS, CONTENT_KEYS, EXCHANGES = NAMES.role_keys, NAMES.content_keys, NAMES.exchanges
_ROLES = {name: role for role, names in NAMES.roles.items() for name in names}
_PAIR_ROLES: tuple[Role, Role] = ("user", "assistant")
_CALL_ROLES = ("function_call", "tool_call")
_PART_KEYS = ("text", "value", "thinking", "reasoning", "content")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "tool_calls", "function_call")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_TRAIN_KEYS = ("train", "weight", "loss_weight", "loss")
_FLAGS = {"": 0.0, "false": 0.0, "no": 0.0, "true": 1.0, "yes": 1.0}
_SPAN_KEYS = ("train_detail",)
"""Keys with which axolotl marks parts of a turn's text for training."""
_LARGEST_WEIGHT = 1000


def decoded(value: Any) -> Any:
    """Return ``value``, decoded if it is a string of JSON, as in CSV cells and some Parquet columns."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return value
    return value


def turn_keys(value: Any) -> tuple[str, str] | None:
    """Return the keys of role and content in a list of turns, or of question and answer in a list of pairs.

    None if ``value`` is neither.
    """
    turns = decoded(value)
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return None
    role = next((k for k in ROLE_KEYS if k in turns[0]), "")
    content = next((k for k in CONTENT_KEYS if k in turns[0]), "")
    if not content and ("tool_calls" in turns[0] or "function_call" in turns[0]):
        content = "content"
    if role and content:
        return (role, content)
    return next(((q, a) for q, a in EXCHANGES if q in turns[0] and a in turns[0]), None)


class Cell(Struct, frozen=True):
    """The kinds that a value could be, regardless of its column."""

    turns: Literal["", "messages", "sharegpt", "pairs", "texts"]
    """The form of a list of turns: the keys of OpenAI or ShareGPT, pairs of question and answer, or texts
    whose speakers alternate. Empty if the value is not a list of turns.
    """
    is_object: bool
    """Whether the value is an object, or a list of objects that are neither turns nor typed parts."""
    is_label: bool
    """Whether the value is a label, a list of labels, or an object of them."""
    has_several_texts: bool

    @classmethod
    def of(cls, value: Any) -> Cell:
        """Determine the kinds of a value."""
        keys, whole = turn_keys(value), decoded(value)
        turns: Literal["", "messages", "sharegpt", "pairs", "texts"] = "texts" if are_alternate(whole) else ""
        if keys is not None:
            turns = "messages" if keys[0] == "role" and keys[1] != "value" else "sharegpt"
            turns = "pairs" if keys in EXCHANGES else turns
        is_object = isinstance(whole, dict)
        if isinstance(whole, list) and whole and isinstance(whole[0], dict):
            is_object = not keys and "type" not in whole[0] and "text" not in whole[0]
        labels = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
        is_label = not any(isinstance(one, dict | list) for one in labels)
        return cls(turns, is_object, is_label, count_texts(value) > 1)


class Columns:
    """The columns of a file's first rows, and facts about their values, each computed once."""

    def __init__(self, values: list[dict[str, Any]]):
        self.values = values
        self.names = tuple(dict.fromkeys(column for value in values for column in value))
        """All columns, in order."""
        self.spelled = {column.lower(): column for value in values for column in value}
        """Columns keyed by their names in lower case."""
        self._cells: dict[str, list[Cell]] = {}

    def first(self, names: Iterable[str]) -> str:
        """Return the column of the first of these names that exists, ignoring case; empty if none does."""
        return next((self.spelled[name] for name in names if name in self.spelled), "")

    def mostly(self, column: str, fits: Callable[[Cell], bool]) -> bool:
        """Return whether ``fits`` is true for the value of a column in at least half of the rows."""
        if column not in self._cells:
            self._cells[column] = [Cell.of(value[column]) for value in self.values if column in value]
        return 2 * sum(map(fits, self._cells[column])) >= max(1, len(self.values))


def is_role(name: Any) -> bool:
    """Return whether ``name`` is the name of a role in a conversation."""
    return str(name).strip().lower() in _ROLES


def are_alternate(value: Any) -> bool:
    """Return whether ``value`` is a list of two or more texts, which may alternate between speakers."""
    texts = decoded(value)
    return isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) for text in texts)


def messages_of(value: Any) -> tuple[Message, ...]:
    """Parse the turns of a list. Raises ``RowRejectedError``."""
    turns = decoded(value)
    if not isinstance(turns, list):
        raise RowRejectedError("wrong-format", f"Expected a list of turns, found {type(turns).__name__}.")
    messages: list[Message] = []
    for number, turn in enumerate(_unfolded(turns), 1):
        if not isinstance(turn, Mapping):
            raise RowRejectedError("wrong-format", f"Turn {number} is not an object with role and content.")
        message = _message(turn, number)
        if messages and _continues(messages[-1], message, turn):
            message = _joined(messages.pop(), message)
        messages.append(message)
    return tuple(messages)


def _unfolded(turns: list[Any]) -> list[Any]:
    """Return one object for each turn: texts get alternating roles, and a pair becomes two turns."""
    if are_alternate(turns):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    keys = turn_keys(turns)
    if keys not in EXCHANGES:
        return turns
    return [
        {"role": role, "content": turn.get(key)} if isinstance(turn, Mapping) else turn
        for turn in turns
        for role, key in zip(("user", "assistant"), keys, strict=True)
    ]


def history_of(value: Any) -> tuple[Message, ...]:
    """Parse earlier turns: pairs of question and answer, or turns. Raises ``RowRejectedError``."""
    history = decoded(value)
    if history is None or history != history or history in ("", []):
        return ()
    if turn_keys(history):
        return messages_of(history)
    if not isinstance(history, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise RowRejectedError("wrong-format", "The history is not a list of [question, answer] pairs.")
    return tuple(
        Message(role, text_of(text, "history"))
        for pair in history
        for role, text in zip(_PAIR_ROLES, pair, strict=True)
    )


def calls_of(value: Any) -> tuple[ToolCall, ...]:
    """Parse tool calls in any of the usual spellings; empty for anything else.

    Raises ``RowRejectedError`` for a call whose arguments are not a JSON object.
    """
    value = decoded(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return ()
    calls = []
    for item in value:
        call = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return ()
        calls.append(ToolCall(call["name"], _arguments_of(call), str(item.get("id") or "")))
    return tuple(calls)


def are_calls(value: Any) -> bool:
    """Return whether ``value`` has the form of tool calls, even if their arguments cannot be read."""
    try:
        return bool(calls_of(value))
    except RowRejectedError:
        return True


def _arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = decoded(call.get("arguments", call.get("parameters")))
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, dict):
        raise RowRejectedError("wrong-format", f"The arguments of {call['name']!r} are not a JSON object.")
    return arguments


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Parse the functions offered to the assistant, in OpenAI's format. Raises ``RowRejectedError``."""
    tools = decoded(value)
    if tools in (None, "", [], {}):
        return ()
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise RowRejectedError("wrong-format", "The tools are not a list of JSON schemas.")
    wrapped = []
    for tool in (decoded(t) for t in tools):
        if not isinstance(tool, dict):
            raise RowRejectedError("wrong-format", "A tool is not a JSON schema.")
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(wrapped)


def text_of(content: Any, where: str) -> str:
    """Return the text of a cell that holds a string, a number, an object, nothing, or typed parts of text.

    Raises ``RowRejectedError`` for other parts, and for several texts, because joining them would merge
    alternative answers.
    """
    if isinstance(content, str):
        return content
    text, reasoning, calls = _content_of(content, where)
    if (count := count_texts(content)) > 1:
        raise RowRejectedError(
            "wrong-format", f"{capitalize(where)} is a list of {count} texts instead of a single text."
        )
    if reasoning or calls:
        kind = "reasoning" if reasoning else "tool_call"
        raise RowRejectedError("unsupported-part", f"{capitalize(where)} has a part of type {kind!r}.")
    return text


def count_texts(value: Any) -> int:
    """Count the alternative texts in a list, which are strings or objects without a type.

    Typed parts are not counted, because all of them together are one text.
    """
    if not isinstance(value, list):
        return 0
    return sum(isinstance(one, str) or (isinstance(one, Mapping) and "type" not in one) for one in value)


def json_text(value: Any) -> str:
    """Return a value as JSON; values that JSON lacks, such as dates of a Parquet file, become strings."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _content_of(content: Any, where: str) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Return text, reasoning and tool calls of a message's content, from all its parts.

    Raises ``RowRejectedError``.
    """
    if content is None or content != content:  # pandas writes missing values as NaN
        return "", "", ()
    if isinstance(content, str):
        return content, "", ()
    if isinstance(content, bool | int | float | dict):
        return json_text(content), "", ()
    if not isinstance(content, list):
        raise RowRejectedError("wrong-format", f"The content of {where} is not text.")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RowRejectedError("wrong-format", f"A part of {where} is not text.")
        kind = part.get("type", "text")
        part_calls = calls_of(_part_value(part)) if kind in _CALL_PARTS else ()
        text = _part_text(part)
        if part_calls:
            calls += part_calls
        elif text is not None and kind in _TEXT_PARTS:
            texts.append(text)
        elif text is not None and kind in _REASONING_PARTS:
            reasoning.append(text)
        elif (medium := medium_of(kind)) is not None:
            raise RowRejectedError("media", f"{capitalize(where)} holds {medium} (a part of type {kind!r}).")
        else:
            raise RowRejectedError("unsupported-part", f"{capitalize(where)} has a part of type {kind!r}.")
    return "".join(texts), "\n\n".join(reasoning), tuple(calls)


def _part_value(part: Mapping[str, Any]) -> Any:
    """Return the value of a typed part under ``text`` (OpenAI), ``value`` (LLaMA-Factory's v1 format) or a
    similar key; None if there is none.
    """
    return next((part[key] for key in _PART_KEYS if part.get(key) is not None), None)


def _part_text(part: Mapping[str, Any]) -> str | None:
    value = _part_value(part)
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        texts = [_part_text(one) for one in value]
        return None if None in texts else "".join(filter(None, texts))
    return value if isinstance(value, str) else None


def _message(turn: Mapping[str, Any], number: int) -> Message:
    name = next((turn[k] for k in ROLE_KEYS if k in turn), None)
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise RowRejectedError("unknown-role", f"Turn {number} has the role {name!r}.")
    if spans := next((key for key in _SPAN_KEYS if turn.get(key)), ""):
        what = (
            f"Turn {number} marks parts of its text in {spans!r}, but the loss can include or omit only "
            "whole turns."
        )
        raise RowRejectedError("wrong-format", what)
    weight = _weight(turn)
    if not 0 <= weight <= _LARGEST_WEIGHT:
        raise RowRejectedError(
            "wrong-format",
            f"Turn {number} has the weight {weight:g}, which is not between 0 and {_LARGEST_WEIGHT:,}.",
        )
    content, reasoning, part_calls = _content_of(
        next((turn[k] for k in CONTENT_KEYS if k in turn), None), f"turn {number}"
    )
    if len(turn) > 2 and (medium := media_column(turn)):  # more keys than role and content
        raise RowRejectedError("media", f"Turn {number}: {uncapitalize(medium)}")
    calls = part_calls + _declared_calls(turn, number)
    if calls and role != "assistant":
        raise RowRejectedError("wrong-format", f"Turn {number} has tool calls, but its role is {name!r}.")
    if str(name).strip().lower() in _CALL_ROLES and not calls:
        calls = calls_of(content)
        content = "" if calls else content
    return Message(
        role=role,
        content=content,
        train=weight > 0,
        weight=weight,
        reasoning=reasoning or next((turn[k] for k in _REASONING_KEYS if isinstance(turn.get(k), str)), ""),
        tool_calls=calls,
        tool_call_id=str(turn.get("tool_call_id") or ""),
        name=str(turn.get("name") or "") if role == "tool" else "",
    )


def _declared_calls(turn: Mapping[str, Any], number: int) -> tuple[ToolCall, ...]:
    value = decoded(turn.get("tool_calls") or turn.get("function_call"))
    calls = calls_of(value)
    if not calls and not _is_blank(value):
        raise RowRejectedError("wrong-format", f"Turn {number} has tool calls that cannot be read.")
    return calls


def _is_blank(value: Any) -> bool:
    """Return whether a value is null, an empty string, or an object or list of only such values."""
    if isinstance(value, dict | list):
        return all(map(_is_blank, value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


def _weight(turn: Mapping[str, Any]) -> float:
    """Return the loss weight of a turn: the first value under ``_TRAIN_KEYS`` that is not null, or else 1."""
    for key in _TRAIN_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        word = value.strip().lower() if isinstance(value, str) else value
        if isinstance(word, str) and word in _FLAGS:
            return _FLAGS[word]
        try:
            return float(word)
        except (TypeError, ValueError, OverflowError):
            what = f"{key!r} of a turn is {value!r}, neither a number nor true or false."
            raise RowRejectedError("wrong-format", what) from None
    return 1.0


def _continues(last: Message, message: Message, turn: Mapping[str, Any]) -> bool:
    """Return whether ``message`` is a tool call that belongs to the assistant turn ``last``."""
    name = str(next((turn[k] for k in ROLE_KEYS if k in turn), "")).strip().lower()
    return name in _CALL_ROLES and last.role == "assistant" and last.train == message.train


def _joined(first: Message, second: Message) -> Message:
    return Message(
        role="assistant",
        content=first.content or second.content,
        train=first.train,
        weight=first.weight,
        reasoning=first.reasoning or second.reasoning,
        tool_calls=first.tool_calls + second.tool_calls,
    )


Cells = Mapping[str, Any]
"""The values of the parts that a row has."""


def alpaca(cells: Cells) -> tuple[Message, ...]:
    """Convert an instruction, an optional input and an output, with optional earlier turns in ``history``."""
    instruction = _text(cells, "instruction")
    given = _text(cells, "input")
    prompt = f"{instruction}\n\n{given}" if instruction.strip() and given.strip() else instruction or given
    turns = _pair(prompt, _text(cells, "output"), "instruction", "output")
    return with_system(cells, (*history_of(cells.get("history")), *turns))


def prompt_completion(cells: Cells) -> tuple[Message, ...]:
    """Convert a prompt and a completion, each a text or turns.

    Turns in the prompt are not in the loss. Two texts may have earlier turns in ``history``, which are.
    """
    prompt, completion = cells.get("prompt"), cells.get("completion")
    if not turn_keys(prompt) and not turn_keys(completion):
        turns = _pair(_text(cells, "prompt"), _text(cells, "completion"), "prompt", "completion")
        return with_system(cells, (*history_of(cells.get("history")), *turns))
    before = messages_of(prompt) if turn_keys(prompt) else (Message("user", _text(cells, "prompt")),)
    after = (
        messages_of(completion)
        if turn_keys(completion)
        else (Message("assistant", _text(cells, "completion")),)
    )
    if after[: len(before)] == before:
        after = after[len(before) :]
    prompt_messages = tuple(msgspec.structs.replace(m, train=False) for m in before)
    return with_system(cells, (*prompt_messages, *after))


def question_answer(cells: Cells) -> tuple[Message, ...]:
    """Convert a question, optionally with context or choices, and an answer.

    The first of several answers is used. If tools are offered, the answer may be tool calls.
    """
    answer = decoded(cells.get("answer"))
    calls = calls_of(answer) if cells.get("tools") else ()
    for _ in range(2):  # a list of answers, each possibly an object; or lists under names
        if isinstance(answer, dict):
            answer = next((answer[key] for key in CONTENT_KEYS if key in answer), answer)
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
    question, context = _text(cells, "question"), _text(cells, "context")
    prompt = f"{context}\n\n{question}" if context.strip() else question
    before = history_of(cells.get("history"))
    if calls and prompt.strip():
        turns = Message("user", prompt), Message("assistant", "", tool_calls=calls)
        return with_system(cells, (*before, *turns))
    if question.strip() and (choices := _choices(cells.get("choices"))):
        prompt = "\n".join([f"{prompt}\n", *(f"{letter}. {text}" for letter, text in choices)])
        answer = _chosen_choice(answer, choices)
    turns = _pair(prompt, text_of(answer, "the answer"), "question", "answer")
    return with_system(cells, (*before, *turns))


def _choices(value: Any) -> list[tuple[str, str]]:
    """Return the letter and text of each choice, from a list, or from an object as in ARC and MedQA; empty
    for other values.
    """
    value = decoded(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        texts, letters = value["text"], value.get("label")
    elif isinstance(value, dict):
        texts, letters = list(value.values()), list(value)
    else:
        texts, letters = value, None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return []
    if not isinstance(letters, list) or len(letters) != len(texts):
        letters = [chr(ord("A") + number) for number in range(len(texts))]
    return [(str(letter), text) for letter, text in zip(letters, texts, strict=True)]


def _chosen_choice(answer: Any, choices: list[tuple[str, str]]) -> Any:
    """Return letter and text of the choice that an answer identifies by letter, text, or number from 0.

    An answer that identifies no choice is returned as it is. Raises ``RowRejectedError`` for a number that is
    too large.
    """
    choice = str(answer).strip()
    for letter, text in choices:
        if choice in (letter, text, text.strip()):
            return f"{letter}. {text}"
    if isinstance(answer, bool) or not choice.lstrip("-").isdigit():
        return answer
    if not 0 <= int(choice) < len(choices):
        raise RowRejectedError(
            "wrong-format", f"The answer {choice} is not one of the {len(choices)} choices, counted from 0."
        )
    letter, text = choices[int(choice)]
    return f"{letter}. {text}"


def decision(cells: Cells, names: tuple[str, ...]) -> tuple[Message, ...]:
    """Convert a text and its label, which is a class, several classes, or an object of fields.

    The answer has several classes separated by commas, and an object as JSON.
    """
    value = cells.get("label")
    if isinstance(value, dict):
        answer = json_text(value)
    else:
        answer = ", ".join(_label(one, names) for one in (value if isinstance(value, list) else [value]))
    return with_system(cells, _pair(_text(cells, "text"), answer, "text", "label"))


def _label(value: Any, names: tuple[str, ...]) -> str:
    """Return the name of one class; an integer is looked up in ``names`` if there are any."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    number = int(str(value)) if names and str(value).strip().isdigit() else None
    if isinstance(value, bool):
        number, value = (int(value), str(value).lower())
    if names and number is not None:
        if number >= len(names):
            raise RowRejectedError(
                "wrong-format",
                f"The label {number} has no name: there are {len(names)} names, counted from 0.",
            )
        value = names[number]
    return "" if value is None or value != value else str(value)  # pandas writes missing values as NaN


def _pair(prompt: str, answer: str, prompt_name: str, answer_name: str) -> tuple[Message, Message]:
    if not prompt.strip():
        raise RowRejectedError("empty-row", f"The {prompt_name} is empty.")
    if not answer.strip():
        raise RowRejectedError("empty-row", f"The {answer_name} is empty.")
    return Message("user", prompt), Message("assistant", answer)


def with_system(cells: Cells, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns with the row's system prompt before them, if the turns have no system prompt."""
    text = _text(cells, "system")
    has_own = bool(messages) and messages[0].role == "system"
    return messages if has_own or not text.strip() else (Message("system", text), *messages)


def _text(cells: Cells, part: str) -> str:
    return text_of(cells.get(part), f"the {part}")
