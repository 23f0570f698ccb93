"""Answers that must satisfy a JSON schema do, with tokenizers of different kinds."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from threading import Event
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_tui.chat import completion, generation
from qlora_tui.chat.chat_types import GREEDY, ChatSource, Sampling
from qlora_tui.chat.completion_types import Completion
from qlora_tui.chat.constraints import Calls, Grammars
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.render import render_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tool_calls import call_format
from qlora_tui.errors import UserError
from tests.chat.test_completion import completed, text_of
from tests.data.test_published_templates import TEMPLATES
from tests.data.test_published_templates import _tokenizer as template_tokenizer
from tests.data.test_tool_calls import answer_text

pytestmark = pytest.mark.slow

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad", "schön"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "sure": {"type": "boolean"},
    },
    "required": ["label", "score", "tags", "sure"],
    "additionalProperties": False,
}
QUESTION = (Message("user", "what is the colour of the fox"),)


def assert_satisfied(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["label", "score", "tags", "sure"]
    assert value["label"] in SCHEMA["properties"]["label"]["enum"] and isinstance(value["sure"], bool)
    assert 0 <= value["score"] <= 99
    assert 1 <= len(value["tags"]) <= 2 and all(len(tag) <= 3 for tag in value["tags"])


@pytest.fixture(scope="module")
def session(tiny_source: ChatSource) -> ChatSession:
    return load_session(tiny_source)


def answered(session: ChatSession, **settings: Any) -> tuple[str, str, str]:
    """Thought, answer, ending."""
    asked: dict[str, Any] = {"adapter_name": "base", "sampling": GREEDY, "schema": SCHEMA, **settings}
    parts, result = completed(session, **asked)
    thought, answer = (text_of([part for part in parts if part.thought == kind]) for kind in (True, False))
    return thought, answer, result.ending


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_answer_satisfies_its_schema(session: ChatSession, seed: int | None) -> None:
    sampling = GREEDY if seed is None else Sampling(seed=seed, temperature=2.0, top_p=1, top_k=0)
    _, text, ending = answered(session, messages=QUESTION, sampling=sampling)
    assert_satisfied(text)
    assert ending == "schema satisfied"


def test_a_number_ends_where_the_model_ends_its_turn(session: ChatSession) -> None:
    sampling = Sampling(seed=1, temperature=3.0, top_p=1, top_k=0)
    _, text, ending = answered(session, messages=QUESTION, sampling=sampling, schema={"type": "integer"})
    assert isinstance(json.loads(text), int) and ending == "turn end"


def test_a_thought_is_free_and_the_answer_after_it_is_not(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = session.tokenizer.encode("is it {red}?</think>")

    class Scripted(generation.TokenSampler):
        def next(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[said.pop(0)]]) if said else super().next(logits)

    monkeypatch.setattr(completion, "TokenSampler", Scripted)
    thought, text, _ = answered(session, text="<|im_start|>assistant\n<think>\n")
    assert thought == "is it {red}?"
    assert_satisfied(text)


def metaspace_tokenizer() -> str:
    """A tokenizer in the manner of SentencePiece, with bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ['{"label": "good", "score": 12, "tags": ["a"], "sure": true}', "bad false words of all kinds"]
    tokenizer.train_from_iterator(
        words * 4, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    # As in converted tokenizers, where bytes are ordinary tokens.
    content["added_tokens"] = content["added_tokens"][:3]
    return json.dumps(content)


@pytest.mark.parametrize("seed", range(4))
def test_any_choice_of_allowed_tokens_satisfies_the_schema(seed: int) -> None:
    tokenizer = ChatTokenizer(metaspace_tokenizer(), {"eos_token": "</s>", "bos_token": "<s>"}, "")
    vocabulary = tokenizer.backend.get_vocab_size() + 60
    grammars = Grammars(tokenizer, vocabulary, tokenizer.turn_end_ids)
    constraint = grammars.constraint(SCHEMA)
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not constraint.is_satisfied:
        logits = constraint.mask(torch.randn(1, vocabulary, generator=generator))
        ids.append(int(logits.argmax()))
        constraint.add(ids[-1])
        assert len(ids) < 2000
    assert_satisfied(tokenizer.backend.decode(ids))


def test_marks_of_a_thought_may_come_before_the_answer_only(session: ChatSession) -> None:
    grammars = Grammars(session.tokenizer, 384, session.end_ids)
    constraint = grammars.constraint({"type": "boolean"}, mark_ids=[7])
    logits = torch.zeros(1, 384)
    assert constraint.mask(logits)[0, 7] == 0
    constraint.add(7)
    assert not constraint.applies(is_outside=True) and constraint.applies(is_outside=False)
    constraint.add(session.tokenizer.encode("t")[0])
    assert constraint.mask(logits)[0, 7] == -torch.inf and constraint.applies(is_outside=True)


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "place": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "sure": {"type": "boolean"},
        "near": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["place"],
}
FUNCTIONS: dict[str, Any] = {"get_weather": PARAMETERS, "get_time": {"type": "object", "properties": {}}}
TOOLS = tuple(
    {"type": "function", "function": {"name": n, "description": "d", "parameters": p}}
    for n, p in FUNCTIONS.items()
)
ARGUMENTS = {"days": 3, "place": "a <b> c", "unit": "kelvin", "sure": True, "near": [1, 2]}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "muse_glimmer"])
def test_calls_are_written_as_the_template_writes_them(name: str) -> None:
    tokenizer = template_tokenizer(name)
    written = call_format(tokenizer)
    assert written is not None and written.shape is not None
    grammars = Grammars(tokenizer, tokenizer.backend.get_vocab_size(), tokenizer.turn_end_ids)

    def text_of_calls(*calls: ToolCall) -> str:
        turns = (Message("user", "q"), Message("assistant", "", tool_calls=calls))
        text = answer_text(render_text(Conversation(turns, TOOLS), tokenizer).samples[-1], tokenizer)
        return text[text.index(written.mark or "{") :].strip()

    def fits(text: str, *, single: bool = False, **functions: Any) -> bool:
        matcher = grammars.constraint(None, Calls(written.shape, functions, single))._matcher  # type: ignore[arg-type]
        ids = tokenizer.encode(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    weather = ToolCall("get_weather", ARGUMENTS)
    one, least = text_of_calls(weather), text_of_calls(ToolCall("get_weather", {"place": "x"}))
    assert (
        fits(one, **FUNCTIONS) and fits(least, **FUNCTIONS) and fits(one, get_weather=PARAMETERS, single=True)
    )
    assert not fits(one, get_time={"type": "object"})
    assert not fits(text_of_calls(ToolCall("get_weather", {"days": 3})), **FUNCTIONS)
    assert not fits(text_of_calls(ToolCall("get_weather", {"place": "x", "more": 1})), **FUNCTIONS)
    assert not fits("It rains.", **FUNCTIONS)
    if name == "deepseek_r1_distill":
        return  # it closes the list of several calls only
    with suppress(RowRejectedError):  # some templates write a single call
        two = text_of_calls(weather, ToolCall("get_time", {}))
        assert "get_time" not in two or (fits(two, **FUNCTIONS) and not fits(two, single=True, **FUNCTIONS))


@pytest.mark.parametrize("seed", range(3))
def test_any_choice_of_allowed_tokens_is_a_call_that_is_read(session: ChatSession, seed: int) -> None:
    functions = {"label": SCHEMA, "other": SCHEMA}
    tools = tuple(
        {"type": "function", "function": {"name": n, "parameters": p}} for n, p in functions.items()
    )
    asked: dict[str, Any] = {
        "messages": QUESTION,
        "sampling": Sampling(seed=seed, temperature=2.0, top_p=1, top_k=0, max_new_tokens=600),
        "tools": tools,
        "single_call": True,
    }
    parts, result = completed(session, adapter_name="base", must_call=("label", "other"), **asked)
    (call,) = result.tool_calls
    assert_satisfied(json.dumps(call.arguments))
    assert text_of(parts) == "" and result.ending == "schema satisfied"
    # An answer by a schema may be a call instead; the functions may be called, and need not.
    parts, result = completed(session, adapter_name="base", schema={"type": "boolean"}, **asked)
    assert result.tool_calls or json.loads(text_of(parts)) in (True, False)


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/no"}, {"type": "string", "pattern": "("}, {"not": {}}]
)
def test_a_schema_that_cannot_be_used_is_an_error_in_words(session: ChatSession, schema: Any) -> None:
    with pytest.raises(UserError) as refused:
        answered(session, messages=QUESTION, schema=schema)
    assert refused.value.exit_code == 2 and "llguidance" in refused.value.what


def test_without_the_library_its_installation_is_named(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(session, "_grammars", None)
    with pytest.raises(UserError) as refused:
        answered(session, messages=QUESTION)
    assert "qlora-tui[serve]" in refused.value.fix


def test_a_schema_of_one_request_does_not_bind_another(session: ChatSession) -> None:
    sampling = replace(GREEDY, max_new_tokens=30)
    free = Completion(adapter_name="base", messages=QUESTION, sampling=sampling)
    expected = answered(session, messages=QUESTION, sampling=sampling, schema=None)[1]
    steps = [session.complete(each, Event()).run() for each in (free, replace(free, schema=SCHEMA))]
    texts = ["", ""]
    while steps:
        for number, each in reversed(list(enumerate(steps))):
            try:
                part = next(each)
                texts[number] += part.text if part else ""
            except StopIteration:
                steps = steps[:number] + steps[number + 1 :] if number else []
    assert texts[0] == expected
