"""Where samples share a row: where each is what it is alone, and each layer attends as the library does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_tui.training import (
    attention_check,
    equivalence_checks,
    length_scaled_rope,
    model_loading,
    packed_attention,
)
from qlora_tui.training.batches import RowShape, collate
from qlora_tui.training.fused.cpu_attention import RowAttention
from qlora_tui.training.step_check import Excerpt
from tests.training.families import build
from tests.training.trained_weights import LENGTH_SCALED, build_with_trained_weights, in_turns

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
ACROSS_SAMPLES = ["bloom", "falcon", "gpt_neo", "lfm2", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]
"""Attention of their own, or layers that pass a state on from token to token."""


def packing(model_type: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A model that attends sample by sample, where its family can."""
    model = build_with_trained_weights(model_type, dtype, **settings)
    model_loading.use_packed_attention(model)
    packed_attention.pass_sample_lengths(model)
    return model


@pytest.mark.parametrize(("model_type", "dtype"), in_turns(DTYPES))
def test_every_family_that_keeps_samples_apart_is_proved(model_type: str, dtype: torch.dtype) -> None:
    model = packing(model_type, dtype)
    implementation = model.config._attn_implementation
    windows = [getattr(m, "sliding_window", None) for m in (model.config, *model.modules())]
    assert equivalence_checks.packing_is_isolated(model, CPU) == (model_type not in ACROSS_SAMPLES)
    assert model.config._attn_implementation == implementation
    assert windows == [getattr(m, "sliding_window", None) for m in (model.config, *model.modules())]


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
            assert not equivalence_checks.packing_is_isolated(model, CPU), model_type


@pytest.mark.parametrize("error", [0.97, 1.03])
def test_a_kernel_of_bf16_alone_is_held_to_bf16s_noise(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def apply(*given: Any) -> Tensor:
            out: Tensor = RowAttention.apply(*given)  # type: ignore[no-untyped-call]  # torch's own
            return out * error

    assert equivalence_checks.packing_is_isolated(packing("llama", torch.bfloat16), CPU)
    monkeypatch.setattr(packed_attention, "RowAttention", Wrong)
    assert not equivalence_checks.packing_is_isolated(packing("llama", torch.bfloat16), CPU)


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
    assert equivalence_checks.packing_is_isolated(model, CPU) == (model_type == "llama")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_faint_leak_through_another_layer_is_noticed(dtype: torch.dtype) -> None:
    """A thousandth of the token before, in one layer: less than the rounding of bf16 in most elements."""
    model = packing("llama", dtype)
    model.get_decoder().layers[0].mlp.register_forward_hook(
        lambda module, given, out: out + 1e-3 * out.roll(1, dims=1)
    )
    assert not equivalence_checks.packing_is_isolated(model, CPU)


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
    samples = Excerpt(
        tuple(tuple(ids[i, :n].tolist()) for i, n in enumerate(lengths)),
        tuple((1,) * n for n in lengths),
        (None,) * len(lengths),
    )
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
    model_loading.use_packed_attention(model)
    packed_attention.pass_sample_lengths(model)
    assert not equivalence_checks.packing_is_isolated(model, CPU)
    length_scaled_rope.scale_each_sample(model)
    assert equivalence_checks.packing_is_isolated(model, CPU)


def test_windows_are_restored_after_an_error() -> None:
    model = packing("mistral", torch.float32)
    with pytest.raises(RuntimeError), attention_check.short_windows(model):
        assert model.config.sliding_window == 3
        raise RuntimeError
    assert model.config.sliding_window == 8
