"""Decoding steps of a GPU, recorded on a CPU by a tape: answers, and what is done where a record is wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from inspect import getclosurevars
from threading import Event
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from qlora_tui.chat import decoding
from qlora_tui.chat.chat_types import ADAPTER, BASE, GREEDY, ChatSource, GenerationResult, Sampling
from qlora_tui.chat.completion_types import Completion
from qlora_tui.chat.decoding import DecodeSteps, Function, GrowingLayer, Record
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from tests.chat.adapters import make_adapter
from tests.chat.tape import record_tape
from tests.training.families import build
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

QUESTION = (Message("user", "what is the colour of the fox"),)
"""Longer than the families' sliding windows."""
TOKENS = 40
PLENTY = 1 << 40
SEEDED = Sampling(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=5, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def family_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatSource]:
    """Makes a family's tiny model in fp32, and an adapter on it."""
    sources: dict[str, ChatSource] = {}

    def make(family: str) -> ChatSource:
        if family not in sources:
            folder = make_tiny_model(tmp_path_factory.mktemp(family) / "model")
            build(family, vocab_size=384).save_pretrained(folder)
            adapter = make_adapter(folder, folder.parent / "adapter")
            quantization = Quantization(method="none", compute_dtype="float32")
            recipe = Recipe(model=Model(id=str(folder)), quantization=quantization)
            sources[family] = ChatSource(recipe=recipe, adapters={ADAPTER: str(adapter)})
        return sources[family]

    return make


def loaded(source: ChatSource, record: Record | None = record_tape, free_bytes: int = PLENTY) -> ChatSession:
    """A session that never ends a turn; with ``record``, one that decodes as on a GPU."""
    session = load_session(source)
    session.end_ids = frozenset()
    if record is not None:
        session.steps = DecodeSteps(session._step_forward, record, lambda: free_bytes, session.device)
    return session


def answer(
    session: ChatSession,
    adapter_name: str = ADAPTER,
    sampling: Sampling = GREEDY,
    tokens: int = TOKENS,
    messages: tuple[Message, ...] = QUESTION,
) -> GenerationResult:
    reply = session.ask(
        messages,
        adapter_name=adapter_name,
        sampling=msgspec.structs.replace(sampling, max_new_tokens=tokens),
    )
    list(reply)
    assert reply.outcome is not None
    return reply.outcome


def steps_of(session: ChatSession) -> DecodeSteps:
    assert session.steps is not None
    return session.steps


# Windows, caps, sinks, a fused projection, parallel blocks: what an attention with a fixed buffer could miss.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "phi3", "cohere"])
def test_recorded_steps_answer_as_the_cpu_does(
    family_source: Callable[[str], ChatSource], family: str
) -> None:
    usual, recorded = (loaded(family_source(family), record) for record in (None, record_tape))
    for adapter_name in (ADAPTER, BASE):
        for sampling in (GREEDY, SEEDED):
            expected = answer(usual, adapter_name, sampling)
            outcome = answer(recorded, adapter_name, sampling)
            assert outcome.text == expected.text
            assert outcome.recorded_tokens >= TOKENS - 1 - decoding._STEPS_BEFORE_RECORDING
            assert (expected.recorded_tokens, outcome.note, outcome.warning) == (0, "", "")


def test_recorded_answers_are_those_of_unrecorded_steps_bit_by_bit(
    family_source: Callable[[str], ChatSource],
) -> None:
    source = family_source("gemma3_text")
    quantization = msgspec.structs.replace(source.recipe.quantization, compute_dtype="bfloat16")
    source = msgspec.structs.replace(
        source, recipe=msgspec.structs.replace(source.recipe, quantization=quantization)
    )
    texts = []
    for record in (record_tape, lambda function: function):
        session = loaded(source, record)
        # The second answer is recorded from its first token on.
        texts += [answer(session, sampling=SEEDED).text, answer(session, sampling=SEEDED).text]
    assert len(set(texts)) == 1


def test_a_longer_conversation_gets_larger_buffers_and_a_record(
    family_source: Callable[[str], ChatSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_SMALLEST_BUCKET_TOKENS", 64)
    records: list[Function] = []

    def record(function: Function) -> Function:
        records.append(record_tape(function))
        return records[-1]

    source = family_source("gemma2")
    usual, recorded = loaded(source, None), loaded(source, record)
    messages: tuple[Message, ...] = QUESTION
    for _ in range(2):
        expected, outcome = (answer(each, tokens=90, messages=messages) for each in (usual, recorded))
        assert outcome.text == expected.text
        messages = (*messages, Message("assistant", outcome.text), Message("user", "and the dog"))
    assert len(records) >= 2
    assert recorded._caches[ADAPTER]._size.tokens in (256, 512)


def test_a_second_turn_is_recorded_from_its_first_token(family_source: Callable[[str], ChatSource]) -> None:
    source = family_source("llama")
    usual, recorded = loaded(source, None), loaded(source)
    first = answer(recorded)
    for follow_up in ("and the dog", "and the cat"):
        longer = (*QUESTION, Message("assistant", first.text), Message("user", follow_up))
        outcome = answer(recorded, messages=longer)
        assert outcome.text == answer(usual, messages=longer).text
        assert outcome.reused_tokens >= first.prompt_tokens
        assert outcome.recorded_tokens == TOKENS - 1


def test_recorded_answers_side_by_side_do_not_mix(tiny_source: ChatSource) -> None:
    session = loaded(tiny_source)
    for name in session.adapter_names:
        session.ensure_loaded(name)
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=TOKENS)
    alone = {name: answer(session, name).text for name in session.adapter_names}
    replies = {name: session.ask(QUESTION, adapter_name=name, sampling=sampling) for name in alone}
    growing = {name: iter(reply) for name, reply in replies.items()}
    while growing:
        for name in list(growing):
            if next(growing[name], None) is None:
                del growing[name]
    outcomes = {name: reply.outcome for name, reply in replies.items()}
    assert {name: outcome.text for name, outcome in outcomes.items() if outcome} == alone
    assert all(outcome and outcome.recorded_tokens == TOKENS - 1 for outcome in outcomes.values())


def test_a_token_past_the_turns_end_does_no_harm(family_source: Callable[[str], ChatSource]) -> None:
    source = family_source("gemma3_text")
    texts = []
    for record in (None, record_tape):
        session = loaded(source, record)
        ids = session.tokenizer.backend.encode(answer(session).text, add_special_tokens=False).ids
        session.end_ids = frozenset({ids[20]})
        first = answer(session)
        assert first.ending == "turn end"
        longer = (*QUESTION, Message("assistant", first.text), Message("user", "and the dog"))
        texts.append((first.text, answer(session, messages=longer).text))
    assert texts[0] == texts[1]


def never_moves(function: Function) -> Function:
    """A record whose position stays what it was."""
    position = getclosurevars(function).nonlocals["position"]
    recorded = position.clone()

    def replay() -> None:
        position.copy_(recorded)
        function()

    return replay


def is_one_behind(function: Function) -> Function:
    """A record that writes over the token before."""
    position = getclosurevars(function).nonlocals["position"]

    def replay() -> None:
        position.sub_(1)
        function()

    return replay


def gives_old_logits(function: Function) -> Function:
    """A record that computes nothing."""
    return lambda: None


def cannot_record(function: Function) -> Function:
    """What a layer does that waits for the GPU."""
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it.")


@pytest.mark.parametrize("record", [never_moves, is_one_behind, gives_old_logits, cannot_record])
def test_a_wrong_record_is_not_used(family_source: Callable[[str], ChatSource], record: Record) -> None:
    source = family_source("llama")
    expected = answer(loaded(source, None)).text
    session = loaded(source, record)
    outcome, again = answer(session), answer(session)
    assert outcome.text == again.text == expected
    assert outcome.recorded_tokens == 0 and steps_of(session).in_use
    assert outcome.note.startswith(
        "Answers are generated without a CUDA graph. The decoding step could not be recorded: "
    )
    assert outcome.note.endswith(".") and "\n" not in outcome.note and again.note == ""


@pytest.mark.parametrize("wrong", [-1, 1])
def test_fixed_shapes_at_a_wrong_position_are_not_used(
    family_source: Callable[[str], ChatSource], monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    source = family_source("llama")
    expected = answer(loaded(source, None)).text
    right = decoding.DecodeStep.run
    monkeypatch.setattr(
        decoding.DecodeStep, "run", lambda self, token, position: right(self, token, position + wrong)
    )
    session = loaded(source)
    outcome = answer(session)
    assert outcome.text == expected and not steps_of(session).in_use
    assert "In fixed shapes, the logits differed" in outcome.note and outcome.warning == ""


def test_a_model_without_fixed_shapes_decodes_as_usual(
    family_source: Callable[[str], ChatSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_source("llama")
    expected = answer(loaded(source, None)).text
    session = loaded(source)
    forward = session._model.forward

    def fails_with_a_tensor(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(session._cache_argument)
        if cache is not None and isinstance(cache.get_seq_length(), torch.Tensor):
            raise TypeError("only a number will do")
        return forward(*args, **kwargs)

    monkeypatch.setattr(session._model, "forward", fails_with_a_tensor)
    outcome = answer(session)
    assert outcome.text == expected
    assert outcome.note.endswith("The model cannot decode in fixed shapes: only a number will do.")


def test_in_little_memory_windows_are_cut_and_nothing_recorded(
    family_source: Callable[[str], ChatSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_SMALLEST_BUCKET_TOKENS", 64)
    source = family_source("gemma2")
    session = loaded(source, free_bytes=1000)
    expected = answer(loaded(source, None), tokens=90)
    outcome = answer(session, tokens=90)
    assert outcome.text == expected.text and outcome.recorded_tokens == 0
    assert outcome.note.endswith("or a sliding window that keeps only the last tokens.")
    held = [layer.keys.shape[-2] for layer in session._caches[ADAPTER].cache.layers]
    assert min(held) < 8 < max(held)


def test_loading_another_adapter_drops_the_records(tiny_source: ChatSource) -> None:
    session = loaded(tiny_source, lambda function: function)
    answer(session)
    assert session._caches[ADAPTER].step is not None
    session.ensure_loaded("step-2")
    assert session._caches[ADAPTER].step is None


def test_loading_another_adapter_drops_the_record_under_a_prompt(tiny_source: ChatSource) -> None:
    session = loaded(tiny_source, lambda function: function)
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=TOKENS)
    first = Completion(adapter_name=ADAPTER, messages=QUESTION, sampling=sampling)
    list(session.complete(first, Event()).run())
    ((_, prefix_cache),) = session.batches._kept
    further = Completion(adapter_name=ADAPTER, token_ids=(*prefix_cache.token_ids, 7, 8, 9))
    reading = session.complete(further, Event()).run()
    next(reading)
    assert prefix_cache.step is not None and not session.batches._kept
    session.ensure_loaded("step-2")
    assert prefix_cache.step is None


@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_a_cleared_cache_frees_its_buffers_at_once(
    family_source: Callable[[str], ChatSource], tokens: int
) -> None:
    session = loaded(family_source("llama"))
    answer(session, tokens=tokens)
    prefix_cache = session._caches[ADAPTER]
    buffers = weakref.ref(prefix_cache.cache.layers[0].buffers[0])
    prefix_cache.clear()
    assert buffers() is None


@pytest.mark.parametrize(
    "reads",
    [
        float,
        bool,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.cpu,
        torch.nonzero,
        torch.unique,
        torch.bincount,
        lambda ones: ones.to("cpu"),
        lambda ones: torch.equal(ones, ones),
        lambda ones: torch.allclose(ones.float(), ones.float()),
        lambda ones: ones[ones > 0],
        lambda ones: ones.index_put_((ones > 0,), ones),
        lambda ones: ones.masked_select(ones > 0),
        lambda ones: torch.repeat_interleave(ones, ones),
        lambda ones: torch.tensor([1], device=ones.device),
        lambda ones: torch.tensor(1, device=ones.device),
        lambda ones: ones.new_tensor([1]),
        lambda ones: [1 for _ in range(ones)],
    ],
)
def test_a_tape_refuses_what_waits_for_the_gpu(reads: Callable[[Tensor], object]) -> None:
    ones = torch.ones(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        record_tape(lambda: (reads(ones), None)[1])


def test_a_tape_takes_what_a_gpu_computes_alone() -> None:
    ones = torch.ones(2, dtype=torch.long)

    def computes() -> None:
        ones.masked_fill_(ones > 5, 1)
        ones.copy_(ones[ones - 1] * torch.tensor(1))
        torch.repeat_interleave(ones[:1], ones[:1], output_size=1)

    record_tape(computes)()


@pytest.mark.parametrize("reads", [Tensor.tolist, lambda keys: torch.equal(keys, keys)])
def test_a_layer_that_reads_keys_is_not_recorded(
    family_source: Callable[[str], ChatSource],
    monkeypatch: pytest.MonkeyPatch,
    reads: Callable[[Tensor], object],
) -> None:
    update = GrowingLayer.update

    def reading_update(layer: GrowingLayer, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> Any:
        reads(keys)
        return update(layer, keys, values, *rest, **named)

    monkeypatch.setattr(GrowingLayer, "update", reading_update)
    session = loaded(family_source("llama"))
    assert answer(session).recorded_tokens == 0
    assert "stream is capturing" in steps_of(session).why_not
