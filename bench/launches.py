"""Kernel launches of a training step per layer, ours and the usual script's, counted without a GPU.

    python -m bench.launches [--samples 1 8 16] [--json]

A Llama with random NF4 weights in bfloat16, LoRA on every linear module, gradient checkpointing of every
layer: forward, recomputation and backward. The launches of a layer are the difference between models of two
sizes. Packed attention counts as one kernel forward and one backward, as on a GPU from Ampere on. The usual
script is transformers and peft under autocast with samples in padded rows.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.support.launches import LaunchCounter

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
        {"samples": samples, "ours": per_layer(samples, ours=True), "usual": per_layer(samples, ours=False)}
        for samples in args.samples
    ]
    if args.json:
        print(json.dumps(rows))
        return
    print("samples   ours  usual  launches per layer and step")
    for row in rows:
        print(f"{row['samples']:>7} {row['ours'].total():>6} {row['usual'].total():>6}")
    print("\nours, by operation:")
    for name, count in rows[0]["ours"].most_common():
        print(f"{count:>7}  {name}")


def per_layer(samples: int, *, ours: bool) -> Counter[str]:
    """Launches of one layer in a step over a row of ``samples`` samples, by operation."""
    few, many = (_step_launches(layers, samples, ours=ours) for layers in LAYERS)
    layers = LAYERS[1] - LAYERS[0]
    many.subtract(few)
    return Counter({name: count // layers for name, count in many.items() if count})


def _step_launches(layers: int, samples: int, *, ours: bool) -> Counter[str]:
    from qlora_tui.training import varlen_attention

    torch.manual_seed(0)
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
    counter = LaunchCounter()
    with (
        patch.object(varlen_attention, "find_kernel", lambda: _one_kernel(counter)),
        patch.object(varlen_attention, "supports", lambda query, value, samples: True),
        nullcontext() if ours else torch.autocast("cpu", torch.bfloat16),
    ):
        model(**batch).loss.backward()  # the first step does more, such as casting tables
        counter.by_name.clear()
        with counter:
            model(**batch).loss.backward()
    return counter.by_name


def _model(layers: int, *, ours: bool) -> Any:
    """A tiny Llama as a run trains it, or as the usual script does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_tui.catalog.config_parser import parse_architecture
    from qlora_tui.recipe.schema import Lora, Recipe
    from qlora_tui.training import adapter, chunked_loss, model_loading

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
        chunked_loss.use_segments(base)
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
