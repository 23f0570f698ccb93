"""The base model before LoRA is added: loaded, quantized while it is read, frozen, and verified.

Loss and attention are verified on the model itself before they are used. This module replaces
``peft.prepare_model_for_kbit_training``, which would cast norms, embeddings and head to fp32, and thereby
every hidden state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import is_mxfp4
from qlora_tui.errors import UserError, first_line
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.memory.execution import AttentionPath, Loss
from qlora_tui.memory.weights import require_4_bit_experts
from qlora_tui.publishing import discard
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.recipe.targets import SKIP, match_modules
from qlora_tui.training import quantized_cache
from qlora_tui.training.checks.attention import setting_owners
from qlora_tui.training.checks.base import head_matches_model, packing_is_isolated
from qlora_tui.training.clean_files import model_view, pin_publisher
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.description import architecture_of
from qlora_tui.training.fused.kernel_choice import allow_kernels, verify_kernels
from qlora_tui.training.host import release_gpu_memory
from qlora_tui.training.length_scaled_rope import scale_each_sample
from qlora_tui.training.liger import verified_liger_loss
from qlora_tui.training.loss import ChunkedHead, LossSumFn, find_head, use_loss
from qlora_tui.training.model_class import (
    auto_class,
    build_on_meta,
    decoder_layers,
    leave_weights,
    read_config,
)
from qlora_tui.training.packed_attention import PackedAttention, set_attention, use_packed_attention
from qlora_tui.training.streaming.placement import StreamedLayers, place_streamed


class DropoutSetting(NamedTuple):
    """A nonzero dropout probability: an attribute of a module or of its config."""

    owner: Any
    name: str
    value: float


def dropout_settings(model: nn.Module) -> list[DropoutSetting]:
    """Return every nonzero dropout probability of the model and its adapter.

    Dropouts are modules, probabilities that a module passes to a function (``attention_dropout``), and, in
    Falcon, probabilities that it reads from its config at each call.
    """
    return [
        DropoutSetting(owner, name, value)
        for owner, name, value in _floats(model)
        if "drop" in name or (name == "p" and isinstance(owner, _DropoutNd))
    ]


def draws_random_numbers(model: nn.Module) -> bool:
    """Return whether a forward in training mode may draw random numbers that recomputation must repeat."""
    jitters = any("jitter" in name for _, name, _ in _floats(model))
    return jitters or bool(dropout_settings(model))


def _floats(model: nn.Module) -> list[DropoutSetting]:
    return [
        DropoutSetting(owner, name, value)
        for owner in setting_owners(model)
        for name, value in vars(owner).items()
        if isinstance(value, float) and value
    ]


ProgressCallback: TypeAlias = Callable[[int, int], None]
"""Called with the finished amount and the total."""


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

    No code from the model's repository is run: see :mod:`qlora_tui.catalog.model_validation`. If an earlier
    load stored the 4-bit weights (:mod:`.quantized_cache`), these are read, and nothing is quantized again.

    Args:
        folder: from ``catalog.local_models.resolve_model``.
        on_progress: called with the number of loaded tensors and of all tensors.
        to_host: leave the model in host memory, with weights quantized on the device one by one.

    Raises:
        UserError: the model cannot be loaded.
    """
    quantization = _quantization_config(recipe.quantization, device, folder)
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
            config = load_config(folder / "config.json")
            is_quantized = bool(config.get("quantization_config")) and not is_mxfp4(config)
            if quantization is not None and not is_quantized:
                settings["quantization_config"] = quantization
            model, info = _load(folder, device, attention_path, on_progress, **settings)
            _require_weights(model, info, folder)
            if stored is not None:
                quantized_cache.store(model, stored)
    # peft writes this value into the adapter as its base model.
    model.config._name_or_path = model.name_or_path = str(folder)
    if device.kind == "cpu" and quantization is not None and not is_mapped:
        # Weights that are not quantized are views that would keep the whole mapped file in memory. A file of
        # stored weights contains only used weights.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    return freeze(model)


def load_mapped(folder: Path, device: ComputeDevice) -> Any:
    """Load the model in ``folder`` with weights that stay mapped from its files, in the dtype stored there.

    Mapped weights take only memory that the system can reclaim, except those that transformers joins from
    several tensors (experts of some mixtures). Raises UserError.
    """
    model, info = _load(folder, device, "segments", None, dtype="auto", device_map={"": "cpu"})
    _require_weights(model, info, folder)
    return model


@contextmanager
def quantized_on(device: torch.device) -> Iterator[None]:
    """Quantize weights on a GPU, one after another, while a base is loaded to host memory in this context.

    A CPU takes minutes for an 8B model and hours for a 70B. Each weight is copied to the GPU and its
    quantized form is copied back, with the same bits as in a base that is loaded to the GPU.
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
        # Otherwise the streamed layers' memory would be allocated from the blocks of the copied weights.
        release_gpu_memory()


def _expert_quantization(folder: Path, recipe: Recipe) -> AbstractContextManager[None]:
    """Return a context in which a mixture of experts is loaded with 4-bit experts, if the recipe says so."""
    if not quantized_cache.quantizes_experts(folder, recipe):
        require_4_bit_experts(recipe.quantization, architecture_of(load_config(folder / "config.json")))
        return nullcontext()
    from qlora_tui.training.experts.loading import experts_in_4_bits

    return experts_in_4_bits()


def _load_stored(
    stored: Path, device: ComputeDevice, attention_path: AttentionPath, on_progress: ProgressCallback | None
) -> Any | None:
    """Return the model with weights that were quantized earlier; None if they cannot be read."""
    model = None
    try:
        model, info = _load(stored, device, attention_path, on_progress)
        is_whole = not any(info.values())
    except Exception as error:  # libraries raise various exceptions for a damaged file
        if is_out_of_memory(error):
            raise
        is_whole = False
    if not is_whole:
        # The next load needs the memory of the tensors that were read.
        del model
        release_gpu_memory()
        with suppress(OSError):
            discard(stored)
        return None
    os.utime(stored)  # the least recently used folders are deleted first
    return model


def _load(
    folder: Path,
    device: ComputeDevice,
    attention_path: AttentionPath,
    on_progress: ProgressCallback | None,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return the model that transformers loads from the folder, and its report on the weights.

    Raises UserError.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # None lets transformers use SDPA, except in the few families that lack it (Gemma 2, gpt-oss). The
    # attention keys of the model's own config have been removed.
    attention = "eager" if attention_path == "eager" else None
    pin_publisher()
    loader = auto_class(read_config(load_config(folder / "config.json")))
    try:
        with model_view(folder) as view, loading_progress(on_progress):
            loaded: tuple[Any, dict[str, Any]] = loader.from_pretrained(
                str(view),
                output_loading_info=True,
                **{"dtype": device.dtype, "device_map": {"": device.torch_device}, **settings},
                attn_implementation=attention,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            return loaded
    except (OSError, ValueError, LookupError, ImportError, TypeError, AssertionError) as error:
        is_explained = isinstance(error, OSError | ValueError | ImportError | TypeError) and str(error)
        reason = first_line(error) if is_explained else "its files do not fit its config.json."
        raise UserError(
            "The model could not be loaded",
            what=f"{folder}: {reason}",
            fix="Run `qlora-tui doctor` to check the installation, or download the model again.",
        ) from error


def _require_weights(model: Any, info: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if the files lack weights, have them in another shape, or have too many layers.

    transformers would fill missing weights with random numbers, and leave out the layers that config.json
    does not have. Missing weights outside the language model are accepted, because they are not used.

    Args:
        info: transformers' report on the weights.
    """
    parts = (model.get_decoder(), model.get_output_embeddings())
    read = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    lacking = [name for name, p in model.named_parameters() if name in info["missing_keys"] and id(p) in read]
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        raise UserError(
            "The model's files lack weights",
            what=f"{folder} lacks {lacking[0]}{more}, which {type(model).__name__} needs.",
            why="transformers would fill the missing weights with random numbers.",
            fix="Download the model again, or choose another copy of it.",
        )
    in_files, expected_layers = _layers_in_files(model, info["unexpected_keys"])
    if in_files > expected_layers:
        raise UserError(
            "The model's files do not fit its config",
            what=f"{folder} has {in_files} layers in its files, but {expected_layers} in config.json.",
            why="The extra layers would be left out, and the model would answer differently without them.",
            fix="Download the model again, or compare config.json with the one published with the model.",
        )
    for name, stored, expected in sorted({*info["mismatched_keys"], *_quantized_mismatches(model)}):
        raise UserError(
            "The model's files do not fit its config",
            what=f"{folder}: {name} is {_shape(stored)} in the files, but {_shape(expected)} in config.json.",
            why="The files and config.json belong to different models, or a size in config.json was changed.",
            fix="Download the model again, or compare config.json with the one published with the model.",
        )


def _layers_in_files(model: Any, unused: Iterable[str]) -> tuple[int, int]:
    """Return (number of layers in the files, number of layers in the model).

    The first number is derived from ``unused``, so it is too small, or even negative, unless the files have
    layers that the model lacks. Layers that only predict later tokens (``num_nextn_predict_layers``) are not
    counted.

    Args:
        unused: names of the weights in the files that the model lacks.
    """
    layers = decoder_layers(model)
    if not layers:
        return 0, 0
    name = next(name for name, module in model.named_modules() if module is layers[0])
    prefix = name.rpartition(".")[0] + "."
    numbers = (key.removeprefix(prefix).partition(".")[0] for key in unused if key.startswith(prefix))
    in_files = max((int(number) + 1 for number in numbers if number.isdigit()), default=0)
    later: int = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    return in_files - later, len(layers)


def _quantized_mismatches(model: nn.Module) -> Iterator[tuple[str, Iterable[int], Iterable[int]]]:
    """Yield name, shape and expected shape of quantized weights whose shapes do not match.

    If config.json declares a weight to be in 4 bits and it is not, it does not have the packed shape.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes"):
            weight: Any = module.weight
            state = getattr(weight, "quant_state", None)
            stored, expected = weight.shape, (module.out_features, module.in_features)
            if state is not None:
                stored = state.shape
            elif weight.is_floating_point():
                expected = (weight.numel() // 2, 1)
            if tuple(stored) != expected:
                yield f"{name}.weight", stored, expected


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


@contextmanager
def loading_progress(on_progress: ProgressCallback | None) -> Iterator[None]:
    """Report each tensor that transformers loads in this context, if its version supports this."""
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


def freeze(model: nn.Module) -> nn.Module:
    """Freeze every weight, with 4-bit weights in the layout that the backward needs."""
    model.requires_grad_(False)
    model.config.use_cache = False  # type: ignore[union-attr]  # a PreTrainedModel's
    leave_weights(model)
    for module in model.modules():
        # In eval mode on a CPU with AVX512-BF16, bitsandbytes repacks the weights of a layer for inference
        # and never restores them, so all later gradients would be wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # mypy takes it for a submodule
    return model


def checkpoint_activations(model: Any, *, preserve_rng_state: bool | None = None) -> bool:
    """Save one hidden state per layer and recompute the rest in the backward; see :func:`apply_kept_layers`.

    Args:
        preserve_rng_state: repeat the random numbers of the forward, which needs a real device and takes time
            in each layer. None repeats them only if the model or its adapter draws any. The adapter must be
            added before this call.

    Returns:
        False if the model's class does not support checkpointing; then all activations are kept.
    """
    if not model.supports_gradient_checkpointing:
        return False
    if preserve_rng_state is None:
        preserve_rng_state = draws_random_numbers(model)
    kwargs = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return True


def apply_kept_layers(model: Any, count: int) -> bool:
    """Exempt the last ``count`` decoder layers of a model from its gradient checkpointing.

    Returns:
        False if checkpointing is off, or if the model's layers cannot be switched individually; then nothing
            is changed.
    """
    layers = decoder_layers(model)
    if not model.is_gradient_checkpointing or not layers:
        return False
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < len(layers) - count
    return True


def _quantization_config(settings: Quantization, device: ComputeDevice, folder: Path) -> Any:
    """Return the quantization config for transformers; None loads the weights as they are stored.

    If no modules to skip are given, transformers skips the head and tied weights;
    ``LinearModule.quantizable`` of the catalog must agree. Raises UserError if a pattern of ``skip`` matches
    nothing.
    """
    from transformers import BitsAndBytesConfig

    if settings.method == "none":
        return None
    skipped = _skipped_modules(settings, folder)
    if settings.method in ("nf4", "fp4"):
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.method,
            bnb_4bit_use_double_quant=settings.double_quantization,
            bnb_4bit_compute_dtype=device.dtype,
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=True, llm_int8_skip_modules=skipped
    )


def _skipped_modules(settings: Quantization, folder: Path) -> list[str] | None:
    """Return the names of all modules that stay in 16 bits; None leaves the choice to transformers."""
    from transformers.quantizers.base import get_keys_to_not_convert

    config = load_config(folder / "config.json")
    modules = architecture_of(config).modules
    skipped = [module for module in modules if module.read_directly]
    if settings.skip:
        skipped += match_modules(settings.skip, modules, SKIP)
    if not skipped:
        return None
    # A list replaces the modules that transformers would skip by default.
    return [*get_keys_to_not_convert(build_on_meta(config)), *(module.name for module in skipped)]


_FALLBACKS: dict[AttentionPath, tuple[PackedAttention, ...]] = {
    "varlen": ("varlen", "segments"),
    "segments": ("segments",),
    "eager": (),
}
"""Kinds of packed attention to try for each path, in order; an empty tuple means padded sequences."""
_DESCRIPTIONS: dict[PackedAttention, str] = {
    "varlen": "flash, all samples in one call",
    "segments": "SDPA, one call per sample",
}
_NOT_WEIGHTED = "this data has token weights, which Liger does not support"


@dataclass(frozen=True)
class PreparedBase:
    """The frozen base model, with the loss and attention that it uses."""

    model: Any
    folder: Path
    attention: str
    """Description of the attention, for the run's events."""
    loss: Loss
    packed: PackedAttention | None
    """Attention that isolates the samples of a sequence; None if each sample is a padded sequence."""
    reference_attention: str
    """The implementation in transformers for a single sample: ``sdpa`` or ``eager``."""
    loss_reason: str = ""
    """Why a loss other than the expected one is used; empty if the expected one is used."""
    replaced: tuple[str, ...] = ()
    """Fast paths that are not used, because they differ from the library on this model."""
    router_loss_off: bool = False
    """Whether the model's load-balancing loss for its experts was turned off for training."""
    streamed: StreamedLayers | None = None
    """The layers that are kept in host memory; None if the whole model is on the device."""

    @property
    def padding_free(self) -> bool:
        """Whether a micro-batch is one sequence of isolated samples. Independent of ``data.packing``."""
        return self.packed is not None

    @property
    def loss_description(self) -> str:
        """Description of the loss for the run's events, with the reason if it is not the expected loss."""
        return ": ".join(filter(None, (self.loss, self.loss_reason)))


def prepare_base(
    folder: Path,
    recipe: Recipe,
    device: ComputeDevice,
    attention_path: AttentionPath,
    expected_loss: Loss,
    *,
    weighted: bool,
    on_progress: ProgressCallback | None = None,
) -> PreparedBase:
    """Load the base model with the expected loss if that is verified to be exact, else with another loss.

    Args:
        expected_loss: the loss that the memory estimate assumes.
        weighted: whether tokens of the data have loss weights.
        on_progress: called with the number of loaded tensors and of all tensors.

    Raises:
        UserError: the model cannot be loaded.
    """
    allow_kernels(recipe.model.kernels == "auto")
    verify_kernels(device.torch_device, device.dtype)
    count = recipe.quantization.streamed_layers
    model = load_base(folder, recipe, device, attention_path, on_progress, to_host=count > 0)
    streamed = place_streamed(model, count, device.torch_device) if count else None
    router_loss_off = _switch_off_router_loss(model)
    head = find_head(model)
    if not isinstance(head, str) and not head_matches_model(model, head, device.torch_device):
        head = "its computation between head and loss is not supported"
    reference_attention = model.config._attn_implementation
    loss, loss_reason = _use_loss(model, head, device, expected_loss, weighted)
    scale_each_sample(model)
    packed = _use_packed_attention(model, attention_path, device)
    if packed is None:
        # Padded sequences do not need our attention, while the check of the first step needs the library's.
        set_attention(model, reference_attention)
    return PreparedBase(
        model=model,
        folder=folder,
        attention=_DESCRIPTIONS[packed]
        if packed
        else f"{reference_attention.replace('sdpa', 'SDPA')}, padded sequences",
        loss=loss,
        loss_reason=loss_reason,
        packed=packed,
        reference_attention=reference_attention,
        router_loss_off=router_loss_off,
        streamed=streamed,
    )


def _switch_off_router_loss(model: Any) -> bool:
    """Exclude the loss that balances experts from the model's loss; return whether there was one.

    The balancing loss is a mean over tokens and a micro-batch's loss is a sum, in which it would be
    negligible.
    """
    config = model.config.get_text_config()
    was_on = bool(getattr(config, "output_router_logits", False))
    if was_on:
        config.output_router_logits = False
    return was_on


def _use_packed_attention(
    model: Any, attention_path: AttentionPath, device: ComputeDevice
) -> PackedAttention | None:
    """Use the first kind of packed attention that passes its check on this model; None if none does."""
    for kind in _FALLBACKS[attention_path]:
        if use_packed_attention(model, kind) and packing_is_isolated(model, device.torch_device):
            return kind
    return None


def _use_loss(
    model: Any, head: ChunkedHead | str, device: ComputeDevice, expected_loss: Loss, weighted: bool
) -> tuple[Loss, str]:
    """Install the loss in the model; return the loss, and why it is not the expected one."""
    kernel: LossSumFn | str | None = None
    if expected_loss == "liger" and not isinstance(head, str):
        kernel = _NOT_WEIGHTED if weighted else verified_liger_loss(head, device.torch_device)
    use_loss(model, head, None if isinstance(kernel, str) else kernel)
    if isinstance(head, str):
        return "stock", head
    return ("chunked", kernel) if isinstance(kernel, str) else (expected_loss, "")
