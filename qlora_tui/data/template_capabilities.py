"""Capabilities of a chat template, found by probing: system turns, tools, typed parts, thinking.

``adapt_conversation`` converts a conversation to the messages that a template reads. Tool calls, tool
results, tool descriptions or a system prompt that the template would lose are written into the text of a turn
that it keeps. Every such change is a note for the Data screen.

Templates of hybrid models read a variable: ``enable_thinking`` (Qwen3, SmolLM3, GLM-4.5, Gemma 4, Nemotron),
``thinking`` (DeepSeek-V3.1, Granite), ``reasoning_effort`` (gpt-oss). ``switch_of`` finds the variable by
name and probes its effect. ``resolve_thinking`` chooses on or off for one conversation, ``without_reasoning``
removes the reasoning from one. Training and chat both use these functions, so a model gets the same prompts
as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.chat_template import ChatTemplate, Turns
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.recipe.schema import Thinking


class TemplateCapabilities(Struct, frozen=True):
    """The features that a template supports, and the message format it needs."""

    system: bool
    """Whether the template writes a system turn; otherwise system text goes before the first user turn."""
    parts: bool
    """Whether the template needs content as a list of typed parts, because it drops plain strings."""
    tools: bool
    """Whether the template writes the descriptions of tools."""
    calls: Literal["object", "string", "text"]
    """Form of tool calls: arguments as an object or as a JSON string, or calls only as text of the turn."""
    calls_without_content: bool
    """Whether a turn with calls and no text must have None as its content."""
    words_hide_calls: bool
    """Whether the template omits the tool calls of a turn that also has text. For such templates, the text is
    left out to keep the calls.
    """
    reasoning: bool
    """Whether the template writes ``reasoning_content``; if not, the content has it in ``<think>`` tags."""
    own_tags: bool
    """Whether the model uses tags other than ``<think>``.

    If so, and the template does not write the reasoning, ``assistant_spans`` inserts it after the prompt.
    """
    tool_turns: bool
    """Whether the template writes tool turns; otherwise their text is given as a user turn."""
    switch: Switch | None
    """The variable that turns thinking on or off; None if the template has none."""
    opens_thought: bool
    """Whether the template's prompt opens a thought regardless of the switch."""
    forgets_reasoning: bool
    """Whether the template omits the reasoning of every answer except the last."""

    @property
    def thinks(self) -> bool:
        """Return whether the template belongs to a thinking model."""
        return self.switch is not None or self.opens_thought

    def example(self, question: str, answer: str) -> list[dict[str, Any]]:
        """Return a conversation of one question and its answer, in the format that the template needs."""
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return list(map(_as_parts if self.parts else dict, turns))


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
        words_hide_calls=style != "text"
        and not _shows(template, [question, {**call_turn, **answer}, wrap(_TOOL_TURN), answer])(
            _NAME, _VALUE
        ),
        reasoning=reasoning,
        own_tags=own_tags,
        tool_turns=_shows(template, [question, call_turn, wrap(_TOOL_TURN), answer])(_EXTRA, _ANSWER),
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
            turns = [question, _call_turn(style, bare, wrap), wrap(_TOOL_TURN), answer]
            for tried in (turns, turns[:2]):
                if _shows(template, tried)(_NAME, _VALUE):
                    return style, bare
    return "text", False


def _call_turn(style: str, bare: bool, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    calls = [_call_field(ToolCall(_NAME, {"place": _VALUE}), style)]
    if bare:
        return {"role": "assistant", "tool_calls": calls, "content": None}
    return {**wrap({"role": "assistant", "content": ""}), "tool_calls": calls}


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
    """Return a conversation in the template's format.

    Returns:
        The turns, the loss weight of each (0 for turns outside the loss), the tools, and notes on all
            changes.
    """
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
        hidden = traits.words_hide_calls and message.content.strip()
        if hidden:
            turn["content"] = turn["content"].removesuffix(message.content)
        if traits.calls_without_content and not turn["content"]:
            turn["content"] = None
        return turn, "answer-changed" if hidden else ""
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


OnOff = Literal["on", "off"]

_FLAGS = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
"""Names of variables that are true or false."""
_EFFORTS = ("reasoning_effort", "reasoning_strength")
"""Names of variables that are ``low``, ``medium`` or ``high``; some templates accept ``none``."""

THOUGHT_TAGS = ("<think>", "</think>")
"""Tags around thoughts in an answer, whether or not the tokenizer declares them as special tokens."""
OPENED = re.compile(r"<think>(\s*)\Z")
"""Pattern of a prompt that opens a thought, with the white space after the tag."""


class Switch(Struct, frozen=True):
    """The template variable that turns thinking on or off."""

    variable: str
    on: dict[str, Any]
    """Variables that turn thinking on; empty for an effort variable if the template thinks by default."""
    off: dict[str, Any]
    default: OnOff
    """Whether the template thinks if the variable is not set."""
    can_turn_off: bool = True
    """Whether ``off`` really stops thinking. False for a reasoning-effort variable without the level
    ``none``: at its lowest level, ``low``, the model still thinks.
    """


def switch_of(template: ChatTemplate, turns: Turns) -> Switch | None:
    """Find the template's switch for thinking by rendering the conversation ``turns``. Return None if there
    is none.
    """

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
    """Return the setting for one conversation: ``auto`` becomes ``on`` if an answer has reasoning, otherwise
    ``off``.

    If the template has effort levels but cannot turn thinking off, ``auto``, the template's default, is
    returned instead of ``off``.
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
    """Return the reasoning of an answer, from its own field or from the text; empty if there is none."""
    return (message.reasoning or _inline(message)[0]).strip()


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without reasoning."""
    split = [(message, _inline(message)[1]) for message in messages]
    return tuple(
        replace(message, reasoning="", content=rest)
        if message.reasoning or rest != message.content
        else message
        for message, rest in split
    )


def separate_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with reasoning inside an answer moved to ``Message.reasoning``."""
    split = [(message, *_inline(message)) for message in messages]
    return tuple(
        replace(message, reasoning=inside, content=rest) if inside and not message.reasoning else message
        for message, inside, rest in split
    )


def _inline(message: Message) -> tuple[str, str]:
    """Split an answer into the reasoning in its text and the rest."""
    before, tag, rest = message.content.partition("</think>")
    if message.role != "assistant" or not tag:
        return "", message.content
    opening, opened, inside = before.partition("<think>")
    if opened and opening.strip():
        return "", message.content
    return (inside if opened else before).strip(), rest.lstrip()


THINK = ("<think>\n", "\n</think>\n\n")
"""Text that most models write before and after their reasoning."""
_GEMMA = ("<|channel>thought\n", "\n<channel|>")
TAGS = re.compile("</?think>")
_ENDS = re.compile(r"\s*(?:</think>|<channel\|>|<\|end\|>|<\|eom\|>|\[/THINK\])\s*")
"""Pattern between reasoning and answer: Qwen, GLM and DeepSeek; Gemma 4; gpt-oss; Muse; Mistral."""


def after_thought(text: str, end: int) -> int:
    """Return where the answer begins in ``text`` after reasoning that ends at character ``end``."""
    match = _ENDS.match(text, end)
    return match.end() if match else end


def tags_of(literals: str) -> tuple[str, str]:
    """Return the tags around reasoning for a template that writes ``literals``."""
    return _GEMMA if "<channel|>" in literals else THINK


def answered(prompt: str, reasoning: str, rest: str, tags: tuple[str, str] = THINK) -> str:
    """Join a prompt, the reasoning, and ``rest``: the answer and the end of its turn.

    The tags are on separate lines, unless the prompt opens the thought without a line end, as in
    DeepSeek-V3.1.
    """
    opened = OPENED.search(prompt)
    # White space after reasoning is taken from the file; before an answer without reasoning, from the answer.
    answer = re.sub(r"\A\s*</think>\s*", "", rest.lstrip() if reasoning else rest)
    if opened and not opened[1]:
        return f"{prompt}{reasoning}</think>{answer}"
    opening, closing = tags
    return f"{prompt}{'' if opened else opening}{reasoning}{closing}{answer}"


_QUESTION, _ANSWER, _SYSTEM, _NAME, _VALUE, _EXTRA = (
    "qvzask",
    "qvzanswer",
    "qvzsystem",
    "qvzname",
    "qvzvalue",
    "qvzfound",
)
"""Probe words that no template itself writes."""
_TOOL_TURN = {"role": "tool", "content": _EXTRA, "name": _NAME, "tool_call_id": "000000001"}
