"""Whether the model in a folder can be trained, and why not.

A folder has the form that transformers loads: ``config.json`` and safetensors. Used by ``local_models`` for
its list and lookup, and by ``hub`` for models not yet downloaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.code_keys import named_kernels
from qlora_tui.catalog.config_fields import ConfigFields
from qlora_tui.catalog.config_parser import (
    known_model_types,
    load_config,
    parse_architecture,
    unknown_family,
)
from qlora_tui.errors import UserError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
"""Most bytes of an index: some 280,000 tensors, a mixture of a trillion parameters."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a tokenizer and its chat template; a model has some of them."""
_TEMPLATES = "additional_chat_templates"
"""Folder of the templates other than the default one, such as ``tool_use.jinja``."""
TOOL_TEMPLATE = f"{_TEMPLATES}/tool_use.jinja"
"""Template for conversations with tools, as transformers saves it."""
_TEMPLATE_FILE = re.compile(rf"chat_template\.(?:jinja|json)|{_TEMPLATES}/\w[\w.-]*\.jinja")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Suffixes of the classes that generate text."""
MXFP4 = "mxfp4"
"""``quant_method`` of gpt-oss, whose experts are stored in 4-bit floats."""
_TRAINABLE_AS_STORED = {"bitsandbytes": None, MXFP4: "gpt_oss"}
"""``quant_method``: the only ``model_type`` of which it is read; None for any."""


class MissingFilesError(UserError):
    """Files of the model are missing that a download brings."""


def model_problem(title: str, what: str, why: str, fix: str) -> UserError:
    """Build the error for a model that cannot be used."""
    return UserError(title, what=what, why=why, fix=fix)


def check_folder(folder: Path, name: str) -> tuple[Architecture | None, UserError | None]:
    """Return the architecture of the model in ``folder``, and why it cannot be trained.

    Messages call the model ``name``. Either part may be None: a rejected model may have an architecture.
    """
    files = {entry.name for entry in folder.iterdir()}
    if CONFIG not in files:
        return None, _no_config(files, name)
    try:
        config = load_config(folder / CONFIG)
    except UserError as unreadable:
        return None, unreadable
    architecture, refusal = check_config(config, name)
    return architecture, refusal or weights_problem(folder, name)


def check_config(config: Mapping[str, Any], name: str) -> tuple[Architecture | None, UserError | None]:
    """Return the architecture a config describes, and why such a model cannot be trained here."""
    refusal = check_model_type(config, name)
    try:
        return parse_architecture(config), refusal
    except UserError as problem:
        return None, refusal or _with_model_name(problem, name)


def check_model_type(config: Mapping[str, Any], name: str) -> UserError | None:
    """Return why a model of this type cannot be trained here, whatever its size; None if it can."""
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        return ConfigFields(config, name).invalid("model_type", "a string")
    if model_type not in known_model_types():
        if config.get("auto_map"):
            return model_problem(
                "This model needs its own code",
                f"{name} (model_type {model_type!r}) loads only with trust_remote_code.",
                "That would run the author's Python on this machine, which qlora-tui never does.",
                "Choose a model of a family that is part of transformers.",
            )
        return _with_model_name(unknown_family("config.json", str(model_type)), name) if model_type else None
    if kernels := named_kernels(config):
        return model_problem(
            "This model chooses its own kernels",
            f"{name}: its config.json sets {kernels}.",
            "That would run compiled code of that repository on this machine; qlora-tui chooses the kernels.",
            "Remove the key from config.json, or choose another copy of the model.",
        )
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and not str(classes[0]).endswith(CAUSAL_LM_SUFFIXES):
        return model_problem(
            "This model does not generate text",
            f"{name} is a {classes[0]}.",
            "Fine-tuning here needs a causal language model, with its output head.",
            "Choose the model it was made from.",
        )
    method = _quant_method(config)
    if method is not None and not _is_trainable_as_stored(method, model_type):
        return model_problem(
            "This model is already quantized",
            f"{name} is stored as {method}.",
            "Weights that are quantized with another method cannot be loaded as NF4.",
            "Choose the 16-bit version of the model.",
        )
    return None


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a model's experts are stored in MXFP4."""
    return bool(_quant_method(config) == MXFP4)


def _quant_method(config: Mapping[str, Any]) -> Any:
    """How a config says that the weights are stored, of whatever type it is; None where it does not."""
    stored = config.get("quantization_config")
    return stored.get("quant_method") if isinstance(stored, dict) else None


def _is_trainable_as_stored(method: Any, model_type: Any) -> bool:
    return isinstance(method, str) and _TRAINABLE_AS_STORED.get(method, "none") in (None, model_type)


def _with_model_name(problem: UserError, name: str) -> UserError:
    return problem.replace(what=f"{name}: {problem.what}")


def _no_config(files: set[str], name: str) -> UserError:
    if "adapter_config.json" in files:
        return model_problem(
            "This is an adapter, not a model",
            f"{name} holds a LoRA adapter.",
            "Training needs a base model, not an adapter.",
            "Choose the base model that adapter_config.json names.",
        )
    return model_problem(
        "This model has no config.json",
        f"{name} has no config.json.",
        "It describes the model's layers and sizes.",
        "Copy the model's config.json into the folder of its weights, or download the model again.",
    )


def weights_problem(folder: Path, name: str) -> UserError | None:
    """Return what is wrong with the weights in ``folder``: pickled, missing or incomplete; else None."""
    try:
        weight_names = weight_files(folder)
    except UserError as problem:
        return problem
    if weight_names:
        missing = [file for file in weight_names if not (folder / file).is_file()]
        if not missing:
            return None
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        return MissingFilesError(
            "Incomplete download",
            what=f"{name} lacks {missing[0]}{more}.",
            why="Its index names weights that are missing.",
            fix="Download the model again; finished files are not downloaded again.",
        )
    return no_weights_problem((entry.name for entry in folder.iterdir()), name)


def no_weights_problem(files: Iterable[str], name: str) -> UserError:
    """Build the error for ``files`` without loadable weights."""
    if pickled := sorted(file for file in files if file.endswith(PICKLE_SUFFIXES)):
        return model_problem(
            "This model has only pickled weights",
            f"{name} has {pickled[0]} and no safetensors.",
            "Opening a pickle can run any code; qlora-tui reads safetensors only.",
            "Choose a copy of the model that is saved as safetensors.",
        )
    return MissingFilesError(
        "This model has no weights",
        what=f"{name} has neither {SINGLE} nor {INDEX}.",
        why="There is nothing to train.",
        fix="Download the model again.",
    )


def is_template_file(name: str) -> bool:
    """Return whether ``name``, relative to a model folder, is that of a chat template's file."""
    return _TEMPLATE_FILE.fullmatch(name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Return whether ``name``, relative to a model folder, is that of a tokenizer or template file."""
    return name in TOKENIZER_FILES or is_template_file(name)


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files of a folder's tokenizer and chat templates, relative to it."""
    templates = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{_TEMPLATES}/*"))
    return [
        name
        for name in (*TOKENIZER_FILES, *templates)
        if is_tokenizer_file(name) and (folder / name).is_file()
    ]


def copy_files(origin: Path, destination: Path, names: Iterable[str]) -> None:
    """Copy files by their names relative to a model folder. Raises ``OSError``."""
    for name in names:
        (destination / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, destination / name)


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the model's safetensors files, existing or not; empty where none are named.

    Raises UserError when the index cannot be read.
    """
    # A link into the cache without its blob is a missing file, not a model without weights.
    if (folder / SINGLE).is_file() or (folder / SINGLE).is_symlink():
        return (SINGLE,)
    if not (folder / INDEX).is_file():
        return ()
    return indexed_files(load_config(folder / INDEX, MAX_INDEX_BYTES), str(folder / INDEX))


def indexed_files(index: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the files that an index names.

    Raises UserError when it is not an index, or names a file outside the folder.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise _index_problem(where, "it has no weight_map")
    files = tuple(sorted(set(names.values())))
    if stray := [file for file in files if "/" in file or "\\" in file or not file.endswith(".safetensors")]:
        raise _index_problem(
            where, f"it names {stray[0]!r}, which is not a safetensors file in the same folder"
        )
    return files


def _index_problem(where: str, what: str) -> UserError:
    return model_problem(
        "Invalid weight index",
        f"{where}: {what}.",
        "The index maps each weight to its file.",
        "Download the model again.",
    )
