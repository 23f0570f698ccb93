"""Inputs of checkpointed layers wait in host memory, and the gradients stay the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.training.model import checkpoint_activations
from qlora_tui.training.streaming.input_offload import InputOffload, offload_inputs
from qlora_tui.training.streaming.placement import movable_layers, place_streamed
from tests.training.families import build, with_adapter
from tests.training.recorded_copies import RecordedCopies

pytestmark = pytest.mark.slow

OFFLOADED_LAYERS = 4


def host_memory(size_bytes: int) -> Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8)


def gradients(model: Any, *, steps: int = 3) -> list[Tensor]:
    """Losses and gradients of steps of different lengths, with dropout."""
    generator = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for length in (14, 9, 14)[:steps]:
        tokens = torch.randint(300, (2, length), generator=generator)
        torch.manual_seed(length)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results += [loss.detach(), *(parameter.grad.clone() for parameter in trained)]
        model.zero_grad()
    return results


def offloaded(family: str, *, streamed: bool = False) -> tuple[Any, InputOffload, RecordedCopies]:
    model, copies = build(family, num_hidden_layers=OFFLOADED_LAYERS), RecordedCopies()
    placed = (
        place_streamed(model, OFFLOADED_LAYERS, torch.device("cpu"), RecordedCopies()) if streamed else None
    )
    offload = InputOffload(copies, host_memory)
    adapted = with_adapter(model, dropout=0.2)
    checkpoint_activations(model)
    offload_inputs(movable_layers(model), offload)
    if placed is not None:
        placed.use_checkpoints()
    return adapted.train(), offload, copies


def expected_of(family: str) -> list[Tensor]:
    model = build(family, num_hidden_layers=OFFLOADED_LAYERS)
    adapted = with_adapter(model, dropout=0.2)
    checkpoint_activations(model)
    return gradients(adapted.train())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_offloaded_inputs_give_the_same_bits(family: str) -> None:
    model, _, _ = offloaded(family)
    results, expected = gradients(model), expected_of(family)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_offloading_and_streaming_work_together() -> None:
    model, _, _ = offloaded("llama", streamed=True)
    results, expected = gradients(model), expected_of("llama")
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_later_steps_use_the_buffers_of_the_first() -> None:
    model, offload, _ = offloaded("llama")
    gradients(model, steps=1)
    assert offload.host_bytes == OFFLOADED_LAYERS * 2 * 14 * 64 * 4
    gradients(model)
    assert offload.host_bytes == OFFLOADED_LAYERS * 2 * 14 * 64 * 4


def test_each_input_is_fetched_while_the_layer_after_it_computes() -> None:
    copies = RecordedCopies()
    offload = InputOffload(copies, host_memory)
    inputs = [torch.full((1, 2, 8), float(number), requires_grad=True) for number in range(3)]
    kept_inputs = []
    for number, hidden in enumerate(inputs):
        kept_inputs.append(offload.keep(hidden))
        copies.log.append(f"[{number}]")
    for number in (2, 1, 0):
        fetched = offload.fetch(kept_inputs.pop())
        assert fetched.requires_grad and torch.equal(fetched, inputs[number])
        copies.log.append(f"[{number}]")
    forward = "copy 1 [0] wait 1 copy 2 [1] wait 2 copy 3 [2]"
    assert " ".join(copies.log) == f"{forward} wait 3 copy 4 wait 4 copy 5 [2] wait 5 copy 6 [1] wait 6 [0]"
