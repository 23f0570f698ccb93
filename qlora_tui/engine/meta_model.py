"""The model of a traced step: as the trainer prepares it, but on the ``meta`` device, without weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.model_validation import without_code
from qlora_tui.engine.trace_client import TraceRequest
from qlora_tui.memory.weights import quantized_experts
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import packed_attention


def build(request: TraceRequest, architecture: Architecture, dtype: torch.dtype) -> tuple[Any, bool]:
    """Build the trainer's model without weights; also return whether packed samples are isolated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_tui.training import model as model_loading
    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.experts.routing import replace_experts
    from qlora_tui.training.loss import find_head, use_loss

    recipe, factory = request.recipe, cast(Any, AutoModelForCausalLM)
    clean, _ = without_code(request.config)
    values = {k: v for k, v in clean.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    config = AutoConfig.for_model(**values)
    attention = "eager" if recipe.model.attention == "eager" else "sdpa"
    with torch.device("meta"):
        try:
            model = factory.from_config(config, dtype=dtype, attn_implementation=attention)
        except ValueError:  # the family has no SDPA
            model = factory.from_config(config, dtype=dtype, attn_implementation="eager")
    if recipe.quantization.method in ("nf4", "fp4"):
        _quantize(model, recipe, architecture, dtype)
        if quantized_experts(recipe.quantization, architecture) != "none":
            replace_experts(model, recipe.quantization.method, nested=recipe.quantization.double_quantization)
    model_loading.freeze(model)
    segments = attention != "eager" and packed_attention.use_packed_attention(
        model, "varlen" if request.varlen else "segments"
    )
    if recipe.training.gradient_checkpointing != "off":
        model_loading.checkpoint_activations(model, preserve_rng_state=False)
    model.enable_input_require_grads()
    is_chunked = request.loss == "chunked" or recipe.preference_method is not None
    use_loss(model, find_head(model) if is_chunked else "the stock loss is traced")
    with torch.device("meta"):
        return add_lora(
            model, recipe.lora, architecture, range(len(set(recipe.lora.trainable_tokens)))
        ), segments


def inputs(request: TraceRequest, *, padding_free: bool) -> dict[str, Any]:
    """Build one micro-batch with every token in the loss, packed into one sequence where possible."""
    recipe = request.recipe
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    shape = (1, rows * length) if padding_free else (rows, length)
    labels = torch.zeros(shape, dtype=torch.long, device="cpu" if request.loss == "chunked" else "meta")
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device="meta"),
        "labels": labels,
    }
    if recipe.preference_method is not None:
        batch |= {"per_token": True, "loss_positions": torch.arange(labels.numel() - 1)}
    if padding_free:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.long, device="meta")
        batch["segments"] = [length] * rows
    else:
        # On the CPU, where transformers can read it and find nothing masked.
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return batch


def _quantize(model: nn.Module, recipe: Recipe, architecture: Architecture, dtype: torch.dtype) -> None:
    """Insert bitsandbytes modules with packed weights and scales of the right sizes but no values."""
    from bitsandbytes import functional as quantization
    from bitsandbytes.nn import Linear4bit, Params4bit

    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    for module in architecture.modules:
        if not module.quantizable:
            continue
        parent, _, leaf = module.name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:  # text model extracted from a multimodal one
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, bias=module.bias, compute_dtype=dtype, device="meta"
        )
        count = module.weight_params
        blocks = -(-count // 64)
        inner = None
        if nested:
            inner = quantization.QuantState(
                absmax=torch.empty(-(-blocks // 256), device="meta"),
                code=torch.empty(256, device="meta"),
                blocksize=256,
                dtype=torch.float32,
            )
        state = quantization.QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"),
            shape=torch.Size((module.out_features, module.in_features)),
            code=torch.empty(16, device="meta"),
            blocksize=64,
            quant_type=method,
            dtype=dtype,
            offset=torch.empty((), device="meta") if nested else None,
            state2=inner,
        )
        layer.weight = Params4bit(
            torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta"),
            requires_grad=False,
            quant_state=state,
            quant_type=method,
            compress_statistics=nested,
            bnb_quantized=True,
        )
        layer.quant_state = state
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        setattr(holder, leaf, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft goes by
