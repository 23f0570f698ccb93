"""Packed rows in one call of variable-length attention, with the kernel written out in Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training import equivalence_checks, model_loading, varlen_attention
from qlora_tui.training.compute_device import ComputeDevice, choose_attention
from qlora_tui.training.packed_attention import (
    NAMES,
    pass_sample_lengths,
    segment_mask,
    supports_grouped_heads,
)
from tests.training.families import build
from tests.training.trained_weights import build_with_trained_weights
from tests.training.varlen_reference import varlen_reference

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LENGTHS = [5, 17, 1, 12]
FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "granite", "phi3"]
"""Grouped heads, norms of heads, sliding windows, a scale of its own."""


class Kernel:
    """The kernel, written out, and its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, int]] = []
        """Where samples begin, and the longest."""

    def __call__(self, *tensors: Any, **settings: Any) -> Tensor:
        self.calls.append((tensors[3], tensors[5]))
        return varlen_reference(*tensors, **settings)

    # What inspect.signature reads of an object that is called.
    __signature__ = inspect.signature(varlen_reference)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Runs on a CPU in any dtype but float64, which the kernel on a GPU does not support either."""
    fake = Kernel()
    monkeypatch.setattr(varlen_attention, "find_kernel", lambda: fake)
    monkeypatch.setattr(
        varlen_attention, "supports", lambda query, value, samples: query.dtype != torch.float64
    )
    return fake


def packed_model(model_type: str, kind: Any, *, like_trained: bool = True) -> Any:
    model = build_with_trained_weights(model_type, torch.float32) if like_trained else build(model_type)
    assert model_loading.use_packed_attention(model, kind)
    pass_sample_lengths(model)
    return model


def loss_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    embedded = model.get_input_embeddings().weight
    embedded.requires_grad_(True)
    logits = model(input_ids=ids, position_ids=positions, segments=LENGTHS).logits
    loss = logits.float().log_softmax(-1).gather(2, ids[..., None]).sum()
    (gradient,) = torch.autograd.grad(loss, embedded)
    return loss.detach(), gradient


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_call_computes_what_a_call_per_sample_does(model_type: str, kernel: Kernel) -> None:
    by_sample = packed_model(model_type, "segments", like_trained=False)
    in_one = packed_model(model_type, "varlen", like_trained=False)
    expected, expected_gradient = loss_and_gradient(by_sample)
    assert not kernel.calls
    loss, gradient = loss_and_gradient(in_one)
    assert len(kernel.calls) == in_one.config.num_hidden_layers
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(
        gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(expected_gradient.abs().max())
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_call_passes_the_check_of_packed_rows(model_type: str, kernel: Kernel) -> None:
    model = packed_model(model_type, "varlen")
    assert equivalence_checks.packing_is_isolated(model, CPU)
    assert kernel.calls and model.config._attn_implementation == NAMES["varlen"]


right = varlen_attention.attend


def with_window(
    change: Callable[[int], int], q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: Any
) -> Tensor:
    return right(q, k, v, starts, scale, None if window is None else change(window))


def with_scale(
    factor: float, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: Any
) -> Tensor:
    return right(q, k, v, starts, scale * factor, window)


def with_starts(
    change: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any
) -> Tensor:
    return right(q, k, v, change(starts), *rest)


def begun_early(starts: Tensor) -> Tensor:
    early = starts.clone()
    early[..., 1:-1] -= 1
    return early


MUTANTS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "window one longer": (partial(with_window, lambda window: window + 1), "mistral"),
    "window one shorter": (partial(with_window, lambda window: window - 1), "gemma3_text"),
    "scale 1 % too large": (partial(with_scale, 1.01), "granite"),
    "samples as one": (partial(with_starts, lambda starts: starts[..., [0, -1]]), "llama"),
    "second sample begins early": (partial(with_starts, begun_early), "llama"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_of_packed_rows_catches_mutants(
    mutant: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, model_type = MUTANTS[mutant]
    monkeypatch.setattr(varlen_attention, "attend", wrong)
    assert not equivalence_checks.packing_is_isolated(packed_model(model_type, "varlen"), CPU)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_are_not_left_to_the_kernel(model_type: str, kernel: Kernel) -> None:
    model = packed_model(model_type, "varlen")
    loss_and_gradient(model)
    assert not kernel.calls
    assert equivalence_checks.packing_is_isolated(model, CPU)


def test_where_samples_begin_is_copied_once_for_all_layers(kernel: Kernel) -> None:
    loss_and_gradient(packed_model("llama", "varlen"))
    assert len({id(starts) for starts, _ in kernel.calls}) == 1
    assert {longest for _, longest in kernel.calls} == {max(LENGTHS)}


def test_rows_too_long_for_the_kernel_are_attended_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (8, 6))

    class OnGpu:
        shape, device = torch.Size((1, 32, 4096, 128)), torch.device("cuda", 0)

        def element_size(self) -> int:
            return 2

    supports = partial(varlen_attention.supports, OnGpu(), OnGpu())  # type: ignore[arg-type]
    assert supports(samples=16)
    OnGpu.shape = torch.Size((1, 32, 600_000, 128))
    assert not supports(samples=16)
    OnGpu.shape = torch.Size((1, 32, 4096, 129))
    assert not supports(samples=16)
    # 192 columns are summed for 160.
    OnGpu.shape = torch.Size((1, 32, 350_000, 160))
    assert not supports(samples=1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("width", [128, 192, 200, 224, 256])
def test_heads_without_a_backward_of_flash_do_not_use_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], width: int
) -> None:
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: capability)

    class OnGpu:
        shape, device = torch.Size((1, 8, 512, width)), torch.device("cuda", 0)

        def element_size(self) -> int:
            return 2

    query: Any = OnGpu()
    trains = capability in ((8, 0), (9, 0)) or width not in (200, 224)
    assert varlen_attention.supports(query, query, samples=1) is trains
    assert supports_grouped_heads(query, masked=False) is trains


def test_heads_are_repeated_where_flash_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        shape, device = torch.Size((1, 8, 512, 128)), torch.device("cuda", 0)

        def __init__(self, size: int) -> None:
            self.size = size

        def element_size(self) -> int:
            return self.size

    def supported(size: int, *, ampere: bool, masked: bool) -> bool:
        monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (8 if ampere else 7, 5))
        return supports_grouped_heads(OnGpu(size), masked)  # type: ignore[arg-type]

    assert supported(2, ampere=True, masked=False)
    assert not supported(2, ampere=False, masked=False)
    assert not supported(4, ampere=True, masked=False)
    assert not supported(2, ampere=True, masked=True)
    assert supports_grouped_heads(torch.empty(1), masked=True)


def gpu(dtype: torch.dtype = torch.bfloat16) -> ComputeDevice:
    return ComputeDevice(torch.device("cuda", 0), "RTX 2080", 8 << 30, dtype)


def recipe(attention: Any) -> Recipe:
    return Recipe(model=Model(attention=attention))


def test_auto_uses_what_the_gpu_runs(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (8, 6))
    assert choose_attention(recipe("auto"), gpu()) == "varlen"
    assert choose_attention(recipe("sdpa"), gpu()) == "segments"
    assert choose_attention(recipe("auto"), gpu(torch.float32)) == "segments"
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (7, 5))
    assert choose_attention(recipe("auto"), gpu()) == "segments"


@pytest.mark.parametrize(
    ("ampere", "has_kernel", "why"), [(False, True, "RTX 2080"), (True, False, "torch 2.11 or newer")]
)
def test_flash_that_cannot_run_says_why(
    ampere: bool, has_kernel: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (8 if ampere else 7, 5))
    monkeypatch.setattr(varlen_attention, "find_kernel", lambda: varlen_reference if has_kernel else None)
    with pytest.raises(UserError) as refused:
        choose_attention(recipe("flash"), gpu())
    assert why in (refused.value.why or "")


@pytest.mark.parametrize("ampere", [True, False])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_the_estimate_assumes_the_attention_that_the_trainer_chooses(
    ampere: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "capability_of", lambda device: (8 if ampere else 7, 5))
    monkeypatch.setattr(varlen_attention, "find_kernel", lambda: varlen_reference if has_kernel else None)
    attentions, dtypes = ("auto", "flash", "sdpa", "eager"), ("bfloat16", "float16", "float32")
    every: Any = product(attentions, dtypes, ("cuda", "cpu"))
    for attention, compute_dtype, kind in every:
        wanted = Recipe(
            model=Model(attention=attention), quantization=Quantization(compute_dtype=compute_dtype)
        )
        device = ComputeDevice(torch.device(kind), "a device", 8 << 30, getattr(torch, compute_dtype))
        capability = (8, 6) if ampere else (7, 5)
        execution = trainer_execution(wanted, Device(kind=kind, capability=capability, varlen=has_kernel))
        assumed = "varlen" if execution.varlen else "segments" if execution.segments else "eager"
        try:
            chosen = choose_attention(wanted, device)
        except UserError:
            assert attention == "flash" and assumed == "segments"
        else:
            assert chosen == assumed


def test_the_installed_torch_has_the_kernel() -> None:
    """Fails when torch changes its function: adapt ``varlen_attention.attend``."""
    assert varlen_attention.find_kernel() is not None
    assert segment_mask([3, 1]).flatten().tolist() == [0, 3, 4]
