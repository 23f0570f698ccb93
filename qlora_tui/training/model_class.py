"""Which transformers class a config selects, and the model it builds on torch's ``meta`` device.

The one answer for everything that loads or describes a base: the trainer, traces of a step, and the
description that the catalog caches. A causal language model is preferred. A config of several parts (text and
vision) without one selects its image-text-to-text class, of which the language model is trained.

Nothing here imports code of a repository: ``auto_map`` and other keys that select code are removed first.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from qlora_tui.catalog.config_fields import no_text_generator
from qlora_tui.catalog.described import library_version
from qlora_tui.catalog.model_validation import without_code
from qlora_tui.errors import UserError
from qlora_tui.installation import install_command

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""transformers' classes that load a model that generates text, the preferred one first."""
_WEIGHT_KEYS = ("quantization_config", "torch_dtype", "dtype")
"""Keys on how weights are stored, which a model without weights does not have."""
_READS_IS_DECODER = re.compile(r"self\.is_decoder|if [^\n]*config\.is_decoder")
"""Code of a class that attends to later tokens too, unless its config says ``is_decoder``."""
_LONGEST_REASON = 240
_INSTALL = re.compile(r"pip install ([\w.-]+)")
"""The packages in transformers' messages on a missing one."""


class MissingPackageError(UserError):
    """A class of transformers needs packages that are not installed."""

    def __init__(self, packages: tuple[str, ...], title: str, **texts: Any):
        super().__init__(title, **texts)
        self.packages = packages


def read_config(values: Mapping[str, Any]) -> Any:
    """Return transformers' config object for a parsed ``config.json``, without the keys that select code.

    Raises UserError when the installed transformers does not know the type or rejects a value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    clean, _ = without_code(values)
    model_type = clean.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unbuildable(str(model_type), f"transformers {library_version()} does not know this model_type")
    try:
        return CONFIG_MAPPING[model_type].from_dict(
            {key: _with_floats(value) for key, value in clean.items() if key not in _WEIGHT_KEYS}
        )
    except Exception as error:  # whatever the class raises for a value that it does not expect
        raise unbuildable(model_type, reason_of(error)) from error


def _with_floats(value: Any) -> Any:
    """Return a value of a config with the infinities that transformers writes as ``{"__float__": …}``."""
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    number = value.get("__float__")
    if len(value) == 1 and number in ("Infinity", "-Infinity", "NaN"):
        return float(number)
    return {key: _with_floats(each) for key, each in value.items()}


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a language model of this config.

    It may load the text part of the config alone, or the whole model.

    Raises UserError when no class of the installed transformers continues text from this config.
    """
    import transformers

    for name in AUTO_CLASSES:
        loader = getattr(transformers, name, None)
        if loader is not None and type(config) in loader._model_mapping:
            _check_causal(config, loader)
            return loader
    raise unbuildable(config.model_type, f"no class of transformers {library_version()} generates text")


def _check_causal(config: Any, loader: Any) -> None:
    from transformers import AutoModelForMaskedLM

    if getattr(config, "is_encoder_decoder", False):
        raise no_text_generator(f"model_type {config.model_type!r}: it has an encoder next to its decoder")
    if getattr(config, "is_decoder", False):
        return
    built = loader._model_mapping[type(config)]
    module = sys.modules[(built[0] if isinstance(built, tuple | list) else built).__module__]
    if type(config) in AutoModelForMaskedLM._model_mapping or (
        hasattr(config, "is_decoder") and _READS_IS_DECODER.search(inspect.getsource(module))
    ):
        reason = "without is_decoder in its config, its tokens see those after them"
        raise no_text_generator(f"model_type {config.model_type!r}: {reason}")


def build_on_meta(
    values: Mapping[str, Any], *, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa"
) -> Any:
    """Return the model of a parsed ``config.json`` on ``meta``, so that its weights take no memory.

    Args:
        values: the whole config.
        dtype: dtype of the weights.
        attention: implementation of attention; classes without it get ``eager``.

    Raises:
        UserError: the installed transformers cannot build it.
    """
    config = read_config(values)
    loader = auto_class(config)
    try:
        with torch.device("meta"):
            try:
                return loader.from_config(config, dtype=dtype, attn_implementation=attention)
            except ValueError:
                if attention == "eager":
                    raise
                # The class lacks SDPA. The failed attempt may have changed the config.
                return loader.from_config(read_config(values), dtype=dtype, attn_implementation="eager")
    except Exception as error:  # whatever the class raises for a value that it does not expect
        raise _failed(config, error) from error


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers of a model in the order of the forward.

    Empty where it has no list of layers that can be run and recomputed one by one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    return layers if len(layers) == model.config.get_text_config().num_hidden_layers else []


def unbuildable(model_type: str, reason: str) -> UserError:
    """Build the error for a config of which transformers builds no model that generates text."""
    return UserError(
        "This model cannot be built",
        what=f"model_type {model_type!r}: {reason}.",
        why="A model is trained as the installed transformers builds it from its config.json.",
        fix="Compare the file with the one published with the model, or choose another model.",
    )


def _failed(config: Any, error: Exception) -> UserError:
    """Build the error for what a class raised while it was built."""
    packages = dict.fromkeys(_INSTALL.findall(str(error))) if isinstance(error, ImportError) else ()
    if packages:
        return MissingPackageError(
            tuple(packages),
            "This model needs another package",
            what=f"model_type {config.model_type!r}: its class needs {' and '.join(packages)}.",
            why="It is not installed.",
            fix=f"Install it with `{install_command(*packages)}`, or choose another model.",
        )
    return unbuildable(config.model_type, reason_of(error))


def reason_of(error: Exception) -> str:
    """Return what a library raised on one line, without a period: the cause often follows on later lines."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}".rstrip(".:")
