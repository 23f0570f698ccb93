"""Where our own loss is used: where a model's own is the cross-entropy of its head as it was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.training import chunked_loss, equivalence_checks, head_chunks
from tests.training.trained_weights import build_with_trained_weights, in_turns

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_FACTORS = ["llama", "granite", "cohere", "gemma2"]


def head_of(model: Any) -> head_chunks.ChunkedHead:
    head = chunked_loss.find_head(model)
    assert isinstance(head, head_chunks.ChunkedHead)
    return head


@pytest.mark.parametrize(("model_type", "dtype"), in_turns(DTYPES))
def test_the_head_of_every_family_is_proved(model_type: str, dtype: torch.dtype) -> None:
    model = build_with_trained_weights(model_type, dtype)
    assert equivalence_checks.head_matches_model(model, head_of(model), CPU)
    assert "forward" not in vars(model.get_output_embeddings()) and not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", WITH_FACTORS)
def test_a_head_read_with_another_factor_is_rejected(model_type: str, dtype: torch.dtype) -> None:
    model = build_with_trained_weights(model_type, dtype)
    head = head_of(model)
    caps = [None, 30.3, 31.0] if head.softcap else [30.0, 1000.0]
    wrong: list[dict[str, Any]] = [{"multiplier": head.multiplier * n} for n in (1.01, 0.99, -1.0, 2.0)]
    for change in [*wrong, *({"softcap": cap} for cap in caps)]:
        assert not equivalence_checks.head_matches_model(model, dataclasses.replace(head, **change), CPU), (
            change
        )


def before(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The model changes hidden states on the way to its head."""
    return lambda model: model.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: (change(given[0]),)
    )


def after(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The model changes the logits that come out of its head."""
    return lambda model: model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: change(logits)
    )


def by(own: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """The model computes its loss by another function of logits and labels."""

    def change(model: Any) -> None:
        model.loss_function = lambda logits, labels, *args, **kwargs: own(logits.float(), labels)

    return change


def shifted(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return functional.cross_entropy(logits[0, :-1], labels[0, 1:], **settings)


def first_token_favored(logits: Tensor) -> Tensor:
    return logits + functional.one_hot(torch.tensor(0), logits.shape[-1])


MUTANTS: dict[str, Callable[[Any], None]] = {
    "states scaled": before(lambda states: states * 0.99),
    "one channel of the states dropped": before(
        lambda states: states * (torch.arange(states.shape[-1]) != 5)
    ),
    "states normed": before(lambda states: functional.rms_norm(states, states.shape[-1:])),
    "logits scaled": after(lambda logits: logits * 1.005),
    "logits capped at 1,000": after(lambda logits: 1000 * torch.tanh(logits / 1000)),
    "logits clamped": after(lambda logits: logits.clamp(min=-8, max=8)),
    "a bias for one token": after(first_token_favored),
    "label smoothing": by(lambda logits, labels: shifted(logits, labels, label_smoothing=0.001)),
    "another token to be ignored": by(lambda logits, labels: shifted(logits, labels.clamp(min=0))),
    "labels not shifted": by(lambda logits, labels: functional.cross_entropy(logits[0], labels[0])),
    "sum in place of the mean": by(lambda logits, labels: shifted(logits, labels, reduction="sum")),
    "a penalty on large logits": by(
        lambda logits, labels: shifted(logits, labels) + 1e-4 * logits.logsumexp(-1).square().mean()
    ),
}


@pytest.mark.parametrize("model_type", WITH_FACTORS)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_model_that_does_anything_else_keeps_its_own_loss(name: str, model_type: str) -> None:
    for dtype in DTYPES:
        model = build_with_trained_weights(model_type, dtype, tie_word_embeddings=False)
        head = head_of(model)
        MUTANTS[name](model)
        assert not equivalence_checks.head_matches_model(model, head, CPU), dtype


def test_the_plain_loss_written_out_is_accepted() -> None:
    """What the mutants differ from."""
    model = build_with_trained_weights("llama")
    by(shifted)(model)
    assert equivalence_checks.head_matches_model(model, head_of(model), CPU)


def test_a_loss_with_a_router_term_stays_the_models_own() -> None:
    model = build_with_trained_weights("mixtral", output_router_logits=True, router_aux_loss_coef=0.01)
    assert not equivalence_checks.head_matches_model(model, head_of(model), CPU)
