"""Tool calls in the text of an answer, compared with the tools that the row offers.

Chat templates write them in different ways: ``<tool_call>{…}</tool_call>`` (Hermes, Qwen),
``[TOOL_CALLS][…]`` (Mistral), ``<function=name>{…}</function>`` (Llama 3, and with ``<parameter=…>`` inside
Qwen3-Coder), or a JSON object with a name and arguments alone (Llama 3.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tui.data.conversation import ToolCall

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>\s*(.*?)\s*</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*(.*)\Z", re.DOTALL)
_MISTRAL_NAMED = re.compile(r"\A([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(\{.*)\Z", re.DOTALL)
_BARE = re.compile(r"\A\s*(?:<\|python_tag\|>)?\s*([\[{].*)\Z", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters")


def read_calls(text: str) -> tuple[ToolCall, ...]:
    """The tool calls of an answer, in order; none where there is none, or where one of them is malformed."""
    try:
        return tuple(_calls(text))
    except (ValueError, RecursionError):
        return ()


def fits_tools(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names one of the tools and gives an object with all arguments that the tool requires.

    Args:
        call: a call that was read.
        tools: functions as JSON schemas, in OpenAI's wrapping or without it.
    """
    if not isinstance(call.arguments, dict):
        return False
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or function.get("name") != call.name:
            continue
        schema = function.get("parameters")
        if not isinstance(schema, Mapping):
            return True
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and any(name not in call.arguments for name in required):
            return False
        if schema.get("additionalProperties") is False and isinstance(properties, Mapping):
            return all(name in properties for name in call.arguments)
        return True
    return False


def same_calls(one: Sequence[ToolCall], other: Sequence[ToolCall]) -> bool:
    """Whether two answers make the same calls: names and arguments, in order."""
    return [(call.name, call.arguments) for call in one] == [(call.name, call.arguments) for call in other]


def _calls(text: str) -> list[ToolCall]:
    """Raises ValueError for a malformed call."""
    if "<tool_call>" in text:
        return [call for inner in _TAGGED.findall(text) for call in _tagged(inner)]
    if (mistral := _MISTRAL.search(text)) is not None:
        return _mistral(mistral[1].strip())
    if "<function=" in text:
        return _functions(text)
    bare = _BARE.match(text)
    return _as_calls(json.loads(bare[1])) if bare is not None else []


def _tagged(inner: str) -> list[ToolCall]:
    return _functions(inner) if inner.startswith("<function=") else _as_calls(json.loads(inner))


def _mistral(inner: str) -> list[ToolCall]:
    named = _MISTRAL_NAMED.match(inner)
    return [ToolCall(named[1], json.loads(named[2]))] if named is not None else _as_calls(json.loads(inner))


def _functions(text: str) -> list[ToolCall]:
    calls = []
    for name, inner in _FUNCTION.findall(text):
        parameters = _PARAMETER.findall(inner)
        arguments = {key: _value(value) for key, value in parameters} if parameters else json.loads(inner)
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise ValueError("A function that is not closed.")
    return calls


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _as_calls(value: Any) -> list[ToolCall]:
    """Raises ValueError where a value is no call and no list of calls."""
    calls = []
    for each in value if isinstance(value, list) else [value]:
        named = each if isinstance(each, dict) else {}
        function = named.get("function", named)
        function = function if isinstance(function, dict) else named
        key = next((key for key in _ARGUMENTS if key in function), None)
        if key is None or not isinstance(function.get("name"), str):
            raise ValueError("No name and arguments.")
        arguments = function[key]
        calls.append(
            ToolCall(function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments)
        )
    return calls
