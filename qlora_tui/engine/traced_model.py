"""A run's model without weights: quantized, with its adapter, as the trainer or peft prepares it.

Modules of bitsandbytes and adapters have tensors of the right sizes but no values. :mod:`.trace_worker` runs
a step of such a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.engine.device_kernels import compute_dtype, liger_loss
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE
from qlora_tui.memory.loading import LoadedWeight
from qlora_tui.memory.weights import quantized_experts, quantizes, round_to_block
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.exact_memory import TraceRequest
from qlora_tui.training import packed_attention
from qlora_tui.training.experts.routing import Experts4bit, replace_experts
from qlora_tui.training.model_class import build_on_meta, checkpointing_layers
from qlora_tui.training.streaming.input_offload import InputOffload, offload_inputs
from qlora_tui.training.streaming.slots import Copies

_EXPERT_DIMENSIONS = 3


def build(request: TraceRequest, architecture: Architecture) -> tuple[Any, tuple[LoadedWeight, ...]]:
    """Build the run's model with its adapter, without values. Return it and a description of each weight of
    the base.
    """
    execution, recipe = request.execution, request.recipe
    dtype = compute_dtype(execution)
    attention = "eager" if execution.attention == "eager" else "sdpa"
    model = build_on_meta(request.config, dtype=dtype, attention=attention)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    method = recipe.quantization.method
    if method != "none":
        _quantize(model, recipe, architecture, dtype)
    packs_experts = execution.own_fused and quantized_experts(recipe.quantization, architecture) != "none"
    if packs_experts:
        replace_experts(model, method, nested=recipe.quantization.double_quantization)
    weights = loaded_weights(model, counts)
    prepare = _as_trainer if execution.own_fused else _as_peft
    return prepare(model, request, architecture), weights


def _as_trainer(model: Any, request: TraceRequest, architecture: Architecture) -> Any:
    """Prepare a base as this project's trainer does."""
    from qlora_tui.training import model as model_loading
    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.loss import find_head, use_loss

    execution, recipe = request.execution, request.recipe
    model_loading.freeze(model)
    if execution.segments:
        packed_attention.use_packed_attention(model, "varlen" if execution.varlen else "segments")
    if execution.checkpointing:
        model_loading.checkpoint_activations(model, preserve_rng_state=False)
        model_loading.apply_kept_layers(model, execution.kept_layers)
    if execution.offloads_inputs:
        offload = InputOffload(
            _NoCopies(torch.device("meta")), lambda size: torch.empty(size, dtype=torch.uint8, device="cpu")
        )
        offload_inputs(checkpointing_layers(model), offload)
    head = find_head(model) if execution.loss != "stock" else "the stock loss is traced"
    use_loss(model, head, liger_loss(head) if execution.loss == "liger" else None)
    with torch.device("meta"):
        return add_lora(model, recipe.lora, architecture, range(len(set(recipe.lora.trainable_tokens))))


class _NoCopies(Copies):
    """A replacement for copies to and from host memory, for tensors without values."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """Do nothing."""


def _as_peft(model: Any, request: TraceRequest, architecture: Architecture) -> Any:
    """Prepare a base as peft and transformers' ``Trainer`` do."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora_tui.recipe.targets import resolve_targets
    from qlora_tui.training.adapter import exact_target_names

    execution, recipe = request.execution, request.recipe
    options = {"use_reentrant": execution.reentrant, "preserve_rng_state": False}
    if execution.cast_to_float32:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=execution.checkpointing,
            gradient_checkpointing_kwargs=options,
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    if execution.loss_code != "padded":
        model.loss_function = _loss_of_shifted_logits
    if execution.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    names = [module.name for module in resolve_targets(recipe.lora, architecture.targets)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.rank,
        lora_alpha=int(recipe.lora.alpha),
        lora_dropout=recipe.lora.dropout,
        target_modules=names,
        use_dora=recipe.lora.use_dora,
    )
    with torch.device("meta"), exact_target_names(model, names):
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def _loss_of_shifted_logits(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """Compute ``ForCausalLMLoss`` as in transformers before 4.49."""
    logits = logits.float()  # alive until the loss is returned
    shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
    return nn.functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))


def _quantize(model: nn.Module, recipe: Recipe, architecture: Architecture, dtype: torch.dtype) -> None:
    """Insert bitsandbytes modules with packed weights and scales of the right sizes but no values."""
    method = recipe.quantization.method
    for module in architecture.modules:
        if not quantizes(recipe.quantization, module):
            continue
        parent, _, leaf = module.name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:  # a text model extracted from a multimodal one
            continue
        shape = (module.out_features, module.in_features)
        layer = (
            _eight_bits(*shape, module.bias)
            if method == "int8"
            else _four_bits(*shape, module.bias, recipe, dtype)
        )
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        setattr(holder, leaf, layer)
    # Model code that reads weights directly, and peft, check this.
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._is_quantized = True
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = method != "int8", method == "int8"  # type: ignore[assignment]


def _eight_bits(outputs: int, inputs: int, bias: bool) -> Any:
    """Return an 8-bit layer without outlier columns. Their number depends on the values, and is small."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False, threshold=0.0, device="meta")
    packed = torch.empty(outputs, inputs, dtype=torch.int8, device="meta")
    scales = torch.empty(outputs, device="meta")
    layer.weight = Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    layer.state.CB, layer.state.SCB = packed, scales
    return layer


def _four_bits(outputs: int, inputs: int, bias: bool, recipe: Recipe, dtype: torch.dtype) -> Any:
    from bitsandbytes import functional as quantization
    from bitsandbytes.nn import Linear4bit, Params4bit

    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    layer = Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype, device="meta")
    count = inputs * outputs
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
        shape=torch.Size((outputs, inputs)),
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
    return layer


def loaded_weights(model: nn.Module, counts: dict[str, int]) -> tuple[LoadedWeight, ...]:
    """Return the weights of a quantized base. ``counts`` has the numbers of elements before quantization."""
    modules = dict(model.named_modules())
    stored = dict(model.named_parameters(remove_duplicate=False))
    weights = []
    for name, count in counts.items():
        module = modules[name.rpartition(".")[0]]
        packed: tuple[int, ...] = ()
        matrices = 1
        tensor = stored[name]
        if isinstance(module, Experts4bit) and not tensor.is_floating_point():
            tensors = module.tensors(name.rpartition(".")[2]).values()
            packed, matrices = tuple(each.untyped_storage().nbytes() for each in tensors), module.num_experts
        elif not tensor.is_floating_point():
            packed = (*_scale_sizes(tensor), tensor.untyped_storage().nbytes())
        weights.append(LoadedWeight(name, count, packed, matrices))
    return tuple(weights)


def frozen_items(model: Any) -> Iterator[tuple[nn.Module, Counter[str]]]:
    """Yield modules with the bytes of their frozen weights, by the keys of :data:`.static_memory.FROZEN`."""
    base = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    of_text = set(decoder.modules()) | set(head.modules())
    seen: set[int] = set()
    for module in model.modules():
        items: Counter[str] = Counter()
        tensors = [*module.parameters(recurse=False)]
        if isinstance(module, Experts4bit):
            tensors += module.buffers(recurse=False)
        for tensor in tensors:
            if tensor.requires_grad or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            item = _item_of(module, tensor, head)
            items[item if module in of_text else "vision"] += _size(tensor)
            items["scales"] += sum(map(round_to_block, _scale_sizes(tensor)))
        if items:
            yield module, items


def _item_of(module: nn.Module, tensor: Tensor, head: nn.Module) -> str:
    if isinstance(module, Experts4bit) or tensor.dim() == _EXPERT_DIMENSIONS:
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module in set(head.modules()):
        return "head"
    if hasattr(tensor, "quant_state") or tensor.dtype == torch.int8:
        return "weights"
    return "linear" if isinstance(module, (nn.Linear, Conv1D)) else "norms"


def _scale_sizes(tensor: Tensor) -> tuple[int, ...]:
    """Return the bytes of a quantized weight's scales and of its code tables."""
    if tensor.dtype == torch.int8:
        return (tensor.shape[0] * ADAPTER_ITEMSIZE,)
    sizes = []
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for each in (state.absmax, state.code, getattr(state, "offset", None)):
            sizes += [each.untyped_storage().nbytes()] if isinstance(each, Tensor) else []
        state = getattr(state, "state2", None)
    return tuple(sizes)


def _size(tensor: Tensor) -> int:
    return round_to_block(tensor.untyped_storage().nbytes())
