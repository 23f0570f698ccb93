"""Capabilities of a chat template, found by probing: system turns, tools, tool calls, typed parts.

``adapt_conversation`` converts a conversation to the messages a template reads, and writes what the template
would lose (tool calls, tool answers, tool descriptions, a system prompt) into the text of a turn that it
keeps. Every such change is a note for the Data screen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from qlora_tui.data.chat_template import ChatTemplate
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.thinking import OPENED, Switch, switch_of, variables
from qlora_tui.data.thought_text import THINK, tags_of

_QUESTION, _ANSWER, _SYSTEM, _NAME, _VALUE, _EXTRA = (
    "qvzask",
    "qvzanswer",
    "qvzsystem",
    "qvzname",
    "qvzvalue",
    "qvzfound",
)
"""Probe words that no template writes itself."""


class TemplateCapabilities(Struct, frozen=True):
    """What a template supports, and the message format it needs."""

    system: bool
    """Whether it writes a system turn; else system text goes before the first user turn."""
    parts: bool
    """Whether it needs content as a list of typed parts and would lose a string."""
    tools: bool
    """Whether it writes the descriptions of the tools."""
    calls: Literal["object", "string", "text"]
    """Form of tool calls: arguments as an object, as a JSON string, or only as text of the turn."""
    calls_without_content: bool
    """Whether a turn with calls and no text must have no content key."""
    reasoning: bool
    """Whether it writes ``reasoning_content``; else reasoning goes into the content, in ``<think>`` tags."""
    own_tags: bool
    """Whether its model uses other tags than ``<think>``: ``assistant_spans`` puts reasoning that it does not
    write after the prompt."""
    tool_turns: bool
    """Whether it writes tool turns; else their text is given as a user turn."""
    switch: Switch | None
    """The variable that turns thinking on or off; None where it has none."""
    opens_thought: bool
    """Whether its prompt opens a thought regardless of the switch."""
    forgets_reasoning: bool
    """Whether it omits the reasoning of every answer except the last."""

    @property
    def thinks(self) -> bool:
        """Return whether the template belongs to a thinking model."""
        return self.switch is not None or self.opens_thought


def probe_template(template: ChatTemplate) -> TemplateCapabilities:
    """Probe the template with a few tiny conversations."""
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    shown = _shows(template, [question, answer])
    parts = not shown(_QUESTION, _ANSWER) and _shows(template, [_as_parts(question), _as_parts(answer)])(
        _QUESTION, _ANSWER
    )
    wrap: Callable[[dict[str, Any]], dict[str, Any]] = _as_parts if parts else dict
    question, answer = wrap(question), wrap(answer)
    tool = {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": _VALUE,
            "parameters": {"type": "object", "properties": {}},
        },
    }
    switch = switch_of(template, [question])
    quiet = template.with_variables(variables(switch, "off"))
    style, bare = _call_style(template, question, answer, wrap)
    call_turn = _call_turn(style, bare, wrap) if style != "text" else answer
    thought = {**answer, "reasoning_content": _EXTRA, "thinking": _EXTRA}
    reasoning = _shows(template, [question, thought])(_EXTRA)
    own_tags = tags_of(template.literals) != THINK
    if not reasoning and not own_tags:
        thought = wrap({"role": "assistant", "content": f"<think>\n{_EXTRA}\n</think>\n\n{_ANSWER}"})
    thinking = template.with_variables(variables(switch, "on"))
    return TemplateCapabilities(
        system=_shows(template, [wrap({"role": "system", "content": _SYSTEM}), question, answer])(
            _SYSTEM, _QUESTION
        ),
        parts=parts,
        tools=_shows(template, [question, answer], [tool])(_NAME, _VALUE),
        calls=style,
        calls_without_content=bare,
        reasoning=reasoning,
        own_tags=own_tags,
        tool_turns=_shows(template, [question, call_turn, wrap(_tool_turn(_EXTRA)), answer])(_EXTRA, _ANSWER),
        switch=switch,
        opens_thought=bool(OPENED.search(_prompt(quiet, [question]))),
        forgets_reasoning=not _shows(thinking, [question, thought, question, answer])(_EXTRA),
    )


def _prompt(template: ChatTemplate, turns: Sequence[Mapping[str, Any]]) -> str:
    try:
        return template.render(turns, prompt=True)
    except RowRejectedError:
        return ""


def _shows(
    template: ChatTemplate,
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Callable[..., bool]:
    try:
        text = template.render(turns, tools)
    except RowRejectedError:
        text = ""
    return lambda *words: all(word in text for word in words)


def _call_style(
    template: ChatTemplate,
    question: dict[str, Any],
    answer: dict[str, Any],
    wrap: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[Literal["object", "string", "text"], bool]:
    styles: tuple[Literal["object", "string"], ...] = ("object", "string")
    for bare in (False, True):
        for style in styles:
            turns = [question, _call_turn(style, bare, wrap), wrap(_tool_turn(_EXTRA)), answer]
            for tried in (turns, turns[:2]):
                if _shows(template, tried)(_NAME, _VALUE):
                    return style, bare
    return "text", False


def _call_turn(style: str, bare: bool, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    calls = [_call_field(ToolCall(_NAME, {"place": _VALUE}), style)]
    if bare:
        return {"role": "assistant", "tool_calls": calls, "content": None}
    return {**wrap({"role": "assistant", "content": ""}), "tool_calls": calls}


def _tool_turn(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": _NAME, "tool_call_id": "000000001"}


def _call_field(call: ToolCall, style: str) -> dict[str, Any]:
    arguments = call.arguments if style == "object" else json.dumps(call.arguments, ensure_ascii=False)
    return {
        "type": "function",
        "id": call.id or "000000001",
        "function": {"name": call.name, "arguments": arguments},
    }


def _as_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn.get("content") or ""}]}


def adapt_conversation(
    conversation: Conversation, traits: TemplateCapabilities
) -> tuple[list[dict[str, Any]], list[float], list[dict[str, Any]] | None, list[str]]:
    """Return the turns in the template's format, the loss weight of each (0 for those outside the loss), the
    tools, and notes on what was changed."""
    notes: list[str] = []
    messages = list(conversation.messages)
    tools: list[dict[str, Any]] | None = list(conversation.tools) or None
    if tools and not traits.tools:
        messages = _with_system(messages, _tools_as_text(tools))
        tools = None
        notes.append("tools-as-text")
    if messages and messages[0].role == "system" and not traits.system:
        messages = _system_in_user(messages)
        notes.append("system-in-user")
    turns: list[dict[str, Any]] = []
    weights: list[float] = []
    for message in messages:
        turn, note = _turn(message, traits)
        if note:
            notes.append(note)
        turns.append(_as_parts(turn) if traits.parts else turn)
        weights.append(message.weight if message.role == "assistant" and message.train else 0.0)
    return turns, weights, tools, list(dict.fromkeys(notes))


def _turn(message: Message, traits: TemplateCapabilities) -> tuple[dict[str, Any], str]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning and not traits.reasoning and not traits.own_tags:
        turn["content"] = f"<think>\n{message.reasoning.strip()}\n</think>\n\n{message.content}"
    elif message.reasoning:
        turn["reasoning_content"] = turn["thinking"] = message.reasoning
    if message.role == "tool":
        if not traits.tool_turns:
            return {
                "role": "user",
                "content": f"<tool_response>\n{message.content}\n</tool_response>",
            }, "tool-as-user"
        turn["tool_call_id"] = message.tool_call_id or "000000001"
        if message.name:
            turn["name"] = message.name
    if message.tool_calls:
        if traits.calls == "text":
            content = "\n".join(filter(str.strip, [message.content, *map(_call_as_text, message.tool_calls)]))
            turn["content"] = turn["content"].removesuffix(message.content) + content
            return turn, "calls-as-text"
        turn["tool_calls"] = [_call_field(call, traits.calls) for call in message.tool_calls]
        if traits.calls_without_content and not turn["content"]:
            turn["content"] = None
    return turn, ""


def _call_as_text(call: ToolCall) -> str:
    """Write a call as text in the format of the Hermes models, which many templates and parsers follow."""
    written = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _tools_as_text(tools: list[dict[str, Any]]) -> str:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions:\n<tools>\n{schemas}\n</tools>\n"
        'To call one, answer with:\n<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>'
    )


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def _system_in_user(messages: list[Message]) -> list[Message]:
    system, rest = messages[0], messages[1:]
    if rest and rest[0].role == "user":
        return [Message("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:]]
    return [Message("user", system.content), *rest]
