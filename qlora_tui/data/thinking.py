"""Thinking before an answer: the switch of a chat template, and the reasoning in a row.

Templates of hybrid models read a variable: ``enable_thinking`` (Qwen3, SmolLM3, GLM-4.5, Gemma 4, Nemotron),
``thinking`` (DeepSeek-V3.1, Granite), ``reasoning_effort`` (gpt-oss). ``switch_of`` finds it by name and
probes its effect. ``resolve_thinking`` chooses on or off for one conversation, ``without_reasoning`` removes
the reasoning from one. Training and chat both use these functions, so a model gets the same prompts as in
training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.chat_template import ChatTemplate, Turns
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.recipe.schema import Thinking

OnOff = Literal["on", "off"]

_FLAGS = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
"""Variables that are true or false."""
_EFFORTS = ("reasoning_effort", "reasoning_strength")
"""Variables that are ``low``, ``medium`` or ``high``; some templates accept ``none``."""

THOUGHT_TAGS = ("<think>", "</think>")
"""Tokens of an answer, whether or not the tokenizer calls them special."""
OPENED = re.compile(r"<think>(\s*)\Z")
"""A prompt that opens a thought, with the white space after the tag."""


class Switch(Struct, frozen=True):
    """The template variable that turns thinking on or off."""

    variable: str
    on: dict[str, Any]
    """Variables to render with; empty where the template thinks by default."""
    off: dict[str, Any]
    default: OnOff
    """Whether the template thinks when the variable is not set."""
    can_turn_off: bool = True
    """False for an effort whose lowest level is ``low``: the model then thinks less, but still thinks."""


def switch_of(template: ChatTemplate, turns: Turns) -> Switch | None:
    """Return the switch of ``template``, probed on the conversation ``turns``; None where it has none."""

    def prompt(variables: Mapping[str, Any]) -> str | None:
        try:
            return template.with_variables(variables).render(turns, prompt=True)
        except RowRejectedError:
            return None

    default = prompt({})
    for name in _FLAGS:
        if name not in template.names:
            continue
        on, off = prompt({name: True}), prompt({name: False})
        if on is not None and off is not None and on != off:
            return Switch(name, {name: True}, {name: False}, "off" if off == default else "on")
    for name in _EFFORTS:
        if name not in template.names:
            continue
        constants = template.literals.split("\0")
        least = "none" if "none" in constants else "low"
        off = prompt({name: least})
        if off is None:
            continue
        if off != default:
            return Switch(name, {}, {name: least}, "on", can_turn_off=least == "none")
        on = prompt({name: "high"})
        if on is not None and on != off:
            return Switch(name, {name: "high"}, {name: least}, "off", can_turn_off=least == "none")
    return None


def variables(switch: Switch | None, thinking: Thinking) -> dict[str, Any]:
    """Return the variables to render with; empty for ``auto``, or without a switch."""
    if switch is None or thinking == "auto":
        return {}
    return switch.on if thinking == "on" else switch.off


def resolve_thinking(thinking: Thinking, switch: Switch | None, conversation: Conversation) -> Thinking:
    """Return the setting for one conversation: ``auto`` is on where an answer has reasoning, else off.

    An effort that cannot be turned off stays at the template's default, ``auto``.
    """
    if thinking != "auto":
        return thinking
    if has_reasoning(conversation.messages):
        return "on"
    return "off" if switch is None or switch.can_turn_off else "auto"


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Return whether any answer has reasoning."""
    return any(message.role == "assistant" and reasoning_of(message) for message in messages)


def reasoning_of(message: Message) -> str:
    """Return the reasoning of an answer, stored separately or written into it; empty if there is none."""
    return (message.reasoning or _inline(message)[0]).strip()


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without reasoning."""
    return tuple(map(_drop_reasoning, messages))


def separate_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with reasoning inside an answer moved to ``Message.reasoning``."""
    return tuple(map(_separate_reasoning, messages))


def _separate_reasoning(message: Message) -> Message:
    inside, rest = _inline(message)
    return replace(message, reasoning=inside, content=rest) if inside and not message.reasoning else message


def _drop_reasoning(message: Message) -> Message:
    _, rest = _inline(message)
    if not message.reasoning and rest == message.content:
        return message
    return replace(message, reasoning="", content=rest)


def _inline(message: Message) -> tuple[str, str]:
    """Split an answer into the reasoning written into it and the rest."""
    before, tag, rest = message.content.partition("</think>")
    if message.role != "assistant" or not tag:
        return "", message.content
    opening, opened, inside = before.partition("<think>")
    if opened and opening.strip():
        return "", message.content
    return (inside if opened else before).strip(), rest.lstrip()
