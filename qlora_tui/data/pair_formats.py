"""Conversations from rows with one column for each part: Alpaca, prompt and completion, question and answer,
text and label, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from qlora_tui.data.chat_formats import (
    CONTENT_KEYS,
    calls_of,
    decoded,
    history_of,
    messages_of,
    text_of,
    turn_keys,
)
from qlora_tui.data.conversation import Message, RowRejectedError

Cells = Mapping[str, Any]
"""The value of each part that the row has."""


def alpaca(cells: Cells) -> tuple[Message, ...]:
    """Convert an instruction, an optional input and an output, with optional earlier turns in ``history``."""
    instruction = _text(cells, "instruction")
    given = _text(cells, "input")
    prompt = f"{instruction}\n\n{given}" if instruction.strip() and given.strip() else instruction or given
    return (
        *_system(cells),
        *history_of(cells.get("history")),
        *_pair(prompt, _text(cells, "output"), "instruction", "output"),
    )


def prompt_completion(cells: Cells) -> tuple[Message, ...]:
    """Convert a prompt and a completion, each a text or turns; only the completion is in the loss."""
    prompt, completion = cells.get("prompt"), cells.get("completion")
    if not turn_keys(prompt) and not turn_keys(completion):
        return (
            *_system(cells),
            *history_of(cells.get("history")),
            *_pair(_text(cells, "prompt"), _text(cells, "completion"), "prompt", "completion"),
        )
    before = messages_of(prompt) if turn_keys(prompt) else (Message("user", _text(cells, "prompt")),)
    after = (
        messages_of(completion)
        if turn_keys(completion)
        else (Message("assistant", _text(cells, "completion")),)
    )
    if after[: len(before)] == before:
        after = after[len(before) :]
    prompt_messages = tuple(msgspec.structs.replace(m, train=False) for m in before)
    return (*_system(cells), *prompt_messages, *after)


def question_answer(cells: Cells) -> tuple[Message, ...]:
    """Convert a question, optionally with context or choices, and an answer (the first of several); where
    tools are offered, the answer may be tool calls."""
    answer = decoded(cells.get("answer"))
    calls = calls_of(answer) if cells.get("tools") else ()
    for _ in range(2):  # a list of answers, each possibly an object; or lists under names
        if isinstance(answer, dict):
            answer = next((answer[key] for key in CONTENT_KEYS if key in answer), answer)
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
    question, context = _text(cells, "question"), _text(cells, "context")
    prompt = f"{context}\n\n{question}" if context.strip() else question
    before = (*_system(cells), *history_of(cells.get("history")))
    if calls and prompt.strip():
        return (*before, Message("user", prompt), Message("assistant", "", tool_calls=calls))
    if question.strip() and (choices := _choices(cells.get("choices"))):
        prompt = "\n".join([f"{prompt}\n", *(f"{letter}. {text}" for letter, text in choices)])
        answer = _chosen_choice(answer, choices)
    return (*before, *_pair(prompt, text_of(answer, "the answer"), "question", "answer"))


def _choices(value: Any) -> list[tuple[str, str]]:
    """Return letter and text of each choice, from a list or an object as in ARC and MedQA; else empty."""
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
    """Return letter and text of the choice that an answer names by letter, text, or number from 0."""
    choice = str(answer).strip()
    for letter, text in choices:
        if choice in (letter, text, text.strip()):
            return f"{letter}. {text}"
    if isinstance(answer, bool) or not choice.lstrip("-").isdigit():
        return answer
    if not 0 <= int(choice) < len(choices):
        raise RowRejectedError(
            "wrong-format", f"The answer {choice} names none of the {len(choices)} choices, from 0."
        )
    letter, text = choices[int(choice)]
    return f"{letter}. {text}"


def label(cells: Cells, names: tuple[str, ...]) -> tuple[Message, ...]:
    """Convert a text and its class, or its classes separated by commas."""
    value = cells.get("label")
    answer = ", ".join(_label(one, names) for one in (value if isinstance(value, list) else [value]))
    return (*_system(cells), *_pair(_text(cells, "text"), answer, "text", "label"))


def _label(value: Any, names: tuple[str, ...]) -> str:
    """Return the name of one class. An integer is looked up in ``names`` if there are any."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    number = int(str(value)) if names and str(value).strip().isdigit() else None
    if isinstance(value, bool):
        number, value = (int(value), str(value).lower())
    if names and number is not None:
        if number >= len(names):
            raise RowRejectedError(
                "wrong-format", f"The label {number} has no name: there are {len(names)} names, from 0."
            )
        value = names[number]
    return "" if value is None or value != value else str(value)  # NaN is a missing value


def _pair(prompt: str, answer: str, prompt_name: str, answer_name: str) -> tuple[Message, Message]:
    if not prompt.strip():
        raise RowRejectedError("empty-row", f"The {prompt_name} is empty.")
    if not answer.strip():
        raise RowRejectedError("empty-row", f"The {answer_name} is empty.")
    return Message("user", prompt), Message("assistant", answer)


def _system(cells: Cells) -> tuple[Message, ...]:
    text = _text(cells, "system")
    return (Message("system", text),) if text.strip() else ()


def _text(cells: Cells, part: str) -> str:
    return text_of(cells.get(part), f"the {part}")
