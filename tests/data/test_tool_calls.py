"""Calls are read back as the model's own template writes them; what is no call stays text."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_tui.data.assistant_spans import SampleText
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.render import render_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tool_calls import CallText, call_format
from tests.data.families import tokenizer_json
from tests.data.test_published_templates import TEMPLATES, _tokenizer

PLAIN = ChatTokenizer(tokenizer_json(), {"eos_token": "</s>"}, "")
UNREAD = ("muse_glimmer",)
"""Its format is of another kind."""


def function(name: str) -> dict[str, Any]:
    properties = {"place": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = (function("get_weather"), function("get_time"))
CALLS = {
    "one": (
        ToolCall("get_weather", {"place": "Paris <x>\n3", "days": 3, "deep": {"a": [1, "b"], "c": None}}),
    ),
    "two": (ToolCall("get_weather", {"place": "12"}), ToolCall("get_time", {})),
    "words": (ToolCall("get_time", {"place": "naïve"}),),
}


def answer_text(sample: SampleText, tokenizer: ChatTokenizer) -> str:
    """Return what the model writes, without the end of its turn."""
    text = sample.text[sample.spans[0][0] : sample.spans[-1][1]]
    ends = [tokenizer.backend.id_to_token(each) for each in tokenizer.turn_end_ids]
    for token in ("<|END_OF_TURN_TOKEN|>", *ends):
        text = text.strip().removesuffix(token or "")
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("shape", CALLS)
def test_what_a_template_writes_is_read(name: str, shape: str) -> None:
    tokenizer, calls = _tokenizer(name), CALLS[shape]
    written = call_format(tokenizer)
    assert (written is None) == name.startswith(UNREAD)
    if written is None:
        return
    said = Message("assistant", "Let me look." if shape == "words" else "", tool_calls=calls)
    try:
        sample = render_text(Conversation((Message("user", "q"), said), TOOLS), tokenizer).samples[-1]
    except RowRejectedError:
        assert shape == "two"  # some templates write a single call
        return
    text = answer_text(sample, tokenizer)
    if shape == "two" and "get_time" not in text:
        calls = calls[:1]
    if name.startswith("lfm2_") and shape == "one":
        calls = ()  # it writes line ends into Python's strings, which is no Python
    if text.find("Let me look.") > text.find("get_time") > 0:
        calls = ()  # no model writes after its calls
    # Empty thoughts are separated before.
    text = text.removeprefix("<think>").lstrip().removeprefix("</think>").lstrip()
    for size in (1, 5, len(text)):
        answer = CallText(written, TOOLS)
        before = "".join(answer.feed(text[start : start + size]) for start in range(0, len(text), size))
        before += answer.rest()
        assert [(call.name, call.arguments) for call in answer.calls] == [
            (call.name, call.arguments) for call in calls
        ]
        assert not calls or not written.mark or written.mark not in before
        assert ("Let me look." in before) == ("Let me look." in text)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_of_calls_that_are_cut_the_complete_ones_are_read(name: str) -> None:
    tokenizer, calls = _tokenizer(name), CALLS["two"]
    written = call_format(tokenizer)
    if written is None or written.shape is None or not written.shape.further:
        return
    said = (Message("user", "q"), Message("assistant", "", tool_calls=calls))
    text = answer_text(render_text(Conversation(said, TOOLS), tokenizer).samples[-1], tokenizer)
    text = text.removeprefix("<think>").lstrip().removeprefix("</think>").lstrip()
    second = text.find("get_time")
    assert second > 0
    read = []
    for end in range(len(text)):
        answer = CallText(written, TOOLS)
        before = answer.feed(text[:end])
        rest = answer.rest(is_cut=True)
        read.append(answer.calls)
        assert not (rest and answer.calls) and before + rest == ("" if answer.calls else text[:end])
        assert answer.calls in ((), calls[:1], calls)
    assert read[: second + 9] == sorted(read[: second + 9], key=len)
    assert read[second] == calls[:1] and not any(read[: text.find("12")])


def test_a_call_that_must_be_made_is_never_text() -> None:
    written = call_format(PLAIN)
    assert written is not None
    answer = CallText(written, TOOLS, must_call=True)
    assert answer.feed('<tool_call>\n{"name": "get_wea') + answer.rest(is_cut=True) == ""
    assert not answer.calls


@pytest.mark.parametrize(
    "text",
    [
        "It is a <tool_call> that one writes.",
        "<tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"pla',
        '<tool_call>\n{"name": "no_such", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call> and more',
        '<tool_call>\n{"name": ["get_weather"]}\n</tool_call>',
        "<tool_call>\n17\n</tool_call>",
        "1 < 2, <tool_cal",
        "<tool_call>" + "[" * 5000,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    written = call_format(PLAIN)
    assert written is not None
    answer = CallText(written, TOOLS)
    assert "".join(map(answer.feed, text)) + answer.rest() == text
    assert not answer.calls


def test_text_before_a_call_is_not_held_back() -> None:
    written = call_format(PLAIN)
    assert written is not None
    answer = CallText(written, TOOLS)
    assert answer.feed("I look. <tool") == "I look. "
    assert answer.feed("s>") == "<tools>"
    assert answer.feed('<tool_call>{"name": "get_time"}</tool_call>') == answer.rest() == ""
    assert answer.calls == (ToolCall("get_time", {}),)
