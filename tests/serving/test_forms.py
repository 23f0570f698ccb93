"""Requests and replies in OpenAI's form, without a server: tools, thoughts, counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qlora_tui.chat.completion_types import (
    Completion,
    CompletionPart,
    CompletionResult,
    LikelyToken,
    TokenScore,
)
from qlora_tui.data.conversation import Message, ToolCall
from qlora_tui.serving import app, replies
from qlora_tui.serving.app import Figures, make_app
from qlora_tui.serving.errors import ApiError
from qlora_tui.serving.guest import Guest
from qlora_tui.serving.model_names import ServedModel
from qlora_tui.serving.requests import ChatBody, CompletionBody, DecideBody, decode_body

MODEL = ServedModel("run", "run", "on")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**given: Any) -> ChatBody:
    body = {"model": "run", "messages": [{"role": "user", "content": "hi"}], **given}
    return decode_body(json.dumps(body).encode(), ChatBody)


def result(**facts: Any) -> CompletionResult:
    return CompletionResult(
        **{
            "ending": "turn end",
            "prompt_tokens": 7,
            "reused_tokens": 3,
            "new_tokens": 5,
            "first_token_s": 0.1,
            "tokens_per_s": 10.0,
            **facts,
        }
    )


def test_a_conversation_with_tools_reaches_the_engine() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Look it up.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    (completion,) = chat(
        messages=messages,
        tools=[TOOL],
        tool_choice="auto",
        max_completion_tokens=9,
        chat_template_kwargs={"enable_thinking": False},
    ).completions(MODEL, 100)
    assert completion.messages == (
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message(
            "assistant",
            "",
            reasoning="Look it up.",
            tool_calls=(ToolCall("weather", {"city": "Oslo"}, "c1"),),
        ),
        Message("tool", "rain", tool_call_id="c1"),
    )
    assert completion.tools == (TOOL,)
    assert completion.sampling.max_new_tokens == 9
    assert completion.template_variables == {"enable_thinking": False}
    # The run's own setting decides where a request says nothing.
    assert completion.thinking == "on"
    (without,) = chat(tools=[TOOL], tool_choice="none").completions(MODEL, 100)
    assert without.tools == ()
    assert without.sampling.max_new_tokens == 100


def test_thoughts_and_calls_are_apart_from_the_answer() -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    choice = replies.Choice(0, body)
    calls = (ToolCall("weather", {"city": "Oslo"}), ToolCall("time", "not JSON", "c2"))
    parts = (
        CompletionPart("Let me", thought=True),
        CompletionPart(" see.", thought=True),
        CompletionPart("Well:"),
        result(tool_calls=calls, thought_tokens=2),
    )
    shown = [each for part in parts for each in choice.take(part)]
    chunks = [ChatCompletionChunk.model_validate(replies.chunk(body, "id", [each])) for each in shown]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert "".join(delta.content or "" for delta in deltas) == "Well:"
    assert [call.index for call in deltas[-1].tool_calls or ()] == [0, 1]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # As OpenAI's client puts a stream together.
    together = ChatCompletionStreamState()
    for chunk in chunks:
        together.handle_chunk(chunk)
    made = together.get_final_completion().choices[0].message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in made or ()] == [
        ("weather", '{"city":"Oslo"}'),
        ("time", "not JSON"),
    ]

    whole = ChatCompletion.model_validate(replies.whole(body, [choice]))
    message: Any = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Well:")
    assert [call.function.arguments for call in message.tool_calls] == ['{"city":"Oslo"}', "not JSON"]
    assert message.tool_calls[1].id == "c2" and message.tool_calls[0].id
    assert whole.choices[0].finish_reason == "tool_calls"
    usage = whole.usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (7, 5)
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 2


@pytest.mark.parametrize(
    ("ending", "calls", "reason"),
    [
        ("turn end", (), "stop"),
        ("turn end", (ToolCall("weather", {}),), "tool_calls"),
        ("stop text", (), "stop"),
        ("most tokens", (), "length"),
        # The next one was cut.
        ("most tokens", (ToolCall("weather", {}),), "length"),
        ("context full", (), "length"),
    ],
)
def test_why_an_answer_ended(ending: str, calls: tuple[ToolCall, ...], reason: str) -> None:
    choice = replies.Choice(0, chat(stream=True))
    *_, last = choice.take(result(ending=ending, tool_calls=calls))
    assert last["finish_reason"] == reason


def test_a_prompt_with_several_answers_counts_once_and_offsets_add_up() -> None:
    given = {"model": "run", "prompt": ["a", "b"], "n": 2, "logprobs": 1}
    body = decode_body(json.dumps(given).encode(), CompletionBody)
    assert [each.text for each in body.completions(MODEL, 100)] == ["a", "a", "b", "b"]
    choices = [replies.Choice(index, body) for index in range(4)]
    token = TokenScore(5, "xy", -0.5, (LikelyToken(6, "z", -0.1),))
    for choice in choices:
        for part in (CompletionPart("xy", tokens=(token,)), CompletionPart("xy", tokens=(token,)), result()):
            list(choice.take(part))
    whole = TextCompletion.model_validate(replies.whole(body, choices))
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (14, 20)
    scores = whole.choices[3].logprobs
    assert scores is not None and scores.text_offset == [0, 2]
    assert scores.top_logprobs == [{"xy": -0.5, "z": -0.1}] * 2


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pass

    figures = Figures()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    await make_app(cast(Guest, None), figures)(scope, receive, send)
    assert figures.statuses == {499: 1}


class Stuck:
    """A guest whose engine never answers; also the list of its models."""

    async def models_now(self) -> Stuck:
        return self

    def find(self, name: str) -> ServedModel:
        return MODEL

    async def loaded(self) -> SimpleNamespace:
        return SimpleNamespace(context_tokens=100)

    async def complete(self, completion: Completion) -> AsyncGenerator[CompletionPart]:
        await asyncio.Event().wait()
        yield CompletionPart("late")


@pytest.mark.parametrize(("sent", "status"), [(b"", 408), (b'{"model": "run", "prompt": "a"}', 504)])
async def test_what_takes_too_long_is_ended_in_words(
    sent: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that does not arrive, and an answer that does not end."""
    for limit in ("BODY_S", "ANSWER_S"):
        monkeypatch.setattr(app, limit, 0.01)
    pieces = [{"type": "http.request", "body": sent}] if sent else []
    replies_sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return pieces.pop() if pieces else await asyncio.Event().wait()  # type: ignore[return-value]  # never

    async def send(message: Any) -> None:
        replies_sent.append(message)

    figures = Figures()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    await make_app(cast(Guest, Stuck()), figures)(scope, receive, send)
    assert figures.statuses == {status: 1} and (figures.open, figures.rows) == (0, 0)
    assert json.loads(replies_sent[1]["body"])["error"]["code"] == "timeout"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**given).completions(MODEL, 100)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_schema_for_a_text_to_continue_is_refused() -> None:
    given = {"model": "run", "prompt": "a", "max_tokens": 0}
    body = decode_body(json.dumps({**given, "response_format": {"type": "text"}}).encode(), CompletionBody)
    assert len(body.completions(MODEL, 100)) == 1
    body = decode_body(
        json.dumps({**given, "response_format": {"type": "json_object"}}).encode(), CompletionBody
    )
    with pytest.raises(ApiError) as refused:
        body.completions(MODEL, 100)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("given", "param"), [({"input": " \n"}, "input"), ({"messages": []}, "messages"), ({}, "messages")]
)
def test_nothing_to_decide_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        _ = decode_body(json.dumps({"model": "run", **given}).encode(), DecideBody).conversation
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_changes_nothing_or_is_unknown_is_ignored() -> None:
    chat(frequency_penalty=0.0, logit_bias=None, modalities=["text"], best_of=1, user="me", banana=1)
    (completion,) = chat(top_k=-1, seed=-1, reasoning_effort="none").completions(MODEL, 100)
    assert completion.sampling.top_k == 0
    assert completion.sampling.seed == 2**32 - 1
    assert completion.thinking == "off"
