"""Loads the base model, quantized while it is read, and freezes it.

This replaces ``peft.prepare_model_for_kbit_training``, which would cast norms, embeddings and head to fp32
and with them every hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.catalog.config_parser import load_config, parse_architecture
from qlora_tui.catalog.model_validation import is_mxfp4
from qlora_tui.drafts import discard
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import AttentionPath
from qlora_tui.memory.weights import require_4_bit_experts
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.training import packed_attention, quantized_cache
from qlora_tui.training.clean_files import model_view
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.dropout import draws_random_numbers
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.heap import release_gpu_memory
from qlora_tui.training.kernel_publishers import pin_publisher

ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Receives what is done, and the total."""


def load_base(
    folder: Path,
    recipe: Recipe,
    device: ComputeDevice,
    attention_path: AttentionPath,
    on_progress: ProgressCallback | None = None,
    *,
    to_host: bool = False,
) -> Any:
    """Load the causal language model in ``folder`` to the device, with every weight frozen.

    Its configs select no code: see :mod:`qlora_tui.catalog.model_validation`. 4-bit weights are read as an
    earlier load stored them, where one did (:mod:`.quantized_cache`).

    Args:
        folder: from ``catalog.local_models.resolve_model``.
        on_progress: called with the number of tensors loaded, and of all.
        to_host: leave it in host memory, quantized on the device weight by weight.

    Raises:
        UserError: it cannot be loaded.
    """
    quantization = _quantization_config(recipe.quantization, device)
    stored = quantized_cache.cache_path(folder, recipe, device)
    quantizes_here: AbstractContextManager[None] = nullcontext()
    if to_host and device.kind == "cuda":
        quantizes_here = quantized_on(device.torch_device)
        device = replace(device, torch_device=torch.device("cpu"))
    model = None
    with _expert_quantization(folder, recipe), quantizes_here:
        if stored is not None and quantized_cache.is_stored(stored):
            model = _load_stored(stored, device, attention_path, on_progress)
        is_mapped = model is not None
        if model is None:
            settings = {}
            if quantization is not None and not _is_stored_quantized(folder):
                settings["quantization_config"] = quantization
            model = _load(folder, device, attention_path, on_progress, **settings)
            if stored is not None:
                quantized_cache.store(model, stored)
    # peft writes this into the adapter as its base model.
    model.config._name_or_path = model.name_or_path = str(folder)
    if device.kind == "cpu" and quantization is not None and not is_mapped:
        _detach_from_mmap(model)
    return freeze(model)


@contextmanager
def quantized_on(device: torch.device) -> Iterator[None]:
    """Quantize the weights of a base that is loaded to host memory inside on a GPU, one after another.

    A CPU takes minutes for an 8B and hours for a 70B. Each weight is copied to the GPU, and what the kernel
    makes of it is copied back: the bits of a base that is loaded to the GPU.
    """
    from bitsandbytes import functional

    four_bit, eight_bit = functional.quantize_4bit, functional.int8_vectorwise_quant

    def quantize_4bit(weight: Tensor, *args: Any, **options: Any) -> Any:
        packed, state = four_bit(weight.to(device), *args, **options)
        state.to(weight.device)
        return packed.to(weight.device), state

    def int8_vectorwise_quant(weight: Tensor, *args: Any, **options: Any) -> Any:
        results = eight_bit(weight.to(device), *args, **options)
        return tuple(each.to(weight.device) if isinstance(each, Tensor) else each for each in results)

    functional.quantize_4bit = quantize_4bit
    functional.int8_vectorwise_quant = int8_vectorwise_quant
    try:
        yield
    finally:
        functional.quantize_4bit, functional.int8_vectorwise_quant = four_bit, eight_bit
        # The streamed layers' memory is not cut from what weights were copied to.
        release_gpu_memory()


def _expert_quantization(folder: Path, recipe: Recipe) -> AbstractContextManager[None]:
    """Let a mixture of experts be loaded with 4-bit experts, where the recipe says so."""
    if not quantized_cache.quantizes_experts(folder, recipe):
        require_4_bit_experts(recipe.quantization, parse_architecture(load_config(folder / "config.json")))
        return nullcontext()
    from qlora_tui.training.experts.expert_loading import experts_in_4_bits

    return experts_in_4_bits()


def _load_stored(
    stored: Path, device: ComputeDevice, attention_path: AttentionPath, on_progress: ProgressCallback | None
) -> Any | None:
    """The model with weights that were quantized earlier; None where they cannot be read."""
    model = None
    try:
        model, info = _load(stored, device, attention_path, on_progress, output_loading_info=True)
        is_whole = not any(info.values())
    except Exception as error:  # whatever the libraries raise for a damaged file
        if is_out_of_memory(error):
            raise
        is_whole = False
    if not is_whole:
        # The next load needs the memory of what was read.
        del model
        release_gpu_memory()
        with suppress(OSError):
            discard(stored)
        return None
    quantized_cache.mark_used(stored)
    return model


def _load(
    folder: Path,
    device: ComputeDevice,
    attention_path: AttentionPath,
    on_progress: ProgressCallback | None,
    **settings: Any,
) -> Any:
    """What transformers loads from the folder. Raises UserError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # None lets transformers use SDPA, which a few families lack (Gemma 2, gpt-oss). The attention keys of the
    # model's own config are removed before.
    attention = "eager" if attention_path == "eager" else None
    pin_publisher()
    try:
        with model_view(folder) as view, loading_progress(on_progress):
            return AutoModelForCausalLM.from_pretrained(
                str(view),
                dtype=device.dtype,
                device_map={"": device.torch_device},
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **settings,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            "The model could not be loaded",
            what=f"{folder}: {_first_line(error)}",
            fix="Run `qlora-tui doctor` to check the installation, or download the model again.",
        ) from error


@contextmanager
def loading_progress(on_progress: ProgressCallback | None) -> Iterator[None]:
    """Report each tensor that transformers loads inside, where this version of it can say so."""
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if on_progress is None or set_hook is None:
        yield
        return

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_of_weights = kwargs.get("desc") == "Loading weights" and args and hasattr(args[0], "__len__")
        return counted(args[0]) if is_of_weights else factory(*args, **kwargs)

    def counted(tensors: Any) -> Iterator[Any]:
        for number, tensor in enumerate(tensors, 1):
            yield tensor
            on_progress(number, len(tensors))

    set_hook(hook)
    try:
        yield
    finally:
        set_hook(None)


def _detach_from_mmap(model: nn.Module) -> None:
    """Copy weights that are not quantized: they are views that would keep the whole mapped file in memory.

    A file of stored weights has only what is used: its 4-bit weights stay views, and so do the others.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def freeze(model: nn.Module) -> nn.Module:
    """Freeze every weight, with 4-bit weights in the layout that the backward needs."""
    model.requires_grad_(False)
    model.config.use_cache = False  # type: ignore[union-attr]  # a PreTrainedModel's
    for module in model.modules():
        # bitsandbytes repacks the weights of a layer for inference when it runs in eval mode on a CPU with
        # AVX512-BF16, never packs them back, and computes wrong gradients from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy takes it for a submodule
    return model


def use_packed_attention(model: Any, kind: packed_attention.PackedAttention = "segments") -> bool:
    """Switch to packed attention; False where the family does not use transformers' attention interface."""
    packed_attention.register()
    return set_attention(model, packed_attention.NAMES[kind])


def set_attention(model: Any, name: str) -> bool:
    """Switch to an attention implementation by name; False where the family does not support switching."""
    before = model.config._attn_implementation
    with suppress(ValueError, AttributeError, NotImplementedError):
        model.set_attn_implementation(name)
    if model.config._attn_implementation == name:
        return True
    model.set_attn_implementation(before)
    return False


def checkpoint_activations(model: Any, *, preserve_rng_state: bool | None = None) -> None:
    """Save one hidden state per layer and recompute the rest in the backward; see :func:`apply_kept_layers`.

    Args:
        preserve_rng_state: repeat the random numbers of the forward, which needs a real device and costs
            time in each layer. None: only if the model, or its adapter (already added), draws any.
    """
    if preserve_rng_state is None:
        preserve_rng_state = draws_random_numbers(model)
    kwargs = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def apply_kept_layers(model: Any, count: int) -> bool:
    """Exempt the last ``count`` decoder layers of a model from its gradient checkpointing.

    Returns:
        False where the model's layers cannot be switched one by one: then nothing is changed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        return False
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < len(layers) - count
    return True


def _quantization_config(settings: Quantization, device: ComputeDevice) -> Any:
    """The quantization config for transformers; None loads the weights as they are stored.

    It has no list of modules to skip: transformers leaves out the head and tied weights, and
    ``LinearSpec.quantizable`` of the catalog must say the same.
    """
    from transformers import BitsAndBytesConfig

    if settings.method in ("nf4", "fp4"):
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.method,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=device.dtype,
        )
    if settings.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return None


def _is_stored_quantized(folder: Path) -> bool:
    """Whether the weights are stored quantized by bitsandbytes, and not in 16 bits or MXFP4."""
    config = load_config(folder / "config.json")
    return bool(config.get("quantization_config")) and not is_mxfp4(config)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
