"""Each sample of a packed sequence is what it is alone, and each layer attends as the library does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training import length_scaled_rope, packed_attention
from qlora_tui.training.batches import RowShape, collate
from qlora_tui.training.checks import attention, base
from qlora_tui.training.compute_device import ComputeDevice, choose_attention
from qlora_tui.training.fused.cpu_attention import RowAttention
from qlora_tui.training.loss import use_loss
from qlora_tui.training.packed_attention import (
    NAMES,
    segment_mask,
    supports_grouped_heads,
)
from qlora_tui.training.samples import Sample, SampleList
from tests.training.families import build
from tests.training.trained_weights import LENGTH_SCALED, build_with_trained_weights


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """(tokens, heads, width); refuses what the kernel refuses."""
    tokens, heads, width = query.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or key.shape[1] == heads
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q.dim() == 1 and torch.equal(cu_seq_q, cu_seq_k)
    assert int(cu_seq_q[-1]) == tokens and int(cu_seq_q.diff().max()) == max_q == max_k
    left, right = window_size
    assert right == 0
    place = torch.arange(tokens, device=query.device)
    sample = torch.bucketize(place, cu_seq_q[1:], right=True)
    distance = place[:, None] - place
    allowed = (sample[:, None] == sample) & (distance >= 0)
    if left >= 0:
        allowed &= distance <= left
    q = query.transpose(0, 1).float()
    k, v = (x.transpose(0, 1).float().repeat_interleave(heads // x.shape[1], 0) for x in (key, value))
    scores = (q @ k.transpose(1, 2)) * (width**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def packing(model_type: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A model that attends sample by sample, where its family can."""
    model = build_with_trained_weights(model_type, dtype, **settings)
    packed_attention.use_packed_attention(model)
    use_loss(model, "the library's")
    return model


Attention = Callable[..., tuple[Tensor, None]]
right: Attention = packed_attention.segment_attention


def with_settings(**changes: Callable[[Any], Any]) -> Attention:
    """Attention that takes another value of some of its settings."""

    def attend(*tensors: Any, **settings: Any) -> tuple[Tensor, None]:
        return right(
            *tensors, **settings | {name: change(settings[name]) for name, change in changes.items()}
        )

    return attend


def with_output(change: Callable[[Tensor], Tensor]) -> Attention:
    return lambda *tensors, **settings: (change(right(*tensors, **settings)[0]), None)


def heads_exchanged(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Each query head with another one's keys."""
    return right(module, query, key.flip(1), value, *rest, **settings)


def one_segment(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """All samples of a row as one."""
    return right(module, query, key, value, packed_attention.segment_mask([query.shape[2]]), **settings)


def shifted_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """The second sample begins a token early."""
    starts = mask.clone()
    starts[..., 1:-1] -= 1
    return right(module, query, key, value, starts, **settings)


MUTANTS: dict[str, tuple[Attention, list[str]]] = {
    "scale dropped": (with_settings(scaling=lambda scale: None), ["granite"]),
    "scale 1 % too large": (
        with_settings(scaling=lambda scale: 1.01 * scale),
        ["llama", "gemma2", "gpt_oss"],
    ),
    "soft cap dropped": (with_settings(softcap=lambda cap: None), ["gemma2"]),
    "soft cap of another size": (with_settings(softcap=lambda cap: 1.1 * cap), ["gemma2"]),
    "window dropped": (
        with_settings(sliding_window=lambda window: None),
        ["mistral", "gemma3_text", "gpt_oss"],
    ),
    "window one longer": (
        with_settings(sliding_window=lambda window: window and window + 1),
        ["mistral", "gemma2", "gemma3_text", "starcoder2"],
    ),
    "sinks dropped": (with_settings(s_aux=lambda sinks: None), ["gpt_oss"]),
    "sinks 2 % off": (with_settings(s_aux=lambda sinks: sinks + 0.02), ["gpt_oss"]),
    "output 1 % too large": (with_output(lambda out: 1.01 * out), ["llama", "gemma2"]),
    "one head left out": (
        with_output(lambda out: torch.cat([out[:, :, :-1] * 1, out[:, :, :1] * 0], 2)),
        ["llama"],
    ),
    "heads transposed": (
        with_output(lambda out: out.transpose(1, 2).reshape(out.shape)),
        ["llama", "gemma3_text"],
    ),
    "key heads exchanged": (heads_exchanged, ["llama", "qwen3", "gemma2"]),
    "segments not honored": (one_segment, ["llama", "gemma3_text", "gpt_oss"]),
    "segments shifted": (shifted_segments, ["llama", "gemma2"]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_attention_that_does_anything_else_is_not_packed(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant, families = MUTANTS[name]
    for model_type in families:
        with monkeypatch.context() as patch:
            patch.setattr(packed_attention, "segment_attention", mutant)
            model = packing(model_type, dtype)
            assert not base.packing_is_isolated(model, CPU), model_type


@pytest.mark.parametrize("error", [0.97, 1.03])
def test_a_kernel_of_bf16_alone_is_held_to_bf16s_noise(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def apply(*given: Any) -> Tensor:
            out: Tensor = RowAttention.apply(*given)  # type: ignore[no-untyped-call]  # torch's own
            return out * error

    assert base.packing_is_isolated(packing("llama", torch.bfloat16), CPU)
    monkeypatch.setattr(packed_attention, "RowAttention", Wrong)
    assert not base.packing_is_isolated(packing("llama", torch.bfloat16), CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_positions_that_go_on_across_samples_are_noticed(model_type: str, dtype: torch.dtype) -> None:
    """Where they are absolute: a rotation of queries and keys alike changes nothing."""
    model = packing(model_type, dtype)
    inner = model.forward

    def forward(position_ids: Tensor, **inputs: Any) -> Any:
        positions = torch.arange(position_ids.shape[1])[None]
        return inner(position_ids=positions, **inputs)

    model.forward = forward
    assert base.packing_is_isolated(model, CPU) == (model_type == "llama")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_faint_leak_through_another_layer_is_noticed(dtype: torch.dtype) -> None:
    """A thousandth of the token before, in one layer: less than the rounding of bf16 in most elements."""
    model = packing("llama", dtype)
    model.get_decoder().layers[0].mlp.register_forward_hook(
        lambda module, given, out: out + 1e-3 * out.roll(1, dims=1)
    )
    assert not base.packing_is_isolated(model, CPU)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("name", LENGTH_SCALED)
def test_frequencies_follow_from_the_length_of_each_sample(name: str, padding_free: bool) -> None:
    model_type = name.split()[0]
    settings = LENGTH_SCALED[name]
    lengths = [9, 30, 24, 20, 21]
    ids = torch.randint(300, (5, 30), generator=torch.Generator().manual_seed(7))
    # Built again for each: the library remembers the longest sequence so far.
    alone = [
        build_with_trained_weights(model_type, **settings)(input_ids=ids[i : i + 1, :n], use_cache=False)
        for i, n in enumerate(lengths)
    ]
    model = packing(model_type, torch.float32, **settings)
    length_scaled_rope.scale_each_sample(model)
    samples = SampleList([Sample(ids[i, :n].tolist(), (1,) * n) for i, n in enumerate(lengths)])
    sequences = [tuple(range(5))] if padding_free else [(i,) for i in range(5)]
    batch = collate(sequences, samples, RowShape(padding_free, 64, multiple=16))
    given = {key: value for key, value in batch.items() if key not in ("labels", "loss_positions")}
    logits = model(**given, **({} if padding_free else {"use_cache": False})).logits
    computed = logits[0].split(batch["segments"]) if padding_free else logits
    for i, n in enumerate(lengths):
        torch.testing.assert_close(computed[i][:n], alone[i].logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LENGTH_SCALED)
def test_frequencies_that_follow_from_other_samples_are_noticed(name: str) -> None:
    # Plain weights: sharp attention hides a change of frequencies.
    model = build(name.split()[0], **LENGTH_SCALED[name])
    packed_attention.use_packed_attention(model)
    use_loss(model, "the library's")
    assert not base.packing_is_isolated(model, CPU)
    length_scaled_rope.scale_each_sample(model)
    assert base.packing_is_isolated(model, CPU)


def test_windows_are_restored_after_an_error() -> None:
    model = packing("mistral", torch.float32)
    with pytest.raises(RuntimeError), attention.short_windows(model):
        assert model.config.sliding_window == 3
        raise RuntimeError
    assert model.config.sliding_window == 8


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
    monkeypatch.setattr(packed_attention, "find_kernel", lambda: fake)
    monkeypatch.setattr(
        packed_attention, "supports", lambda query, value, samples: query.dtype != torch.float64
    )
    return fake


def packed_model(model_type: str, kind: Any, *, like_trained: bool = True) -> Any:
    model = build_with_trained_weights(model_type, torch.float32) if like_trained else build(model_type)
    assert packed_attention.use_packed_attention(model, kind)
    use_loss(model, "the library's")
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
    assert base.packing_is_isolated(model, CPU)
    assert kernel.calls and model.config._attn_implementation == NAMES["varlen"]


right_varlen = packed_attention.attend


def with_window(
    change: Callable[[int], int], q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: Any
) -> Tensor:
    return right_varlen(q, k, v, starts, scale, None if window is None else change(window))


def with_scale(
    factor: float, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: Any
) -> Tensor:
    return right_varlen(q, k, v, starts, scale * factor, window)


def with_starts(
    change: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any
) -> Tensor:
    return right_varlen(q, k, v, change(starts), *rest)


def begun_early(starts: Tensor) -> Tensor:
    early = starts.clone()
    early[..., 1:-1] -= 1
    return early


WRONG_VARLEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "window one longer": (partial(with_window, lambda window: window + 1), "mistral"),
    "window one shorter": (partial(with_window, lambda window: window - 1), "gemma3_text"),
    "scale 1 % too large": (partial(with_scale, 1.01), "granite"),
    "samples as one": (partial(with_starts, lambda starts: starts[..., [0, -1]]), "llama"),
    "second sample begins early": (partial(with_starts, begun_early), "llama"),
}


@pytest.mark.parametrize("mutant", WRONG_VARLEN)
def test_the_check_of_packed_rows_catches_mutants(
    mutant: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, model_type = WRONG_VARLEN[mutant]
    monkeypatch.setattr(packed_attention, "attend", wrong)
    assert not base.packing_is_isolated(packed_model(model_type, "varlen"), CPU)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_are_not_left_to_the_kernel(model_type: str, kernel: Kernel) -> None:
    model = packed_model(model_type, "varlen")
    loss_and_gradient(model)
    assert not kernel.calls
    assert base.packing_is_isolated(model, CPU)


def test_where_samples_begin_is_copied_once_for_all_layers(kernel: Kernel) -> None:
    loss_and_gradient(packed_model("llama", "varlen"))
    assert len({id(starts) for starts, _ in kernel.calls}) == 1
    assert {longest for _, longest in kernel.calls} == {max(LENGTHS)}


def test_rows_too_long_for_the_kernel_are_attended_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "capability_of", lambda device: (8, 6))

    class OnGpu:
        shape, device = torch.Size((1, 32, 4096, 128)), torch.device("cuda", 0)

        def element_size(self) -> int:
            return 2

    supports = partial(packed_attention.supports, OnGpu(), OnGpu())  # type: ignore[arg-type]
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
    monkeypatch.setattr(packed_attention, "capability_of", lambda device: capability)

    class OnGpu:
        shape, device = torch.Size((1, 8, 512, width)), torch.device("cuda", 0)

        def element_size(self) -> int:
            return 2

    query: Any = OnGpu()
    trains = capability in ((8, 0), (9, 0)) or width not in (200, 224)
    assert packed_attention.supports(query, query, samples=1) is trains
    assert supports_grouped_heads(query, masked=False) is trains


def test_heads_are_repeated_where_flash_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        shape, device = torch.Size((1, 8, 512, 128)), torch.device("cuda", 0)

        def __init__(self, size: int) -> None:
            self.size = size

        def element_size(self) -> int:
            return self.size

    def supported(size: int, *, ampere: bool, masked: bool) -> bool:
        monkeypatch.setattr(packed_attention, "capability_of", lambda device: (8 if ampere else 7, 5))
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
    monkeypatch.setattr(packed_attention, "capability_of", lambda device: (8, 6))
    assert choose_attention(recipe("auto"), gpu()) == "varlen"
    assert choose_attention(recipe("sdpa"), gpu()) == "segments"
    assert choose_attention(recipe("auto"), gpu(torch.float32)) == "segments"
    monkeypatch.setattr(packed_attention, "capability_of", lambda device: (7, 5))
    assert choose_attention(recipe("auto"), gpu()) == "segments"


@pytest.mark.parametrize("ampere", [True, False])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_the_estimate_assumes_the_attention_that_the_trainer_chooses(
    ampere: bool, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "capability_of", lambda device: (8 if ampere else 7, 5))
    monkeypatch.setattr(packed_attention, "find_kernel", lambda: varlen_reference if has_kernel else None)
    attentions, dtypes = ("auto", "flash", "sdpa", "eager"), ("bfloat16", "float16", "float32")
    every: Any = product(attentions, dtypes, ("cuda", "cpu"))
    for choice, compute_dtype, kind in every:
        wanted = Recipe(model=Model(attention=choice), quantization=Quantization(compute_dtype=compute_dtype))
        device = ComputeDevice(torch.device(kind), "a device", 8 << 30, getattr(torch, compute_dtype))
        capability = (8, 6) if ampere else (7, 5)
        execution = trainer_execution(wanted, Device(kind=kind, capability=capability, varlen=has_kernel))
        assumed = "varlen" if execution.varlen else "segments" if execution.segments else "eager"
        try:
            chosen = choose_attention(wanted, device)
        except UserError:
            assert choice == "flash" and assumed == "segments"
        else:
            assert chosen == assumed


def test_the_installed_torch_has_the_kernel() -> None:
    """Fails when torch changes its function: adapt ``packed_attention.attend``."""
    assert packed_attention.find_kernel() is not None
    assert segment_mask([3, 1]).flatten().tolist() == [0, 3, 4]
