"""Finds the transformers class for a config, and builds its model on torch's ``meta`` device.

Everything that loads or describes a base uses this module: the trainer, traces of a step, and the description
that the catalog caches. A causal language model is preferred. If a config of several parts (text and vision)
has none, its image-text-to-text class is selected, and the language model in it is trained.

Nothing here imports code of a repository: ``auto_map`` and other keys that select code are removed first.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from types import FrameType, NoneType
from typing import Any

import torch

from qlora_tui.catalog.config_fields import no_text_generator
from qlora_tui.catalog.described import library_version
from qlora_tui.catalog.model_validation import without_code
from qlora_tui.errors import UserError
from qlora_tui.formatting import join_words
from qlora_tui.installation import install_command

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""transformers' auto classes that load a model that generates text, in order of preference."""
_WEIGHT_KEYS = ("quantization_config", "torch_dtype", "dtype")
"""Keys that describe how weights are stored, which do not apply to a model without weights."""
_READS_IS_DECODER = re.compile(r"self\.is_decoder|if [^\n]*config\.is_decoder")
"""Matches source code of models whose tokens attend to later ones unless the config sets ``is_decoder``."""
_LONGEST_REASON, _LONGEST_VALUE = 240, 120
_VALIDATION = re.compile(
    r"Validation error for field '(?P<field>\w+)': \w+: Field '\w+' (?:"
    r"expected (?P<type>\w+), got \w+ \(value: (?P<value>.*)\)|"
    r"with value (?P<other>.*) doesn't match any type in \((?P<types>.*?)\)\. Errors)"
)
"""Pattern of a config class's error for a value of the wrong type."""
_TYPE = re.compile(r"<class '([a-zN]\w*)'>|\b(list|dict|tuple)\[")
"""Value types that a file can contain; other types in a message are of objects that a class creates."""
_VALIDATOR = re.compile(
    r"(?:Validation error for field (?P<field>'\w+')|Class validation error for validator '(?P<by>\w+)'): "
    r"\w+: (?P<cause>.+)"
)
"""Pattern of a config class's error for a value out of bounds, and for values that are inconsistent."""
_INSTALL = re.compile(r"pip install ([\w.-]+)")
"""Pattern of the packages in transformers' messages about a missing one."""


class MissingPackageError(UserError):
    """Raised if a class of transformers needs packages that are not installed."""

    def __init__(self, packages: tuple[str, ...], title: str, **texts: Any):
        super().__init__(title, **texts)
        self.packages = packages


def read_config(values: Mapping[str, Any]) -> Any:
    """Return transformers' config object for a parsed ``config.json``, without the keys that load code.

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
    except Exception as error:  # the class may raise anything for an unexpected value
        raise unbuildable(model_type, reason_of(error)) from error


def _with_floats(value: Any) -> Any:
    """Return a config value with each ``{"__float__": …}`` replaced by the float that it stands for.

    transformers writes infinities and NaN in this form.
    """
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    number = value.get("__float__")
    if len(value) == 1 and number in ("Infinity", "-Infinity", "NaN"):
        return float(number)
    return {key: _with_floats(each) for key, each in value.items()}


def auto_class(config: Any) -> Any:
    """Return the transformers class that loads a language model of this config.

    The class may load only the text part of the config, or the whole model. Raises UserError if no class of
    the installed transformers is a causal language model for this config.
    """
    import transformers

    unread = ""
    for name in AUTO_CLASSES:
        loader = getattr(transformers, name, None)
        if loader is None or type(config) not in loader._model_mapping:
            continue
        model_class = _model_class(loader, config)
        _check_causal(config, model_class)
        # A class for another config, such as that of the text part, may not find its weights in the files.
        if model_class.config_class is type(config) or _reads_own_files(config, loader):
            return loader
        unread = model_class.__name__
    if unread:
        reason = f"transformers loads it as {unread}, which does not read the weights of this type"
        raise unbuildable(config.model_type, reason)
    raise unbuildable(config.model_type, f"no class of transformers {library_version()} generates text")


def _model_class(loader: Any, config: Any) -> Any:
    built = loader._model_mapping[type(config)]
    return built[0] if isinstance(built, tuple | list) else built


def _check_causal(config: Any, model_class: Any) -> None:
    """Raise UserError if a class declares that it does not generate text."""
    from transformers import AutoModelForMaskedLM, GenerationMixin

    model_type, name = config.model_type, model_class.__name__
    if getattr(config, "is_encoder_decoder", False):
        raise no_text_generator(f"model_type {model_type!r}: it has an encoder next to its decoder")
    if not issubclass(model_class, GenerationMixin):
        raise no_text_generator(f"model_type {model_type!r}: {name} does not generate token by token")
    if "text" not in model_class.output_modalities:
        raise no_text_generator(
            f"model_type {model_type!r}: {name} generates {join_words(model_class.output_modalities)}"
        )
    arguments = list(inspect.signature(model_class.forward).parameters.values())[1:]
    needed = [each.name for each in arguments if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    if unmet := [argument for argument in needed if argument != "input_ids"]:
        raise UserError(
            "This model cannot run on text alone",
            what=f"model_type {model_type!r}: {name} needs {join_words(unmet)}.",
            why="Fine-tuning in qlora-tui gives the model text tokens and no other input.",
            fix="Choose a model that continues text, such as Qwen, Llama or Gemma.",
        )
    if getattr(config, "is_decoder", False):
        return
    if type(config) in AutoModelForMaskedLM._model_mapping or (
        hasattr(config, "is_decoder")
        and _READS_IS_DECODER.search(inspect.getsource(sys.modules[model_class.__module__]))
    ):
        reason = "without is_decoder in its config, its tokens attend to later ones"
        raise no_text_generator(f"model_type {model_type!r}: {reason}")


def _reads_own_files(config: Any, loader: Any) -> bool:
    """Return whether ``loader`` finds the embedding in weight files written by the whole config's class.

    transformers renames the tensors that it reads, depending on the class and the type of the config. A text
    model may be stored as one part of the files, under names that transformers has no rule for. True also if
    a model cannot be built, because that error is reported later.
    """
    import transformers
    from transformers import conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )

    loaders = [getattr(transformers, name, None) for name in AUTO_CLASSES]
    mapped = [each for each in loaders if each is not None and type(config) in each._model_mapping]
    writers = [each for each in mapped if _model_class(each, config).config_class is type(config)]
    try:
        with torch.device("meta"):
            model, whole = (
                each.from_config(deepcopy(config), dtype=torch.bfloat16)
                for each in (loader, (*writers, loader)[0])
            )
        embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    except Exception:  # errors in the config are reported when the model is built
        return True
    ending = ".".join(embedding.split(".")[-2:])
    written = {name: tensor for name, tensor in whole.state_dict().items() if name.endswith(ending)}
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    sizes = model.state_dict()
    return embedding in {
        rename_source_key(name, renamings, converters, model.base_model_prefix, sizes)[0]
        for name in revert_weight_conversion(whole, written)
    }


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
                model = loader.from_config(config, dtype=dtype, attn_implementation=attention)
            except ValueError:
                if attention == "eager":
                    raise
                # The class lacks SDPA. The failed attempt may have changed the config.
                model = loader.from_config(read_config(values), dtype=dtype, attn_implementation="eager")
    except Exception as error:  # the class may raise anything for an unexpected value
        raise _failed(config, error) from error
    leave_weights(model)
    return model


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers of a model in the order of the forward.

    Empty if the model has no list of layers that can be run and recomputed one by one.
    """
    layers = checkpointing_layers(model)
    return layers if len(layers) == model.config.get_text_config().num_hidden_layers else []


def checkpointing_layers(model: Any) -> list[Any]:
    """Return the parts of a model's decoder that gradient checkpointing recomputes, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]


def leave_weights(model: Any) -> None:
    """Prevent a model from writing into its own weights.

    RWKV scales some weights when it switches between training and evaluation, which breaks quantized weights
    and ignores adapters.
    """
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0


def unbuildable(model_type: str, reason: str) -> UserError:
    """Build the error for a config for which transformers builds no model that generates text."""
    return UserError(
        "This model cannot be built",
        what=f"model_type {model_type!r}: {reason}.",
        why="The installed version of transformers builds each model from its config.json.",
        fix="Compare the file with the one published with the model, or choose another model.",
    )


def _failed(config: Any, error: Exception) -> UserError:
    """Build the error for an exception that a class raised during construction."""
    packages = dict.fromkeys(_INSTALL.findall(str(error))) if isinstance(error, ImportError) else {}
    if isinstance(error, ModuleNotFoundError) and error.name and not packages:
        packages = {error.name.partition(".")[0]: None}
    if packages:
        return MissingPackageError(
            tuple(packages),
            "This model needs another package",
            what=f"model_type {config.model_type!r}: its class needs {' and '.join(packages)}.",
            why=f"{'They are' if len(packages) > 1 else 'It is'} not installed.",
            fix=f"Run `{install_command(*packages)}`, or choose another model.",
        )
    if isinstance(error, KeyError) and (name := _setting_with(config.to_dict(), error.args[:1])):
        reason = f"{name} is {error.args[0]!r}, which transformers does not know"
        return unbuildable(config.model_type, reason)
    return unbuildable(config.model_type, reason_of(error))


def _setting_with(values: Mapping[str, Any], wanted: tuple[Any, ...]) -> str:
    """Return the dotted name of the first setting whose value is the only item of ``wanted``, a string.

    Empty if there is none.
    """
    for name, value in values.items():
        if isinstance(value, str) and (value,) == wanted:
            return name
        if isinstance(value, Mapping) and (inner := _setting_with(value, wanted)):
            return f"{name}.{inner}"
    return ""


def reason_of(error: Exception) -> str:
    """Return why a library cannot use a config, on one line without a period.

    An accidental error, such as a division by zero deep in a class, tells the user little. For such errors,
    the config fields that the failing code reads are named with their values.
    """
    text = " ".join(str(error.args[0] if error.args else "").split())
    if validation := _VALIDATION.match(text):
        types = [plain or generic for plain, generic in _TYPE.findall(validation["types"] or "")]
        expected = join_words(types or [validation["type"]], "or").replace("NoneType", "null")
        value = validation["value"] or validation["other"]
        value = "null" if value == "None" else _cut(value)
        return f"{validation['field']} is {value}, expected {expected}"
    if len(text) > _LONGEST_REASON:  # up to the end of the sentence, which a list of all types may follow
        text = text[:_LONGEST_REASON].rpartition(". ")[0] or text[:_LONGEST_REASON]
    text = text.rstrip(".:!")
    if validation := _VALIDATOR.match(text):
        explains = isinstance(error.__cause__, Exception) and _is_on_purpose(error.__cause__)
        place = validation["field"] or ("" if explains else validation["by"])
        return ": ".join(filter(None, (place, validation["cause"])))
    if _is_on_purpose(error) and text:
        return text
    if isinstance(error, KeyError):
        if " " in text:
            return text
        text = f"there is no {text!r}"
    fields = _fields_read(error)
    read = f"with {join_words(fields)}" if fields else "with these values"
    return f"{read}, transformers fails ({text or type(error).__name__})"


def _is_on_purpose(error: Exception) -> bool:
    """Return whether a library raised an error deliberately to explain a value."""
    if not isinstance(error, ValueError):
        return isinstance(error, ImportError | NotImplementedError)
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    return isinstance(_statements(frame, line)[1], ast.Raise)


def _statements(frame: FrameType, line: int) -> tuple[ast.AST | None, ast.AST | None]:
    """Return the code of a frame and its innermost statement at a line; None without the source."""
    try:
        source, first = inspect.getsourcelines(frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(source)))
    except (OSError, SyntaxError):
        return None, None
    at = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line - first + 1 <= (node.end_lineno or node.lineno)
    ]
    return tree, max(at, key=lambda node: node.lineno, default=tree)


def _fields_read(error: Exception) -> list[str]:
    """Return the settings that the innermost failing statement reads from a config, as ``name = value``."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        tree, statement = _statements(frame, line)
        if tree is None or statement is None:
            continue
        # The statement may use values that earlier ones took from the config: settings of a group, or null.
        suspects = (dict, NoneType) if isinstance(error, TypeError | AttributeError) else dict
        earlier = {
            name: value
            for name, value in _fields_in(tree, frame.f_locals).items()
            if isinstance(value, suspects)
        }
        if fields := _fields_in(statement, frame.f_locals) or earlier:
            return [f"{name} = {_cut(json.dumps(value, default=str))}" for name, value in fields.items()]
    return []


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"


def _fields_in(code: ast.AST, local: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute):
            with suppress(Exception):  # a property of a half-built object
                fields |= _field(node, local)
    return fields


def _field(node: ast.Attribute, local: Mapping[str, Any]) -> dict[str, Any]:
    """Return {setting: value} for the setting that ``config.x`` or a module's ``self.x`` reads; empty if it
    reads none.
    """
    from transformers import PreTrainedConfig

    path, place = [], node.value
    while isinstance(place, ast.Attribute):
        path.append(place.attr)
        place = place.value
    owner = local.get(place.id) if isinstance(place, ast.Name) else None
    for name in reversed(path):
        owner = getattr(owner, name, None)
    config: Any = owner
    if isinstance(owner, torch.nn.Module):
        config = getattr(owner, "config", None) or local.get("config")
    name = config.attribute_map.get(node.attr, node.attr) if isinstance(config, PreTrainedConfig) else ""
    value = getattr(owner, node.attr)
    if name not in vars(config) or not isinstance(value, int | float | str | list | dict | None):
        return {}
    return {name: value}
