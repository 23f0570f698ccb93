"""A chat's logits against the library's: right ones pass, wrong ones are replaced or named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn import functional

from qlora_tui.chat import adapters, decoding, logits
from qlora_tui.chat.chat_types import GREEDY, ChatSource
from qlora_tui.chat.session import ChatSession, load_session
from qlora_tui.data.conversation import Message
from qlora_tui.recipe.schema import Quantization

pytestmark = pytest.mark.slow

QUESTION = [Message("user", "what does the quick brown fox say to the wise old owl in the oak")]


def answered(source: ChatSource, adapter_name: str) -> tuple[ChatSession, str]:
    session = load_session(source)
    sampling = replace(GREEDY, max_new_tokens=6)
    return session, "".join(
        said.text for said in session.ask(QUESTION, adapter_name=adapter_name, sampling=sampling)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_each_voice_is_checked_once_and_agrees(tiny_source: ChatSource, dtype: Any, method: Any) -> None:
    recipe = replace(tiny_source.recipe, quantization=Quantization(method=method, compute_dtype=dtype))
    session = load_session(replace(tiny_source, recipe=recipe))
    for adapter_name in ("adapter", "base", "step-2", "adapter"):
        assert list(
            session.ask(QUESTION, adapter_name=adapter_name, sampling=replace(GREEDY, max_new_tokens=2))
        )
    assert session.checked.keys() == {"adapter", "base", "step-2"} and not session.warning
    assert all(0 < one.noise < 0.2 and one.agrees for one in session.checked.values())


def scale_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = adapters.LoraForward.register

    def learn(self: adapters.LoraForward, adapter_name: str, layer: Any) -> None:
        right(self, adapter_name, layer)
        down, up = self._factors[adapter_name]
        self._factors[adapter_name] = (down, up / layer.scaling[adapter_name])

    patch.setattr(adapters.LoraForward, "register", learn)
    # Else the check of each layer leaves this adapter to peft.
    patch.setattr(adapters, "matches_peft", lambda layer, adapter_name, forward: True)


def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    right = functional.scaled_dot_product_attention

    def swapped(query: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        one_token = query.shape[-2] == query.shape[1]
        output: Tensor = right(query.flip(-2) if one_token else query, *rest, **kwargs)
        return output

    patch.setattr(functional, "scaled_dot_product_attention", swapped)


@pytest.mark.parametrize("mutate", [scale_forgotten, heads_swapped], ids=lambda mutate: mutate.__name__)
def test_wrong_scores_are_replaced_by_the_librarys(
    mutate: Any, tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = answered(tiny_source, "adapter")
    mutate(monkeypatch)
    session, answer = answered(tiny_source, "adapter")
    assert not session.checked["adapter"].agrees
    assert session.warning.startswith("Answers are slower")
    reply = session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=1))
    assert list(reply) and reply.outcome is not None and reply.outcome.warning == session.warning
    assert answer == expected


def test_a_wrong_cache_is_named_since_nothing_replaces_it(
    tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decoding.GrowingLayer.update

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = right(self, keys, values, *args, **kwargs)
        return keys, values.flip(-2) if keys.shape[-2] % 16 == 0 else values

    monkeypatch.setattr(decoding.GrowingLayer, "update", update)
    session, _ = answered(tiny_source, "adapter")
    assert session.warning.startswith("Do not rely on these answers")


def test_a_check_that_fails_costs_no_answer(tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_session, expected = answered(tiny_source, "adapter")
    kinds = [type(vars(m).get("forward")) for m in expected_session._model.modules()]
    calls = []

    def fails(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(model)
        raise RuntimeError("a shape that nobody expected\nat line 3")

    monkeypatch.setattr(logits, "rounding_errors", fails)
    session, answer = answered(tiny_source, "adapter")
    assert answer == expected
    assert session.warning.endswith("peft: RuntimeError: a shape that nobody expected.")
    assert [type(vars(m).get("forward")) for m in session._model.modules()] == kinds
    assert list(session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=1)))
    assert len(calls) == 1


def test_library_code_gives_the_model_back_after_an_error(tiny_source: ChatSource) -> None:
    session, _ = answered(tiny_source, "adapter")
    before = {m: vars(m).get("forward") for m in session._model.modules()}
    attention = session._model.config._attn_implementation
    with pytest.raises(RuntimeError), logits.library_code(session._model):
        assert not logits._replaced(session._model)
        raise RuntimeError
    assert {m: vars(m).get("forward") for m in session._model.modules()} == before
    assert session._model.config._attn_implementation == attention


def test_library_scores_leave_no_trace(tiny_source: ChatSource) -> None:
    session, answer = answered(tiny_source, "adapter")
    before = {m: vars(m).get("forward") for m in session._model.modules()}
    session._library_logits("adapter", [5, 6, 7])
    assert {m: vars(m).get("forward") for m in session._model.modules()} == before
    reply = session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=6))
    assert "".join(said.text for said in reply) == answer
    assert torch.equal(
        session._library_logits("adapter", [5, 6, 7]), session._library_logits("adapter", [5, 6, 7])
    )
