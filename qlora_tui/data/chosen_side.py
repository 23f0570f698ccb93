"""Conversations that end with the chosen or a rejected answer of a preference row. Used by ``formats``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from qlora_tui.data.chat_formats import (
    CONTENT_KEYS,
    decoded,
    history_of,
    messages_of,
    text_of,
    tools_of,
    turn_keys,
)
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]?")


def preferred(cells: Mapping[str, Any], source: int, row: int) -> Conversation:
    """Return the conversation that ends with the chosen answer. Raises ``RowRejectedError``.

    Turns that both sides share are the prompt, outside the loss. Both sides may be conversations, turns,
    texts, or dialogues in one text as in Anthropic's data sets.
    """
    conversation, _ = _sides(cells, source, row)
    return conversation


def compared(cells: Mapping[str, Any], source: int, row: int) -> Conversation:
    """Return the conversation that ends with the chosen answer, with its alternatives in ``rejected``.

    Raises ``RowRejectedError``, also where a rejected answer is empty.
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
    """Return a conversation whose last answer is rated; earlier turns are its prompt.

    Raises ``RowRejectedError`` where it does not end with an answer.
    """
    messages = conversation.messages
    start = len(_before_answer(messages))
    if start == len(messages) or not start:
        raise RowRejectedError("no-answer", "A rating needs a prompt, and an answer after it.")
    return msgspec.structs.replace(conversation, messages=_trained_from(messages, start), rated_good=is_good)


def _sides(cells: Mapping[str, Any], source: int, row: int) -> tuple[Conversation, list[tuple[Message, ...]]]:
    """Return the conversation with the chosen answer, and the turns with each rejected one."""
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
    """Return the turns, of which those before the one numbered ``first`` are not in the loss."""
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
    messages = (*history_of(cells.get("history")), *messages)
    system = text_of(cells.get("system"), "the system prompt")
    if system.strip() and not (messages and messages[0].role == "system"):
        messages = (Message("system", system), *messages)
    return messages, tools


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
    """Parse a text that begins with ``Human:``, as in Anthropic's data sets; None for any other."""
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
    """Count the turns that both sides begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if _said(a) != _said(b)), min(len(one), len(other)))


def is_turn(value: Any) -> bool:
    return isinstance(value, dict) and turn_keys([value]) is not None
