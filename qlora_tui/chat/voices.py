"""Adapters on a base model: read when first needed, switched between tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_tui.chat.lean import Speaking, active_token_rows, as_peft_does, lean
from qlora_tui.chat.terms import BASE
from qlora_tui.chat.updates import CONFIG, ROWS, WEIGHTS, check_unchanged
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.training.adapter import exact_target_names
from qlora_tui.training.clean_files import adapter_view

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class Voices:
    """Which adapter the model speaks with."""

    def __init__(self, model: Any, folders: Mapping[str, str]) -> None:
        self._model = model
        self._folders = folders
        self._with_adapters: Any = None
        self._loaded: set[str] = set()
        self._speaking = Speaking(BASE)
        self._lean = True
        """Whether every adapter read so far is plain LoRA, and none needs peft's own forward."""

    def need(self, voice: str) -> None:
        """See that ``voice`` can speak, reading its adapter if it has not been read. Raises UserError."""
        if voice == BASE or voice in self._loaded:
            return
        folder = self._folders.get(voice)
        if folder is None:
            raise UserError(
                "No such voice",
                what=f"There is no {voice!r} here, but {', '.join((BASE, *self._folders))}.",
                fix="Name one of these.",
                exit_code=EXIT_USAGE,
            )
        self._load(voice, Path(folder))
        self._loaded.add(voice)
        active_token_rows(self._model, voice, self._speaking)
        self._lean = self._lean and lean(self._model, voice, self._speaking)
        if not self._lean:
            as_peft_does(self._model)
            # Reading an adapter switches it on.
            self._speaking.voice = voice

    def speak_as(self, voice: str) -> None:
        """Switch to a voice that ``need`` has seen to."""
        if voice == self._speaking.voice:
            return
        self._speaking.voice = voice
        if self._lean:
            return
        self._switch_peft_to(voice)

    @contextmanager
    def through_peft(self, voice: str) -> Iterator[None]:
        """Let peft itself answer as ``voice``, where the layers compute by its code; then as before."""
        if self._with_adapters is None:
            yield
            return
        before = self._speaking.voice
        try:
            self._switch_peft_to(voice)
            yield
        finally:
            if not self._lean:
                self._switch_peft_to(before)

    def use_peft(self) -> None:
        """Let peft compute every adapter from here on."""
        self._lean = False
        if self._with_adapters is not None:
            self._switch_peft_to(self._speaking.voice)

    def _switch_peft_to(self, voice: str) -> None:
        tuner = self._with_adapters.base_model
        if voice == BASE:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(voice, inference_mode=True)

    def _load(self, voice: str, folder: Path) -> None:
        from peft import PeftModel

        _check(folder)
        check_unchanged(folder)
        _check_fits(folder, self._model)
        # At the precision the model computes in: the conversions would cost time at every token.
        kept = {"adapter_name": voice, "is_trainable": False, "autocast_adapter_dtype": False}
        try:
            with adapter_view(folder) as view, exact_target_names(self._model, _targets(folder)):
                if self._with_adapters is None:
                    self._with_adapters = PeftModel.from_pretrained(self._model, str(view), **kept)
                else:
                    self._with_adapters.load_adapter(str(view), torch_device=str(self._model.device), **kept)
                    self._with_adapters.base_model.enable_adapter_layers()
                    self._with_adapters.base_model.set_adapter(voice, inference_mode=True)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise _unfit(folder, _first_line(error)) from error
        self._model.eval()
        for name, parameter in self._model.named_parameters():
            if ("lora_" in name or "trainable_tokens_" in name) and parameter.dtype != self._model.dtype:
                parameter.data = parameter.data.to(self._model.dtype)


def uses_dora(folder: str) -> bool:
    """Whether this adapter computes with the base weights, which must then keep their usual layout."""
    try:
        return bool(json.loads((Path(folder) / CONFIG).read_bytes()).get("use_dora"))
    except (OSError, ValueError):
        return False


def _targets(folder: Path) -> list[str] | str:
    """Names of modules, or a pattern that some other program wrote."""
    found: list[str] | str = json.loads((folder / CONFIG).read_bytes()).get("target_modules") or ""
    return found


def _check(folder: Path) -> None:
    try:
        kind = json.loads((folder / CONFIG).read_bytes()).get("peft_type")
    except (OSError, ValueError) as error:
        raise UserError(
            "The adapter cannot be read",
            what=f"{folder / CONFIG}: {error}",
            fix="Choose another checkpoint of the run.",
        ) from error
    if kind != "LORA":
        raise UserError(
            "Not a LoRA adapter",
            what=f"{folder} holds a {kind} adapter.",
            fix="This program speaks with LoRA adapters only.",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            "No safetensors weights",
            what=f"{folder} has no {WEIGHTS}.",
            why="Pickled weights are never loaded: a pickle can run any code.",
            fix="Choose an adapter saved as safetensors.",
        )


def _check_fits(folder: Path, model: Any) -> None:
    """Compare shapes before anything is changed: an adapter that fails half-way would stay in the model."""
    from safetensors import SafetensorError, safe_open

    modules = dict(model.named_modules())
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise _unfit(folder, f"{WEIGHTS} cannot be read: {_first_line(error)}") from error
    for key, shape in shapes.items():
        if match := _FACTOR.fullmatch(key):
            name, side = match.groups()
        elif match := ROWS.fullmatch(key):
            name, side = match[1], "rows"
        else:
            continue
        # Rows of an adapter read before are around it.
        module = modules.get(f"{name}.token_adapter.base_layer") or modules.get(name)
        if module is None:
            raise _unfit(folder, f"the model has no {name}.")
        if side == "rows":
            width = module.weight.shape[1]
        else:
            width = getattr(module, "in_features" if side == "A" else "out_features", None)
        held = shape[0 if side == "B" else 1]
        if width is not None and width != held:
            raise _unfit(folder, f"{name} is {width} wide in the model and {held} in the adapter.")


def _unfit(folder: Path, what: str) -> UserError:
    return UserError(
        "The adapter does not fit",
        what=f"{folder}: {what}",
        why="It was trained on another model, or its files are damaged.",
        fix="Choose the model it was trained on; its adapter_config.json names it.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
