"""Kernel launches of a training step per layer, ours and the usual script's, counted without a GPU.

    python -m bench.launches [--samples 1 8 16] [--json]

A Llama with random NF4 weights in bfloat16, LoRA on every linear module, gradient checkpointing of every
layer: forward, recomputation and backward. The launches of a layer are the difference between models of two
sizes. Packed attention counts as one kernel forward and one backward, as on a GPU from Ampere on, and so does
each of our Triton kernels in the second column. The usual script is transformers and peft under autocast with
samples in padded sequences.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

from bench.support.launches import LaunchCounter

Code: TypeAlias = Literal["ours", "triton", "usual"]
CODES: tuple[Code, ...] = ("ours", "triton", "usual")
"""Ours with torch's kernels, ours with Triton's, and the usual script."""
LAYERS = (1, 3)
TOKENS = 64
"""Of a row."""


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [
        {"samples": samples} | {code: per_layer(samples, code) for code in CODES} for samples in args.samples
    ]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"samples {''.join(f'{code:>8}' for code in CODES)}  launches per layer and step")
    for row in rows:
        print(f"{row['samples']:>7} {''.join(f'{row[code].total():>8}' for code in CODES)}")
    for code in CODES[:2]:
        print(f"\n{code}, by operation:")
        for name, count in rows[0][code].most_common():
            print(f"{count:>7}  {name}")


def per_layer(samples: int, code: Code) -> Counter[str]:
    """Launches of one layer in a step over a row of ``samples`` samples, by operation."""
    few, many = (_step_launches(layers, samples, code) for layers in LAYERS)
    layers = LAYERS[1] - LAYERS[0]
    many.subtract(few)
    return Counter({name: count // layers for name, count in many.items() if count})


def _step_launches(layers: int, samples: int, code: Code) -> Counter[str]:
    from qlora_tui.training import varlen_attention

    torch.manual_seed(0)
    counter = LaunchCounter()
    ours = code != "usual"
    with ExitStack() as stack:
        if code == "triton":
            _use_counted_kernels(stack, counter)
        model = _model(layers, ours=ours)
        length = TOKENS // samples
        ids = torch.randint(3, 100, (1, TOKENS) if ours else (samples, length))
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if ours:
            from qlora_tui.training.chunked_loss import loss_positions

            batch |= {
                "position_ids": torch.arange(length).repeat(samples)[None],
                "segments": [length] * samples,
                "loss_positions": loss_positions(ids),
            }
        else:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(patch.object(varlen_attention, "find_kernel", lambda: _one_kernel(counter)))
        stack.enter_context(patch.object(varlen_attention, "supports", lambda query, value, samples: True))
        model(**batch).loss.backward()  # the first step does more, such as casting tables
        counter.by_name.clear()
        with counter:
            model(**batch).loss.backward()
    return counter.by_name


def _use_counted_kernels(stack: ExitStack, counter: LaunchCounter) -> None:
    """Use stand-ins for Triton's kernels, each counted as one. Their values do not matter here."""
    from qlora_tui.training.fused import gated_mlp, rms_norm, rotary

    def norm(x: Tensor, weight: Tensor, eps: float, **settings: Any) -> tuple[Tensor, Tensor]:
        with counter.counted_as("Triton norm"):
            return torch.zeros_like(x), x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)

    def like(name: str, count: int) -> Any:
        def call(*tensors: Any, **settings: Any) -> Any:
            with counter.counted_as(name):
                results = tuple(torch.zeros_like(x) for x in tensors[:count])
            return results if count > 1 else results[0]

        return call

    kernels = SimpleNamespace(
        fits_row=lambda width: True,
        rms_norm=norm,
        rms_norm_backward=like("Triton norm backward", 1),
        gated_product=like("Triton gated product", 1),
        gated_product_backward=like("Triton gated product backward", 2),
        rotate=like("Triton rotation", 2),
    )
    for module in (gated_mlp, rms_norm, rotary):
        stack.enter_context(patch.object(module, "find_kernels", lambda device, dtype: kernels))
    kinds = frozenset({(True, torch.bfloat16)})
    stack.enter_context(patch.object(rotary, "_same_kinds", lambda *settings: kinds))


def _model(layers: int, *, ours: bool) -> Any:
    """A tiny Llama as a run trains it, or as the usual script does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_tui.catalog.config_parser import parse_architecture
    from qlora_tui.recipe.schema import Lora, Recipe
    from qlora_tui.training import adapter, chunked_loss, model_loading, packed_attention

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    architecture = parse_architecture(config.to_dict())
    recipe = Recipe(lora=Lora(rank=8, alpha=16.0))
    _quantize(base)
    model_loading.freeze(base)
    base.enable_input_require_grads()
    if ours:
        head = chunked_loss.find_head(base)
        assert not isinstance(head, str)
        assert model_loading.use_packed_attention(base, "varlen")
        chunked_loss.use_chunked_loss(base, head)
        packed_attention.pass_sample_lengths(base)
        model = adapter.add_lora(base, recipe.lora, architecture)
    else:
        with patch.object(adapter, "use_fused", lambda model: None):
            model = adapter.add_lora(base, recipe.lora, architecture)
    model_loading.checkpoint_activations(base)
    return model.train()


def _quantize(model: Any) -> None:
    """NF4 with double quantization for every linear module but the head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    model.is_loaded_in_4bit = True


def _one_kernel(counter: LaunchCounter) -> Any:
    """Attention over a row, counted as one kernel in each direction. Its values do not matter here."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            ctx.shapes = [x.shape for x in (query, key, value)]
            with counter.counted_as("flash forward"):
                return query.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
            with counter.counted_as("flash backward"):
                return tuple(grad_outputs[0].new_zeros(shape) for shape in ctx.shapes)

    def attend(query: Tensor, key: Tensor, value: Tensor, *places: Any, **options: Any) -> Tensor:
        output: Tensor = Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch's own
        return output

    return attend


if __name__ == "__main__":
    main()
