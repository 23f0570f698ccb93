"""Runs training steps on the fake GPU and on the CPU, and prints one line of JSON for each case."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training import loss as chunked_loss
from qlora_tui.training import model as model_loading
from qlora_tui.training import packed_attention, quantized_cache
from qlora_tui.training.batches import mask_all_labels, on_device
from qlora_tui.training.checks import base
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.fused import lora
from qlora_tui.training.model import load_base, quantized_on
from qlora_tui.training.packed_attention import PackedAttention
from qlora_tui.training.streaming.slots import all_tensors
from tests.training.fake_cuda import (
    FAKE_DEVICE,
    KIND,
    FakeCudaTensor,
    fake_cuda,
    move_to_fake_cuda,
    set_up,
    values,
)
from tests.training.families import FAMILIES, build, with_adapter
from tests.training.test_packing import varlen_reference
from tests.training.trained_weights import CLAIMED

LENGTHS = [11, 17, 12]
IDS = [40, 7, 251]


def prepared(model_type: str, *, four_bit: bool = False, kind: PackedAttention = "segments") -> Any:
    """A tiny model of the family as a run has it before the adapter."""
    model = build(model_type)
    if four_bit:
        quantize(model)
    use_fast_paths(model, kind)
    return model


def use_fast_paths(model: Any, kind: PackedAttention = "segments") -> None:
    """Use packed attention and the chunked loss."""
    head = chunked_loss.find_head(model)
    assert not isinstance(head, str)
    assert packed_attention.use_packed_attention(model, kind)
    chunked_loss.use_loss(model, head)


def quantize(model: Any) -> None:
    """NF4 with double quantization, as bitsandbytes does it when it loads."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
                quantized = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                quantized.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(
                    "cpu"
                )
                if module.bias is not None:
                    quantized.bias = module.bias
                setattr(parent, name, quantized)
    model_loading.freeze(model)


def packed(weighted: bool = False) -> dict[str, Any]:
    """A row of packed samples, their prompts not in the loss."""
    tokens = sum(LENGTHS)
    ids = torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(2))
    ids[0, 5], ids[0, 20] = IDS[0], IDS[1]
    labels = ids.clone()
    labels[0, [*range(4), *range(11, 15), *range(28, 33)]] = chunked_loss.IGNORED
    batch = {
        "input_ids": ids,
        "labels": labels,
        "loss_positions": chunked_loss.loss_positions(labels),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "segments": LENGTHS,
    }
    if weighted:
        batch["loss_weights"] = torch.linspace(0.2, 1.0, tokens)[None]
    return batch


def padded() -> dict[str, Any]:
    """Two rows, the second one short."""
    ids = torch.randint(3, 300, (2, 15), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, chunked_loss.IGNORED)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "loss_positions": chunked_loss.loss_positions(labels),
    }


def prompts_only() -> dict[str, Any]:
    """A row without any token in the loss."""
    return mask_all_labels(packed())


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Forward and backward: the loss, and the gradient of all that is trained."""
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return float(values(loss.detach())), {name: values(grad) for name, grad in trained.items()}


def compare_with_cpu(
    family: str,
    batch: dict[str, Any],
    *,
    four_bit: bool = False,
    checkpointing: bool = False,
    rows: bool = False,
    kind: PackedAttention = "segments",
    **adapter: Any,
) -> dict[str, Any]:
    """The same step on the CPU and on the fake GPU."""

    def ready(model: Any) -> Any:
        model = with_adapter(model, IDS if rows else (), **adapter).train()
        if checkpointing:
            model_loading.checkpoint_activations(model.get_base_model(), preserve_rng_state=False)
        return model

    model = ready(prepared(family, four_bit=four_bit))
    torch.manual_seed(3)
    expected, gradients = step(model, batch)
    there = prepared(family, four_bit=four_bit, kind=kind)
    move_to_fake_cuda(there)
    with fake_cuda() as log:
        model = ready(there)
        log.waits.clear()
        torch.manual_seed(3)
        loss, others = step(model, on_device(batch, FAKE_DEVICE))
    far = torch.stack(
        [
            (others[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            for name, gradient in gradients.items()
        ]
    )
    return {
        "loss": loss,
        "on_cpu": expected,
        "gradients_differ": float(far.max()),
        "refused": log.refused,
        "waits": log.waits,
    }


def with_dropout() -> dict[str, Any]:
    """A step with dropout drawn as a GPU draws it, on the CPU too."""
    stock = lora._dropout_mask
    lora._dropout_mask = lambda values, p: torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
    try:
        return compare_with_cpu("llama", packed(), dropout=0.1)
    finally:
        lora._dropout_mask = stock


def one_call() -> dict[str, Any]:
    """A step with variable-length attention, whose kernel is written out; on the CPU a call per sample."""
    with (
        patch.object(packed_attention, "supports", lambda query, value, samples: query.device.type == KIND),
        patch.object(packed_attention, "find_kernel", lambda: varlen_reference),
    ):
        return compare_with_cpu("gemma3_text", packed(), kind="varlen")


def checked(family: str) -> dict[str, Any]:
    """What is proved of a model before training: a mix-up there would only cost packing, or the loss."""
    model = build(family)
    head = chunked_loss.find_head(model)
    assert not isinstance(head, str)
    move_to_fake_cuda(model)
    device = torch.device(FAKE_DEVICE)
    with fake_cuda() as log:
        # Of the model's own loss, before ours is in its place.
        is_exact = base.head_matches_model(model, head, device)
        use_fast_paths(model)
        padding_free = base.packing_is_isolated(model, device)
    return {"loss_is_exact": is_exact, "padding_free": padding_free, "refused": log.refused}


def quantized_there(method: Any, family: str = "llama", **settings: Any) -> dict[str, Any]:
    """A base that is loaded to host memory, and on which devices its weights are quantized."""
    devices: list[str] = []

    def logged(quantize: Any) -> Any:
        def run(weight: Tensor, *args: Any, **options: Any) -> Any:
            devices.append(weight.device.type)
            return quantize(weight, *args, **options)

        return run

    with tempfile.TemporaryDirectory() as folder:
        build(family, **settings).save_pretrained(folder)
        quantization = Quantization(method=method, compute_dtype="float32")
        recipe = Recipe(model=Model(id=folder), quantization=quantization)
        load = partial(load_base, Path(folder), recipe, find_device(recipe), "eager")
        functional: Any = importlib.import_module("bitsandbytes.functional")
        names = ("quantize_4bit", "int8_vectorwise_quant")
        with (
            patch.object(quantized_cache, "cache_path", lambda *args: None),
            patch.multiple(functional, **{name: logged(getattr(functional, name)) for name in names}),
            fake_cuda() as log,
        ):
            expected, on_cpu = all_tensors(load()), len(devices)
            with quantized_on(torch.device(FAKE_DEVICE)):
                tensors = all_tensors(load())
    return {
        "on_gpu": on_cpu > 0 and devices == on_cpu * ["cpu"] + on_cpu * [KIND],
        "in_host_memory": not any(isinstance(tensor, FakeCudaTensor) for tensor in tensors),
        "equal": len(tensors) == len(expected) and all(map(torch.equal, tensors, expected)),
        "refused": log.refused,
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    # gpt-oss counts its experts' tokens in whole numbers, which only a real GPU can.
    **{family: partial(compare_with_cpu, family, packed()) for family in FAMILIES if family != "gpt_oss"},
    "4 bits": partial(compare_with_cpu, "llama", packed(), four_bit=True),
    "checkpointing": partial(compare_with_cpu, "llama", packed(), four_bit=True, checkpointing=True),
    "rank-stabilised": partial(compare_with_cpu, "qwen2", packed(), use_rslora=True),
    "DoRA": partial(compare_with_cpu, "llama", packed(), use_dora=True),
    "token rows": partial(compare_with_cpu, "qwen3", packed(), rows=True),
    "weighted tokens": partial(compare_with_cpu, "qwen2", packed(weighted=True)),
    "padded sequences": partial(compare_with_cpu, "llama", padded()),
    "no token in the loss": partial(compare_with_cpu, "llama", prompts_only(), rows=True),
    "dropout": with_dropout,
    "one call": one_call,
    **{f"checks of {family}": partial(checked, family) for family in ("llama", "gemma2")},
    **{f"loading in {method}": partial(quantized_there, method) for method in ("nf4", "fp4", "int8")},
    "loading experts": partial(quantized_there, "nf4", "qwen3_moe", **CLAIMED["qwen3_moe"]),
}


def main() -> None:
    """Every case, whatever becomes of the others."""
    set_up()
    for name, case in CASES.items():
        try:
            result = case()
        except Exception as error:  # the error is the result
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name} | result), flush=True)
    # torch's threads of a device made in Python may not outlive Python's end.
    os._exit(0)


if __name__ == "__main__":
    main()
