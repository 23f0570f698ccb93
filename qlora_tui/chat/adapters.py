"""Adapters on a base model: loaded on first use, switched between tokens, computed without peft's overhead.

peft's layers convert dtypes, apply dropout, scale and copy at every call. With one token per step, this costs
more than the adapter's arithmetic. Here a layer is three matrix products: the scale is folded into one
factor, and the update is added in place, which is possible for inference only.

On a CPU, the factors are in fp32. For thin products in half precision, torch calls a library that has three
times the overhead. This library also uses all cores, which wait for each other on a busy machine. With many
tokens at once, the overhead does not matter, and half precision saves the conversion of these tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.adapters.deltas import ROWS, WHOLE, check_unchanged, expert_parameter, is_whole_matrix
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS, load_adapter_config
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.chat.chat_types import BASE
from qlora_tui.errors import EXIT_USAGE, UserError, first_line
from qlora_tui.memory.budget import this_processor
from qlora_tui.training.adapter import exact_target_names
from qlora_tui.training.checks.rounding import within_rounding
from qlora_tui.training.clean_files import adapter_view
from qlora_tui.training.embeddings import TokenRows, row_wrappers, rows_of, with_rows
from qlora_tui.training.experts.lora import (
    active_in_peft,
    as_fused_parameters,
    fuse_experts,
    is_parameter_wrapper,
)
from qlora_tui.training.experts.routing import PROJECTIONS, routed_layer
from qlora_tui.training.fused.patching import temporary_forwards

_MANY_TOKENS = 64
_ONE_THREAD_TERMS = 1 << 20
"""Maximum number of multiplications for which one thread is faster than several; waking them takes 0.1 ms."""
_FP32 = 64 * torch.finfo(torch.float32).eps
"""Maximum relative error of an update that is computed in fp32."""
_ROUNDINGS = 1.0
"""Rounding steps by which a layer's output may differ from peft's output in float64."""


class ActiveAdapter:
    """Name of the active adapter. All layers share this object, so switching costs nothing."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name


class LoraForward:
    """Replacement of the ``forward`` of one peft layer. For inference only, because it adds in place."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def register(self, adapter_name: str, layer: Any) -> None:
        """Copy the factors of an adapter from peft."""
        down, up = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        if down.device.type == "cpu":
            down, up = down.float(), up.float()
        down, up = down.T.contiguous(), up.T.contiguous() * layer.scaling[adapter_name]
        self._factors[adapter_name] = (down, up)

    def forget(self, adapter_name: str) -> None:
        """Free the factors of an adapter, if this layer has any."""
        self._factors.pop(adapter_name, None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward_with(self._active.adapter_name, x)

    def forward_with(self, adapter_name: str, x: Tensor) -> Tensor:
        """Compute the layer's output with ``adapter_name``; without such an adapter, the base's output."""
        output: Tensor = self._base(x)
        factors = self._factors.get(adapter_name)
        if factors is not None:
            down, up = factors
            rows, inputs = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
            if len(rows) >= _MANY_TOKENS and _is_quick(x):
                down, up = down.to(x.dtype), up.to(x.dtype)
            with _few_threads(x, len(rows) * down.numel()):
                inner = inputs.to(down.dtype) @ down
                if rows.dtype == up.dtype:
                    rows.addmm_(inner, up)
                else:
                    rows.add_(inner @ up)
        return output


@contextmanager
def _few_threads(x: Tensor, terms: int) -> Iterator[None]:
    """Compute on one thread inside the block, if the product is small and has several rows.

    A product with a single row does not use several threads in the first place.
    """
    threads = torch.get_num_threads() if x.device.type == "cpu" and terms <= _ONE_THREAD_TERMS else 1
    if threads == 1 or x.numel() == x.shape[-1]:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_quick(x: Tensor) -> bool:
    """Return whether products in the dtype of ``x`` are as fast as products in fp32."""
    return x.device.type != "cpu" or (x.dtype == torch.bfloat16 and this_processor().native_bfloat16)


class TokenRowsForward:
    """Replacement of the ``forward`` of peft's module around an embedding or a head."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._rows: dict[str, TokenRows] = {}

    def register(self, adapter_name: str, wrapper: Any) -> None:
        """Copy the rows of an adapter from peft."""
        self._rows[adapter_name] = rows_of(wrapper, adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Free the token rows of an adapter, if this module has any."""
        self._rows.pop(adapter_name, None)

    def __call__(self, x: Tensor) -> Tensor:
        return with_rows(self._base, x, self._rows.get(self._active.adapter_name))


class WholeModuleForward:
    """Replacement of the ``forward`` of peft's wrapper around a module that adapters train in full."""

    def __init__(self, wrapper: Any, active: ActiveAdapter) -> None:
        self._base = wrapper.original_module
        self._copies = wrapper.modules_to_save
        self._active = active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._active.adapter_name
        if name not in self._copies:
            return self._base(*args, **kwargs)
        return self._copies[name](*args, **kwargs)


def fuse_whole_modules(model: nn.Module, active: ActiveAdapter) -> None:
    """Make modules that adapters train in full follow ``active`` instead of peft's own active adapter."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            vars(wrapper)["forward"] = WholeModuleForward(wrapper, active)


def fuse_token_rows(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> None:
    """Make the embedding and the head use the token rows of ``adapter_name``, if it has any."""
    for wrapper in row_wrappers(model):
        forward = vars(wrapper).get("forward")
        if forward is None:
            forward = wrapper.forward = TokenRowsForward(wrapper.original_module, active)
            wrapper.adapter_state_dict_load_map = partial(_names_of_rows, wrapper)
        if adapter_name in wrapper.token_adapter.trainable_tokens_delta:
            forward.register(adapter_name, wrapper)


def _names_of_rows(wrapper: Any, adapter_name: str) -> dict[str, str]:
    """Return the names of an adapter's trained token embeddings (peft's ``trainable_tokens``), as a map.

    The keys are the names in the adapter's file, and the values are the names in the model. For an adapter
    without trained token embeddings in this module, the map is empty, whereas peft's own method returns a
    name that does not exist.
    """
    if adapter_name not in wrapper.token_adapter.trainable_tokens_delta:
        return {}
    return type(wrapper).adapter_state_dict_load_map(wrapper, adapter_name)  # type: ignore[no-any-return]  # peft's


def fuse_adapter(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> bool:
    """Add ``adapter_name`` to ``model`` with fused forward methods.

    Return False if the adapter is not plain LoRA, or if a fused method does not agree with peft's.
    """
    layers = [layer for layer in _layers(model) if _has(layer, adapter_name)]
    if not all(_is_plain(layer, adapter_name) for layer in layers):
        return False
    for layer in layers:
        forward = vars(layer).get("forward")
        if forward is None:
            forward = LoraForward(layer.get_base_layer(), active)
        forward.register(adapter_name, layer)
        if not matches_peft(layer, adapter_name, forward):
            return False
        layer.forward = forward
    return True


@torch.inference_mode()
def matches_peft(layer: Any, adapter_name: str, forward: LoraForward) -> bool:
    """Return whether ``forward`` adds the same update as peft's own forward, element by element.

    The base is replaced by fixed values. The reference is peft's forward in float64, so the allowed
    difference is the rounding of ``forward``: the rounding of its result and, with 16-bit factors, of the
    terms of the update.
    """
    down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    x, output = _example_tokens(down, up)
    factors = down.data, up.data
    active, own = layer.active_adapters, vars(layer).pop("forward", None)
    try:
        layer.set_adapter(adapter_name, inference_mode=True)
        down.data, up.data = down.data.double(), up.data.double()
        with temporary_forwards({layer.get_base_layer(): lambda given: output[: len(given)].double()}):
            expected = layer(x.double())
    finally:
        down.data, up.data = factors
        layer.set_adapter(active, inference_mode=True)
        if own is not None:
            layer.forward = own
    inner = x.double().square() @ down.double().square().t()
    update = (inner @ up.double().square().t()).sqrt() * abs(layer.scaling[adapter_name])
    with temporary_forwards({layer.get_base_layer(): lambda given: output[: len(given)].clone()}):
        results = [forward.forward_with(adapter_name, x[:count]) for count in (1, len(x))]
    for result in results:
        wanted = expected[: len(result)]
        is_wide = x.dtype == torch.float32 or (x.device.type == "cpu" and len(result) == 1)
        share = _FP32 / torch.finfo(result.dtype).eps if is_wide else 2.0
        if not within_rounding(result, wanted, wanted.abs() + share * update[: len(result)], _ROUNDINGS):
            return False
    return True


def _example_tokens(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return example activations (64, in_features), some channels of which are very large, and base-layer
    outputs (64, out_features), half of whose channels are 0.
    """
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(_MANY_TOKENS, n, generator=generator) for n in (down.shape[1], up.shape[0]))
    x[:, :: max(x.shape[1] // 3, 1)] *= 100
    output[:, ::2] = 0
    return x.to(down.device, down.dtype), output.to(up.device, up.dtype)


def restore_peft(model: nn.Module) -> None:
    """Restore peft's own forward methods of LoRA layers."""
    for layer in _layers(model):
        vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    # Imported here because peft takes seconds to load and a base alone does not need it.
    from peft.tuners.lora import LoraLayer

    # Wrappers of experts have other forwards (training/experts/lora.py).
    return (
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and not is_parameter_wrapper(module)
    )


def _has(layer: Any, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _is_plain(layer: Any, adapter_name: str) -> bool:
    """Return whether the update is scale · B·A·x. False for DoRA and for embeddings."""
    return (
        adapter_name in layer.lora_A
        and type(layer.lora_A[adapter_name]) is nn.Linear
        and adapter_name not in layer.lora_variant
        and not layer.lora_bias.get(adapter_name, False)
        and not layer.merged
    )


_PEFT_RANK = 8
"""Rank that applies if the config names none."""
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class AdapterSet:
    """The adapters of a model, one of which is active."""

    def __init__(self, model: Any, folders: Mapping[str, str]) -> None:
        self._model = model
        self.folders = folders
        """Folder of each available adapter, by name."""
        self._peft_model: Any = None
        self._loaded: set[str] = set()
        self._active = ActiveAdapter(BASE)
        self._fused = True
        """Whether fused forward methods compute all loaded adapters, so that peft's own are not needed."""
        self._through_peft = False

    def ensure_loaded(self, adapter_name: str) -> bool:
        """Load ``adapter_name`` if it is not loaded yet; return whether this call loaded it. Raises
        UserError.
        """
        if adapter_name == BASE or adapter_name in self._loaded:
            return False
        folder = self.folders.get(adapter_name)
        if folder is None:
            raise UserError(
                "No such adapter",
                what=f"{adapter_name!r} is not available.",
                fix=f"Choose one of {', '.join((BASE, *self.folders))}.",
                exit_code=EXIT_USAGE,
            )
        self._load(adapter_name, Path(folder))
        self._loaded.add(adapter_name)
        fuse_token_rows(self._model, adapter_name, self._active)
        fuse_whole_modules(self._model, self._active)
        self._fused = self._fused and fuse_adapter(self._model, adapter_name, self._active)
        if not self._fused:
            restore_peft(self._model)
            # Loading an adapter activates it.
            self._active.adapter_name = adapter_name
        fuse_experts(self._model, self._expert_adapter)
        return True

    @property
    def no_longer_offered(self) -> set[str]:
        """Loaded adapters that requests can no longer name."""
        return self._loaded - self.folders.keys()

    def unload(self, adapter_name: str) -> None:
        """Free the memory of a loaded adapter. Call this only after another adapter was loaded."""
        self._peft_model.delete_adapter(adapter_name)
        for module in self._model.modules():
            if isinstance(forward := vars(module).get("forward"), LoraForward | TokenRowsForward):
                forward.forget(adapter_name)
        self._loaded.remove(adapter_name)

    def _expert_adapter(self, wrapper: Any) -> str | None:
        """Return the adapter that a layer's experts compute with; None for the base alone."""
        if self._fused and not self._through_peft:
            return None if self._active.adapter_name == BASE else self._active.adapter_name
        return active_in_peft(wrapper)

    def activate(self, adapter_name: str) -> None:
        """Switch to an adapter that ``ensure_loaded`` has loaded."""
        if adapter_name == self._active.adapter_name:
            return
        self._active.adapter_name = adapter_name
        if self._fused:
            return
        self._switch_peft_to(adapter_name)

    @contextmanager
    def through_peft(self, adapter_name: str) -> Iterator[None]:
        """Make ``adapter_name`` peft's active adapter inside the block.

        This has no effect on fused forward methods, which :func:`qlora_tui.chat.logits.library_code` removes.
        """
        if self._peft_model is None:
            yield
            return
        before = self._active.adapter_name
        try:
            self._through_peft = True
            self._switch_peft_to(adapter_name)
            yield
        finally:
            self._through_peft = False
            if not self._fused:
                self._switch_peft_to(before)

    def use_peft(self) -> None:
        """Let peft compute every adapter from now on, including adapters that are loaded later.

        The caller must remove the fused forward methods of adapters that are already loaded.
        """
        self._fused = False
        if self._peft_model is not None:
            self._switch_peft_to(self._active.adapter_name)

    def _switch_peft_to(self, adapter_name: str) -> None:
        tuner = self._peft_model.base_model
        if adapter_name == BASE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter_name, inference_mode=True)

    def _load(self, adapter_name: str, folder: Path) -> None:
        from peft import PeftModel

        _check(folder)
        if uses_dora(str(folder)) and any(
            getattr(layer, "support_avx512bf16_for_cpu", False) for layer in self._model.modules()
        ):
            raise UserError(
                "The model must be loaded again",
                what="A DoRA adapter needs base weights in the standard layout; the loaded weights are in a "
                "faster layout.",
                fix="Start the chat or the server again; the base is then loaded in the standard layout.",
            )
        check_unchanged(folder)
        _check_fits(folder, self._model)
        # Load in the model's compute dtype: conversions would cost time at every token.
        options = {"adapter_name": adapter_name, "is_trainable": False, "autocast_adapter_dtype": False}
        try:
            with (
                adapter_view(folder) as view,
                exact_target_names(self._model, load_config(view / CONFIG).get("target_modules") or ""),
                as_fused_parameters(self._model),
            ):
                if self._peft_model is None:
                    self._peft_model = PeftModel.from_pretrained(self._model, str(view), **options)
                else:
                    self._peft_model.load_adapter(str(view), torch_device=str(self._model.device), **options)
                    self._peft_model.base_model.enable_adapter_layers()
                    self._peft_model.base_model.set_adapter(adapter_name, inference_mode=True)
        except UserError:
            raise
        except Exception as error:  # peft and torch raise any exception for files that do not belong together
            raise _unfit(folder, first_line(error)) from error
        self._model.eval()
        for name, parameter in self._model.named_parameters():
            if ("lora_" in name or "trainable_tokens_" in name) and parameter.dtype != self._model.dtype:
                parameter.data = parameter.data.to(self._model.dtype)


def uses_dora(folder: str) -> bool:
    """Return whether the adapter is DoRA, which needs the base weights in their usual layout."""
    try:
        return bool(load_adapter_config(Path(folder)).get("use_dora"))
    except UserError:
        return False


def _check(folder: Path) -> None:
    kind = load_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise UserError(
            "Not a LoRA adapter",
            what=f"{folder} contains a {kind} adapter.",
            fix="Only LoRA adapters are supported.",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            "No safetensors weights",
            what=f"{folder} has no {WEIGHTS}.",
            why="Pickled weights are never loaded: a pickle can run any code.",
            fix="Choose an adapter saved as safetensors.",
        )


def _check_fits(folder: Path, model: Any) -> None:
    """Compare the shapes of an adapter with the model, before anything is changed.

    Without this comparison, an adapter that fails halfway through loading would stay in the model.
    """
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError, safe_open

    modules = dict(model.named_modules())
    config = load_adapter_config(folder)
    ranks = config.get("rank_pattern") or {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise _unfit(folder, f"{WEIGHTS} cannot be read: {first_line(error)}") from error
    for key, shape in shapes.items():
        if match := _FACTOR.fullmatch(key):
            name, side = match.groups()
            if (parameter := expert_parameter(name, config)) is not None:
                rank = ranks.get(get_pattern_key(list(ranks), parameter), config.get("r", _PEFT_RANK))
                _check_fits_experts(folder, modules, parameter, (side, rank), tuple(shape))
                continue
            rank = ranks.get(get_pattern_key(list(ranks), name), config.get("r", _PEFT_RANK))
            if shape[0 if side == "A" else 1] != rank:
                raise _unfit(folder, f"the weights of {name} do not have rank {rank}, unlike {CONFIG}.")
        elif match := ROWS.fullmatch(key):
            name, side = match[1], "rows"
        elif is_whole_matrix(key, config):
            name, side = WHOLE.sub(r"\1", key), "whole"
        else:
            continue
        # Modules that earlier adapters train are wrapped already.
        wrapped = (
            modules.get(f"{name}.{inner}") for inner in ("token_adapter.base_layer", "original_module")
        )
        module = next(filter(None, wrapped), modules.get(name))
        if module is None:
            raise _unfit(folder, f"the model has no {name}.")
        if side == "whole":
            if tuple(module.weight.shape) != tuple(shape):
                ours, theirs = tuple(module.weight.shape), tuple(shape)
                raise _unfit(folder, f"{name} is {ours} in the model and {theirs} in the adapter.")
            continue
        if side == "rows":
            width = module.weight.shape[1]
        else:
            width = getattr(module, "in_features" if side == "A" else "out_features", None)
        adapter_width = shape[0 if side == "B" else 1]
        if width is not None and width != adapter_width:
            raise _unfit(folder, f"{name} is {width} wide in the model and {adapter_width} in the adapter.")


def _check_fits_experts(
    folder: Path, modules: dict[str, Any], parameter: str, part: tuple[str, int], shape: tuple[int, ...]
) -> None:
    """Compare the shape of an adapter's stacked factors with the experts of the model.

    ``part`` names the side, A or B, and the rank.
    """
    path, _, projection_name = parameter.rpartition(".")
    module = modules.get(path)
    experts = module.get_base_layer() if module is not None and hasattr(module, "get_base_layer") else module
    if experts is None or not hasattr(experts, "num_experts"):
        raise _unfit(folder, f"the model has no {parameter}.")
    layer = routed_layer(experts)
    projection = layer.first if projection_name == PROJECTIONS[0] else layer.second
    side, rank = part
    stacked = rank * layer.experts
    expected = (stacked, projection.inputs) if side == "A" else (projection.outputs, stacked)
    if shape != expected:
        raise _unfit(
            folder, f"factors of {parameter} are {shape} in the adapter and {expected} for the model."
        )


def _unfit(folder: Path, what: str) -> UserError:
    return UserError(
        "The adapter does not fit",
        what=f"{folder}: {what}",
        why="The adapter was trained on another model, or its files are damaged.",
        fix="Choose the model that the adapter was trained on; its adapter_config.json names this model.",
    )
