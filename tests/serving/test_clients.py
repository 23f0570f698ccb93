"""The official client of OpenAI, against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from qlora_tui.chat.chat_types import ChatSource, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import Generate, LoadChat
from tests.serving.conftest import FIRST, KEY, SECOND, Served
from tests.support.quick_starts import TRAINING_MODULES
from tests.support.trainer_processes import Trainers

pytestmark = pytest.mark.slow

QUESTION: Any = [{"role": "user", "content": "what is the colour of the fox"}]
PROPERTIES: dict[str, dict[str, Any]] = {
    "get_weather": {"unit": {"enum": ["c", "k"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "get_time": {"zone": {"const": "utc"}},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "properties": p,
                "type": "object",
                "additionalProperties": False,
                "required": list(p),
            },
        },
    }
    for name, p in PROPERTIES.items()
]
GREEDY_SHORT: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0)


def test_models_are_base_runs_checkpoints_and_aliases(client: openai.OpenAI) -> None:
    names = [FIRST, f"{FIRST}:2", SECOND, f"{SECOND}:7"]
    assert [model.id for model in client.models.list()] == ["base", *names, "gpt-4o-mini"]
    assert client.models.retrieve(f"{FIRST}:2").id == f"{FIRST}:2"


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=FIRST, **GREEDY_SHORT)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    chunks = list(
        client.chat.completions.create(
            model=FIRST, **GREEDY_SHORT, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_seeds_decide_and_each_of_n_has_its_own(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(
            model=FIRST, messages=QUESTION, temperature=1.5, seed=7, n=3, max_tokens=12
        )
        return [choice.message.content for choice in answer.choices]

    assert texts() == texts()
    assert len(set(texts())) == 3


def test_a_stop_text_ends_the_answer_before_itself(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=FIRST, prompt="the quick", temperature=0, max_tokens=24)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = client.completions.create(
        model=FIRST, prompt="the quick", temperature=0, max_tokens=24, stop=[stop, "never"]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_prompts_are_scored_in_the_form_of_completions(client: openai.OpenAI) -> None:
    """What lm-eval asks for: the prompt's own tokens with their log probabilities, and one more."""
    prompts = ["the quick brown fox", "a wise old owl"]
    answer = client.completions.create(
        model="base", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert scores is not None and scores.tokens and scores.token_logprobs and scores.top_logprobs
        assert choice.text.startswith(prompt)
        assert "".join(scores.tokens) == choice.text
        assert scores.text_offset is not None and scores.text_offset[1] == len(scores.tokens[0])
        assert scores.token_logprobs[:1] == [None]
        assert all(score is not None and score <= 0 for score in scores.token_logprobs[1:])
        # Greedy: the generated one is the most likely.
        assert scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values())
    # Read alone, the prompt has the same scores.
    read = client.completions.create(model="base", prompt=prompts[0], max_tokens=0, logprobs=1, echo=True)
    first, alone = answer.choices[0].logprobs, read.choices[0].logprobs
    assert read.choices[0].text == prompts[0]
    assert first is not None and first.token_logprobs and alone is not None and alone.token_logprobs
    assert alone.token_logprobs[1:] == pytest.approx(first.token_logprobs[1:-1], abs=1e-4)


def test_a_prompt_may_be_token_ids(client: openai.OpenAI) -> None:
    ids = [[10, 11, 12], [20, 21]]
    both = client.completions.create(model=FIRST, prompt=ids, temperature=0, max_tokens=5)
    one = client.completions.create(model=FIRST, prompt=ids[1], temperature=0, max_tokens=5)
    assert both.choices[1].text == one.choices[0].text
    assert both.usage is not None and both.usage.prompt_tokens == 5


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=FIRST, **GREEDY_SHORT, logprobs=True, top_logprobs=3)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None
    assert len(scores.content) == 12
    for token in scores.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)


def test_an_answer_can_be_made_to_follow_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=FIRST,
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "fox", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["colour"] in ("red", "blue")
    assert value.keys() == {"colour", "count"}


@pytest.mark.parametrize("stream", [False, True])
def test_functions_are_called_as_the_client_chose(client: openai.OpenAI, stream: bool) -> None:
    def ask(choice: Any, **settings: Any) -> tuple[list[tuple[str, dict[str, Any]]], str]:
        asked = {"model": FIRST, "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, **settings}
        given: Any = client.chat.completions.create(temperature=0, max_tokens=300, stream=stream, **asked)
        chunks = list(given) if stream else [given]
        said = [chunk.choices[0].delta if stream else chunk.choices[0].message for chunk in chunks]
        calls = [call for each in said for call in each.tool_calls or ()]
        assert (chunks[-1].choices[0].finish_reason == "tool_calls") == bool(calls)
        named = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        return named, "".join(each.content or "" for each in said)

    first, *_ = calls = ask("required", parallel_tool_calls=False)[0]
    assert len(calls) == 1 and first[1].keys() == {"unit", "days"}
    chosen, text = ask({"type": "function", "function": {"name": "get_time"}})
    assert chosen == [("get_time", {"zone": "utc"})] and not text
    # A model that was never trained to calls none.
    assert ask("none")[1] and not ask("auto")[0]
    for wrong, tools in (
        ("must", TOOLS),
        ("required", []),
        ({"type": "function", "function": {"name": "none"}}, TOOLS),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(wrong, tools=tools)
        assert "tool_choice" in str(refused.value)


def test_a_json_object_and_an_impossible_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=QUESTION,
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="base",
            messages=QUESTION,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "odd", "schema": {"type": "no such type"}},
            },
        )


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, FIRST),
        ({"model": FIRST, "temperature": 9}, openai.BadRequestError, "temperature"),
        ({"model": FIRST, "messages": []}, openai.BadRequestError, "messages"),
        (
            {"model": FIRST, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "image_url",
        ),
    ],
)
def test_errors_are_the_exceptions_of_the_client(
    client: openai.OpenAI, body: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"messages": QUESTION, **body})
    assert words in raised.value.message
    assert isinstance(raised.value.body, dict) and raised.value.body["type"]


def test_a_wrong_key_is_refused(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0).models.list()


async def test_many_clients_get_the_answers_of_the_chat(
    served: Served, tiny_source: ChatSource, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 at a time over two adapters and the base: each answer is that of the chat screen."""
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
    sampling = Sampling(temperature=0.0, max_new_tokens=16)
    names = {"base": "base", FIRST: "adapter", SECOND: "step-2"}
    questions = ["what is red", "who is the owl", "how many are there", "where is the lazy dog and the fox"]
    expected = {}
    async with EngineClient() as engine:
        await engine.ask(LoadChat(source=tiny_source)).result()
        for name, adapter in names.items():
            for question in questions:
                request = Generate(
                    messages=(Message("user", question),), adapter_name=adapter, sampling=sampling
                )
                expected[name, question] = (await engine.ask(request).result()).text
    assert len(set(expected.values())) > len(questions) * 2
    async with openai.AsyncOpenAI(base_url=served.url, api_key=KEY, max_retries=0) as client:

        async def answer(name: str, question: str) -> str:
            messages: Any = [{"role": "user", "content": question}]
            done = await client.chat.completions.create(
                model=name, messages=messages, temperature=0, max_tokens=16
            )
            return done.choices[0].message.content or ""

        asked = [list(expected)[i % len(expected)] for i in range(32)]
        answers = await asyncio.gather(*(answer(*each) for each in asked))
    assert answers == [expected[each] for each in asked]


def test_what_open_webui_sends_is_understood(served: Served) -> None:
    """Its request as built by apply_model_params_to_body_openai (utils/payload.py) and routers/openai.py.

    open-webui/open-webui, commit 227ce3f63e9eabf4cbdff5f13be7967a869e0d91. Parameters that a user has not set
    are left out; those set to what changes nothing are sent as they are.
    """
    body = {
        "stream": True,
        "model": FIRST,
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "text", "text": "what is red"}]},
        ],
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.0,
        "max_tokens": 8,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "reasoning_effort": "low",
        "seed": 42,
        "stop": ["User:"],
        "logit_bias": {},
        "response_format": {"type": "text"},
        "features": {"web_search": False},
    }
    headers = {"X-OpenWebUI-User-Name": "someone", "Accept": "*/*"}
    with served.client(**headers) as client, client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1]["usage"]["completion_tokens"] == 8
