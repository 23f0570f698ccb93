"""Adapters on a base model: loaded on first use, switched between tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_tui.adapters.deltas import ROWS, WHOLE, check_unchanged, expert_parameter, is_whole_matrix
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS, load_adapter_config
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.chat.adapter_forwards import (
    ActiveAdapter,
    fuse_adapter,
    fuse_token_rows,
    fuse_whole_modules,
    restore_peft,
)
from qlora_tui.chat.chat_types import BASE
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.training.adapter import exact_target_names
from qlora_tui.training.clean_files import adapter_view
from qlora_tui.training.experts.lora import active_in_peft, as_fused_parameters, fuse_experts
from qlora_tui.training.experts.routing import PROJECTIONS, routed_layer

_PEFT_RANK = 8
"""Rank where the config names none."""
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class AdapterSet:
    """The adapters of a model, one of which is active."""

    def __init__(self, model: Any, folders: Mapping[str, str]) -> None:
        self._model = model
        self._folders = folders
        self._peft_model: Any = None
        self._loaded: set[str] = set()
        self._active = ActiveAdapter(BASE)
        self._fused = True
        """Whether every loaded adapter is plain LoRA, so that none needs peft's own forward."""
        self._through_peft = False

    def ensure_loaded(self, adapter_name: str) -> bool:
        """Load ``adapter_name`` unless it is loaded; return whether it was loaded now. Raises UserError."""
        if adapter_name == BASE or adapter_name in self._loaded:
            return False
        folder = self._folders.get(adapter_name)
        if folder is None:
            raise UserError(
                "No such adapter",
                what=f"{adapter_name!r} is not available. Choose one of {', '.join((BASE, *self._folders))}.",
                fix="Use one of these names.",
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

    def _expert_adapter(self, wrapper: Any) -> str | None:
        """Return the adapter of a layer's experts; None for the base's experts."""
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
        """Let peft compute ``adapter_name`` while the layers use its code; restore the state afterwards."""
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
        """Use peft's own forward for every adapter from now on."""
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
        check_unchanged(folder)
        _check_fits(folder, self._model)
        # In the model's compute dtype: conversions would cost time at every token.
        options = {"adapter_name": adapter_name, "is_trainable": False, "autocast_adapter_dtype": False}
        try:
            with (
                adapter_view(folder) as view,
                exact_target_names(self._model, _targets(view)),
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
        except Exception as error:  # peft and torch raise anything for files that do not belong together
            raise _unfit(folder, _first_line(error)) from error
        self._model.eval()
        for name, parameter in self._model.named_parameters():
            if ("lora_" in name or "trainable_tokens_" in name) and parameter.dtype != self._model.dtype:
                parameter.data = parameter.data.to(self._model.dtype)


def uses_dora(folder: str) -> bool:
    """Return whether the adapter computes with the base weights, which must then keep their usual layout."""
    try:
        return bool(load_adapter_config(Path(folder)).get("use_dora"))
    except UserError:
        return False


def _targets(folder: Path) -> list[str] | str:
    targets: list[str] | str = load_config(folder / CONFIG).get("target_modules") or ""
    return targets


def _check(folder: Path) -> None:
    kind = load_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise UserError(
            "Not a LoRA adapter",
            what=f"{folder} holds a {kind} adapter.",
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
    """Compare shapes before any change: an adapter that fails halfway would stay in the model."""
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError, safe_open

    modules = dict(model.named_modules())
    config = load_adapter_config(folder)
    ranks = config.get("rank_pattern") or {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise _unfit(folder, f"{WEIGHTS} cannot be read: {_first_line(error)}") from error
    for key, shape in shapes.items():
        if match := _FACTOR.fullmatch(key):
            name, side = match.groups()
            if (parameter := expert_parameter(name, config)) is not None:
                rank = ranks.get(get_pattern_key(list(ranks), parameter), config.get("r", _PEFT_RANK))
                _check_fits_experts(folder, modules, parameter, (side, rank), tuple(shape))
                continue
            rank = ranks.get(get_pattern_key(list(ranks), name), config.get("r", _PEFT_RANK))
            if shape[0 if side == "A" else 1] != rank:
                raise _unfit(folder, f"the weights of {name} are not of rank {rank}, which {CONFIG} says.")
        elif match := ROWS.fullmatch(key):
            name, side = match[1], "rows"
        elif is_whole_matrix(key, config):
            name, side = WHOLE.sub(r"\1", key), "whole"
        else:
            continue
        # What adapters loaded earlier train of it wraps it.
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
    """Compare the shape of stacked factors, of side A or B and of a rank, with the experts of the model."""
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
        why="It was trained on another model, or its files are damaged.",
        fix="Choose the model it was trained on; its adapter_config.json names it.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
