"""Requests computed together get what each gets alone, in families with windows, states and experts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from qlora_tui.chat import batches, decoding
from qlora_tui.chat.chat_types import GREEDY, ChatSource, Sampling
from qlora_tui.chat.completion_types import Completion, CompletionResult
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from tests.chat.test_decoding import loaded as like_a_gpu
from tests.training.families import build
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
    },
    "gpt_neox": {},
}  # fmt: skip


def session_of(folder: Path, model_type: str) -> ChatSession:
    make_tiny_model(folder)
    build(model_type, vocab_size=384, max_position_embeddings=4096, **FAMILIES[model_type]).save_pretrained(
        folder
    )
    quantization = Quantization(method="none", compute_dtype="float32")
    return load_session(ChatSource(recipe=Recipe(model=Model(id=str(folder)), quantization=quantization)))


def requests(count: int, lengths: Sequence[int], tokens: Sequence[int]) -> list[Completion]:
    """Different texts of different lengths, some sampled; answers of different lengths."""
    draw = random.Random(0)
    return [
        Completion(
            adapter_name="base",
            token_ids=tuple(draw.randrange(3, 300) for _ in range(lengths[number % len(lengths)])),
            sampling=replace(
                GREEDY if number % 2 else Sampling(seed=number), max_new_tokens=tokens[number % len(tokens)]
            ),
            logprobs=0,
        )
        for number in range(count)
    ]


Told = tuple[list[int], list[float], CompletionResult]
"""Ids, log probabilities, result."""


def told(session: Any, asked: Sequence[Completion], *, at_once: bool = True) -> list[Told]:
    """What requests are told: all at once, in turns like the engine's, or one after another."""
    scores: list[list[Any]] = [[] for _ in asked]
    results: dict[int, CompletionResult] = {}
    steps = {number: session.complete(each, Event()).run() for number, each in enumerate(asked)}
    for group in [list(steps)] if at_once else [[number] for number in steps]:
        while any(number not in results for number in group):
            for number in group:
                if number in results:
                    continue
                try:
                    part = next(steps[number])
                except StopIteration as end:
                    results[number] = end.value
                    continue
                scores[number] += part.tokens if part is not None else ()
    return [
        ([score.token_id for score in own], [score.logprob for score in own], results[number])
        for number, own in enumerate(scores)
    ]


def assert_same(alone: Sequence[Told], together: Sequence[Told]) -> None:
    for (ids, logprobs, result), (ids_2, logprobs_2, result_2) in zip(alone, together, strict=True):
        assert ids_2 == ids
        assert logprobs_2 == pytest.approx(logprobs, abs=2e-3)
        assert result_2.ending == result.ending


@pytest.mark.parametrize("model_type", FAMILIES)
def test_answers_are_the_same_alone_and_together(model_type: str, tmp_path: Path) -> None:
    session = session_of(tmp_path / "model", model_type)
    session.end_ids = frozenset()
    asked = requests(8, (20, 3, 41, 9, 30), (6, 14, 9, 25))
    alone = told(session, asked, at_once=False)
    assert all(result.most_rows == 1 for _, _, result in alone)
    session.batches.release_kept()
    together = told(session, asked)
    assert not session.batches.why_not and not session.warning
    assert_same(alone, together)
    assert max(result.most_rows for _, _, result in together) == 8


@pytest.mark.parametrize("lengths", [(250, 254, 8), (1019, 1022, 60)])
def test_buffers_grow_under_all_rows(lengths: tuple[int, ...], tmp_path: Path) -> None:
    session = session_of(tmp_path / "model", "mistral")
    session.end_ids = frozenset()
    asked = requests(3, lengths, (12,))
    assert_same(told(session, asked, at_once=False), told(session, asked))


@pytest.fixture(scope="module")
def session(tiny_source: ChatSource) -> ChatSession:
    loaded = load_session(tiny_source)
    loaded.end_ids = frozenset()
    told(loaded, requests(2, (20,), (4,)))  # and the comparison that allows it
    return loaded


def test_adapters_do_not_leak_into_each_other(session: ChatSession) -> None:
    rows, names = 12, ("base", "adapter", "step-2")
    asked = [
        replace(each, adapter_name=names[number % 3])
        for number, each in enumerate(requests(rows, (9, 30, 17, 12), (16, 9)))
    ]
    alone = told(session, asked, at_once=False)
    session.batches.release_kept()
    together = told(session, asked)
    assert_same(alone, together)
    assert max(result.most_rows for _, _, result in together) >= rows // 3
    assert len({tuple(ids) for ids, _, _ in together}) == rows


def test_programs_get_the_answers_of_the_chat(session: ChatSession) -> None:
    questions = [f"what is the {word} of the fox" for word in ("colour", "name", "age", "red", "dog")]
    sampling = replace(GREEDY, max_new_tokens=20)
    expected = []
    for question in questions:
        messages = [Message("user", question)]
        answer = session.ask(messages, adapter_name="adapter", sampling=sampling)
        assert list(answer) and answer.outcome is not None
        # The last one is not processed.
        ids = session._caches["adapter"].token_ids[len(session.prompt(messages)) :]
        expected.append((ids, answer.outcome.text))
    asked = [
        Completion(adapter_name="adapter", messages=(Message("user", each),), sampling=sampling, logprobs=0)
        for each in questions
    ]
    assert [(ids[:-1], session.decode(ids)) for ids, _, _ in told(session, asked)] == expected


def test_a_conversation_goes_on_with_what_is_kept(session: ChatSession) -> None:
    session.batches.release_kept()
    (first, second) = requests(2, (40, 60), (8,))
    ((ids, _, _), (others, _, _)) = told(session, [first, second])
    turns = [
        replace(each, token_ids=(*each.token_ids, *answer, 7, 8, 9))
        for each, answer in ((second, others), (first, ids))
    ]
    again = told(session, turns)
    # The last token of an answer is not computed.
    assert [result.reused_tokens for _, _, result in again] == [67, 47]
    session.batches.release_kept()
    assert_same(told(session, turns, at_once=False), again)


def test_a_long_prompt_is_read_between_the_tokens_of_others(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_tui.chat.session.PREFILL_CHUNK_TOKENS", 50)
    monkeypatch.setattr(batches, "PREFILL_CHUNK_TOKENS", 50)
    told(session, requests(1, (20,), (1,)))  # and its check
    passes: list[int] = []
    single, several = session.next_logits, session.batch_logits

    def one_row(name: str, ids: list[int], *arguments: Any, **settings: Any) -> torch.Tensor:
        passes.append(len(ids))
        return single(name, ids, *arguments, **settings)

    def several_rows(*arguments: Any) -> torch.Tensor:
        passes.append(0)
        return several(*arguments)

    monkeypatch.setattr(session, "next_logits", one_row)
    monkeypatch.setattr(session, "batch_logits", several_rows)
    short, *long = requests(3, (10, 400, 300), (30, 1, 1))
    told(session, [short, *long])
    assert passes.count(50) == 14
    # From its first token on the short one gets a token between two chunks.
    answering = passes[passes.index(1) :]
    assert (50, 50) not in pairwise(answering) and answering.count(50) > 10


def test_rows_that_do_not_go_together_take_turns(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(4, (9, 1000, 11, 12), (6,))
    monkeypatch.setattr(type(session), "memory_bytes", 100_000)
    rows = [result.most_rows for _, _, result in told(session, asked)]
    assert rows == [3, 1, 3, 3]


def test_rows_that_exceed_the_memory_go_on_alone(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(4, (9, 20, 11), (8,))
    alone = told(session, asked, at_once=False)
    several = session.batch_logits
    calls: list[int] = []

    def fail(name: str, ids: list[int], *arguments: Any) -> Any:
        calls.append(len(ids))
        if len(calls) == 3:
            several(name, ids, *arguments)  # what is computed is lost
            raise MemoryError
        return several(name, ids, *arguments)

    monkeypatch.setattr(session, "batch_logits", fail)
    monkeypatch.setitem(session.batches._batches, "base", batches.Batch(session.batches, "base"))
    assert_same(alone, told(session, asked))
    assert calls[:3] == [4, 4, 4] and set(calls[3:]) == {2}


@pytest.mark.parametrize("failing", [1, 4, 6])
def test_rows_whose_arrangement_exceeds_the_memory_keep_their_own_keys(
    session: ChatSession, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One joins late, and they leave one after another."""
    for module in ("session", "batches"):
        monkeypatch.setattr(f"qlora_tui.chat.{module}.PREFILL_CHUNK_TOKENS", 50)
    asked = requests(4, (9, 20, 11, 140), (12, 8, 16, 20))
    alone = told(session, asked, at_once=False)
    session.batches.release_kept()
    arranged, calls = batches.stack, 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError
        return arranged(*arguments)

    monkeypatch.setattr(batches, "stack", fail)
    monkeypatch.setitem(session.batches._batches, "base", batches.Batch(session.batches, "base"))
    together = told(session, asked)
    assert calls >= failing and not session.batches.why_not
    assert_same(alone, together)
    turns = [
        replace(each, token_ids=(*each.token_ids, *ids, 7, 8))
        for each, (ids, *_) in zip(asked, alone, strict=True)
    ]
    after = told(session, turns, at_once=False)
    session.batches.release_kept()
    assert_same(told(session, turns, at_once=False), after)


def test_an_adapter_that_is_no_longer_offered_is_freed_once_it_has_answered(tiny_source: ChatSource) -> None:
    session = load_session(tiny_source)
    session.end_ids = frozenset()
    (asked,) = requests(1, (20,), (8,))
    first, second = (replace(asked, adapter_name=name) for name in ("adapter", "step-2"))
    bare = session.memory_bytes
    expected = told(session, [first])
    one_adapter = session.memory_bytes - bare
    answering = session.complete(first, Event()).run()
    next(answering)
    session.offer({"step-2": tiny_source.adapters["step-2"], "again": tiny_source.adapters["adapter"]})
    other = told(session, [second])
    # It still answers.
    assert session.memory_bytes == bare + 2 * one_adapter
    assert sum(len(part.tokens) for part in answering if part is not None) == 8
    assert_same(expected, told(session, [replace(first, adapter_name="again")]))
    assert session.memory_bytes == bare + 2 * one_adapter
    assert_same(other, told(session, [second]))
    with pytest.raises(UserError):
        told(session, [first])


Change = Callable[[pytest.MonkeyPatch], None]


def wrong_positions(patch: pytest.MonkeyPatch) -> None:
    several = ChatSession.batch_logits
    patch.setattr(
        ChatSession,
        "batch_logits",
        lambda self, name, ids, lengths, longest, cache: several(
            self, name, ids, [longest] * len(ids), longest, cache
        ),
    )


def rows_exchanged(patch: pytest.MonkeyPatch) -> None:
    several = ChatSession.batch_logits
    patch.setattr(ChatSession, "batch_logits", lambda self, *arguments: several(self, *arguments).flip(0))


def padding_behind(patch: pytest.MonkeyPatch) -> None:
    def left_aligned(tensors: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
        right = aligned(tensors, tokens)
        for row, tensor in enumerate(tensors):
            if len(tensors) == len(right):
                right[row] = 0
                right[row, :, : tensor.shape[-2]] = tensor[0]
        return right

    aligned = batches._right_aligned
    patch.setattr(batches, "_right_aligned", left_aligned)


def a_leaving_row_takes_its_neighbors_keys(patch: pytest.MonkeyPatch) -> None:
    stack = batches.stack

    def shifted(parts: Sequence[batches.Rows], size: decoding.BufferSize) -> list[Any]:
        if len(parts) == 1 and len(parts[0].rows) == 1:
            parts = [batches.Rows(parts[0].layers, [0], parts[0].start)]
        return stack(parts, size)

    patch.setattr(batches, "stack", shifted)


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("model_type", ["mistral", "qwen3_next"])
@pytest.mark.parametrize(
    ("plant", "together"),
    [
        (nothing, True),
        (wrong_positions, False),
        (rows_exchanged, False),
        (padding_behind, False),
        (a_leaving_row_takes_its_neighbors_keys, False),
    ],
)
def test_rows_that_change_each_other_are_found_and_take_turns(
    model_type: str, plant: Change, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(tmp_path / "model", model_type)
    session.end_ids = frozenset()
    asked = requests(3, (20, 30, 13), (10,))
    alone = told(session, asked, at_once=False)
    session.batches.release_kept()
    plant(monkeypatch)
    at_once = told(session, asked)
    assert bool(session.batches.why_not) != together
    assert_same(alone, at_once)
    assert [result.most_rows for _, _, result in at_once] == ([3] * 3 if together else [1] * 3)
    assert sum("take turns" in result.note for _, _, result in at_once) == (not together)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_few_requests_take_turns_with_recorded_steps(family: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    build(family, vocab_size=384, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    quantization = Quantization(method="none", compute_dtype="float32")
    source = ChatSource(recipe=Recipe(model=Model(id=str(tmp_path / "model")), quantization=quantization))
    session = like_a_gpu(source)
    few, many = requests(3, (20, 9), (14,)), requests(6, (20, 9, 31), (25, 14, 20))
    alone = [told(session, asked, at_once=False) for asked in (few, many)]
    session.batches.release_kept()
    for asked, expected, rows in ((few, alone[0], 1), (many, alone[1], 6)):
        together = told(session, asked)
        assert_same(expected, together)
        assert max(result.most_rows for _, _, result in together) == rows
    assert session.steps is not None and not session.steps.why_not and not session.batches.why_not
