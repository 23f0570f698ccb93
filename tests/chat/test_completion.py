"""Completions for programs, against the chat's answers and transformers' log probabilities."""

from __future__ import annotations

from threading import Event
from typing import Any

import msgspec
import pytest

from qlora_tui.chat.chat_types import GREEDY, ChatSource, Sampling
from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult, TokenScore
from qlora_tui.data.conversation import Message, ToolCall
from qlora_tui.data.thought_splitter import ThoughtSplitter, marks_in_template
from qlora_tui.errors import UserError

pytestmark = pytest.mark.slow

QUESTION = (Message("user", "what is the colour of the fox"),)
LONG = msgspec.structs.replace(GREEDY, max_new_tokens=24)


@pytest.fixture(scope="module")
def session(tiny_source: ChatSource) -> Any:
    from qlora_tui.chat.loading import load_session

    return load_session(tiny_source)


def completed(
    session: Any, stopping: Event | None = None, **settings: Any
) -> tuple[list[CompletionPart], Any]:
    """The parts of a completion, and its result."""
    asked: dict[str, Any] = {"adapter_name": "adapter", "sampling": LONG, **settings}
    steps = session.complete(Completion(**asked), stopping or Event()).run()
    parts: list[CompletionPart] = []
    while True:
        try:
            part = next(steps)
        except StopIteration as end:
            assert isinstance(end.value, CompletionResult)
            return parts, end.value
        if part is not None:
            parts.append(part)


def text_of(parts: list[CompletionPart]) -> str:
    return "".join(part.text for part in parts)


def scores_of(parts: list[CompletionPart]) -> list[TokenScore]:
    return [token for part in parts for token in part.tokens]


@pytest.mark.parametrize("adapter_name", ["base", "adapter", "step-2"])
@pytest.mark.parametrize("sampling", [LONG, Sampling(seed=3, max_new_tokens=24, repetition_penalty=1.2)])
def test_a_completion_is_the_answer_of_the_chat(session: Any, adapter_name: str, sampling: Sampling) -> None:
    reply = session.ask(QUESTION, adapter_name=adapter_name, sampling=sampling)
    expected = "".join(piece.text for piece in reply)
    prompt = tuple(session.prompt(QUESTION))
    prompts: list[dict[str, Any]] = [
        {"messages": QUESTION},
        {"token_ids": prompt},
        {"text": session.tokenizer.decode(prompt)},
    ]
    for given in prompts:
        parts, result = completed(session, adapter_name=adapter_name, sampling=sampling, **given)
        assert text_of(parts) == expected
        assert (result.ending, result.new_tokens) == (reply.outcome.ending, reply.outcome.new_tokens)
        assert result.prompt_tokens == len(prompt)


def test_a_stop_text_ends_the_answer_wherever_tokens_begin(session: Any) -> None:
    whole = text_of(completed(session, messages=QUESTION)[0])
    for start in range(1, len(whole) - 7, 4):
        stop = whole[start : start + 7]
        parts, result = completed(session, messages=QUESTION, stop=(stop, "no such text"), logprobs=0)
        expected = whole[: whole.index(stop)]
        assert (text_of(parts), result.ending, result.stop_text) == (expected, "stop text", stop)
        # No token of the stop text is told, except one that begins before it.
        ids = [score.token_id for score in scores_of(parts)]
        assert session.decode(ids).startswith(expected)
        assert len(session.decode(ids[:-1])) <= len(expected)
    parts, result = completed(session, messages=QUESTION, stop=(whole + "no more",))
    assert (text_of(parts), result.ending) == (whole, "most tokens")


def test_a_stop_text_in_a_thought_does_not_end_it() -> None:
    from qlora_tui.chat.completion import CompletionText
    from qlora_tui.chat.generation import IncrementalDetokenizer

    splitter = ThoughtSplitter(marks_in_template(""), in_thought=True)
    text = CompletionText(IncrementalDetokenizer(lambda ids: bytes(ids).decode()), splitter, ["END"])
    parts = [part for byte in b"an END</think> the ENDING" for part in text.add(byte)] + text.rest()
    assert "".join(part.text for part in parts if part.thought) == "an END"
    assert "".join(part.text for part in parts if not part.thought) == "the "
    assert text.stop_text == "END"


def reference(session: Any, token_ids: list[int]) -> Any:
    """Log probabilities (tokens, vocabulary) by the library."""
    import torch

    with torch.inference_mode(), session._adapters.through_peft("adapter"):
        logits = session._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("answers", [True, False])
def test_tokens_have_the_log_probabilities_of_the_library(
    session: Any, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qlora_tui.chat import completion

    monkeypatch.setattr(completion, "_SCORED_TOKENS", 7)
    prompt = session.prompt(QUESTION)
    parts, result = completed(session, messages=QUESTION, logprobs=3, echo=True, answers=answers)
    scores = scores_of(parts)
    ids = [score.token_id for score in scores]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + result.new_tokens
    assert result.new_tokens == (24 if answers else 0)
    echoed = text_of([part for part in parts if part.is_prompt])
    assert echoed == session.tokenizer.decode(prompt) == "".join(s.text for s in scores[: len(prompt)])
    assert scores[0].logprob is None and not scores[0].top
    expected = reference(session, ids)
    best = expected.topk(3, dim=-1)
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(float(expected[place, score.token_id]), abs=1e-3)
        assert [likely.logprob for likely in score.top] == pytest.approx(
            best.values[place].tolist(), abs=1e-3
        )
        # The same number, by which programs find out whether a token is the likeliest.
        same = [likely.logprob for likely in score.top if likely.token_id == score.token_id]
        assert same in ([], [score.logprob])
    assert torch.allclose(expected.exp().sum(-1), torch.ones(len(ids)), atol=1e-3)


def test_scores_come_with_the_text_of_their_tokens(session: Any) -> None:
    parts, _ = completed(session, messages=QUESTION, logprobs=0)
    assert session.decode([score.token_id for score in scores_of(parts)]) == text_of(parts)
    assert all(part.tokens for part in parts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": ""}, "no token"),
        ({"token_ids": (5, 384)}, "outside the range 0 to 383"),
        ({"token_ids": (-1,)}, "outside"),
        ({"token_ids": (5,) * 2048}, "2,048 tokens"),
        ({"messages": QUESTION, "template_variables": {"messages": 1}}, "messages"),
        ({"messages": QUESTION, "adapter_name": "step-3"}, "step-3"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(session: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        completed(session, **given)
    assert words in refused.value.what and refused.value.exit_code == 2


@pytest.mark.parametrize("asked", ["text", "messages"])
def test_of_a_prompt_far_beyond_the_context_only_the_beginning_is_tokenized(
    session: Any, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "red blue " * 100_000
    characters: list[int] = []
    tokenizer = type(session.tokenizer)
    encode, encode_marked = tokenizer.encode, tokenizer.encode_marked

    def counting(self: Any, text: str) -> Any:
        characters.append(len(text))
        return encode(self, text)

    def counting_marked(self: Any, texts: Any, places: Any) -> Any:
        characters.extend(map(len, texts))
        return encode_marked(self, texts, places)

    monkeypatch.setattr(tokenizer, "encode", counting)
    monkeypatch.setattr(tokenizer, "encode_marked", counting_marked)
    given: Any = text if asked == "text" else (Message("user", text),)
    with pytest.raises(UserError, match="more than 4,096 tokens"):
        completed(session, **{asked: given})
    assert 0 < sum(characters) < len(text) / 10


def test_a_whole_context_is_scored_though_nothing_can_follow(session: Any) -> None:
    parts, result = completed(session, token_ids=(5,) * 2048, logprobs=0, echo=True, answers=False)
    assert (len(scores_of(parts)), result.ending) == (2048, "most tokens")


def test_a_stop_request_ends_prompt_and_answer(session: Any) -> None:
    stop = Event()
    stop.set()
    assert completed(session, stop, messages=QUESTION)[1].new_tokens == 0
    stop.clear()
    steps = session.complete(Completion(adapter_name="base", messages=QUESTION), stop).run()
    next(steps)
    stop.set()
    with pytest.raises(StopIteration) as ended:
        while True:
            next(steps)
    assert (ended.value.value.ending, ended.value.value.new_tokens) == ("stopped", 1)


def test_calls_are_told_apart_from_the_answer(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qlora_tui.chat import completion, generation

    said: list[int] = []

    class Scripted(generation.TokenSampler):
        def next(self, logits: Any) -> Any:
            return torch.tensor([[said.pop(0)]])

    monkeypatch.setattr(completion, "TokenSampler", Scripted)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "fox"}}\n</tool_call>'
    for text, calls in ((call, (ToolCall("look", {"at": "fox"}),)), (call[:-20], ())):
        said[:] = [*session.tokenizer.encode(f"the fox {text}"), *session.end_ids]
        sampling = msgspec.structs.replace(GREEDY, max_new_tokens=200)
        parts, result = completed(session, messages=QUESTION, tools=(tool,), sampling=sampling, logprobs=0)
        assert result.tool_calls == calls
        assert text_of(parts) == ("the fox " if calls else f"the fox {text}")
        assert len(scores_of(parts)) == result.new_tokens
    for single, number in ((False, 2), (True, 1)):
        said[:] = [*session.tokenizer.encode(f"{call}\n{call}"), *session.end_ids]
        asked: Any = {"messages": QUESTION, "tools": (tool,), "single_call": single, "sampling": sampling}
        assert len(completed(session, **asked)[1].tool_calls) == number
    # Cut by the most tokens, the second call is neither one nor text.
    said[:] = tokens = session.tokenizer.encode(f"the fox {call}\n{call[:-20]}")
    asked = {"messages": QUESTION, "tools": (tool,), "logprobs": 0}
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=len(tokens))
    parts, result = completed(session, sampling=sampling, **asked)
    assert (text_of(parts), len(result.tool_calls), result.ending) == ("the fox ", 1, "most tokens")
    assert len(scores_of(parts)) == len(tokens)
    said[:] = [*session.tokenizer.encode(call), *session.end_ids]
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=200)
    parts, result = completed(session, messages=QUESTION, sampling=sampling)
    assert (text_of(parts), result.tool_calls) == (call, ())
