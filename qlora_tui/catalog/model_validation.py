"""Checks whether the model in a folder can be trained: its files, and configs that select code.

Config keys that would select code are rejected, or removed before a library reads them, because
``trust_remote_code=False`` does not cover all of them. transformers loads a kernel from the Hub when
``attn_implementation`` names a repository (CVE-2026-4372 in versions before 5.3), peft imports the module
that ``megatron_core`` names, and both read further files that a config names. The headers of safetensors
files are read without torch (format: https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_fields import ConfigFields, stored_as
from qlora_tui.catalog.config_parser import load_config, parse_architecture, type_problem
from qlora_tui.catalog.library_types import config_classes, text_generators
from qlora_tui.errors import UserError
from qlora_tui.files import open_foreign

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
"""Maximum size of an index in bytes: about 280,000 tensors, as in a MoE model with a trillion parameters."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a tokenizer and its chat template, of which a model has some."""
TOKENIZER = "tokenizer.json"
"""File that a tokenizer must have. Older formats of tokenizers, such as ``tokenizer.model``, are not read."""
_OLD_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model")
UNUSABLE_TOKENIZER = "unusable-tokenizer"
"""Error code for a model folder without a tokenizer that can be loaded."""
_TEMPLATES = "additional_chat_templates"
"""Folder of chat templates other than the default one, such as ``tool_use.jinja``."""
TOOL_TEMPLATE = f"{_TEMPLATES}/tool_use.jinja"
"""Template for conversations with tools, as transformers saves it."""
_TEMPLATE_FILE = re.compile(rf"chat_template\.(?:jinja|json)|{_TEMPLATES}/\w[\w.-]*\.jinja")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CAUSAL_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Suffixes of the classes that generate text."""
MXFP4 = "mxfp4"
"""``quant_method`` of gpt-oss, whose experts are stored in 4-bit floats."""
_TRAINABLE_AS_STORED = {"bitsandbytes": None, MXFP4: "gpt_oss"}
"""The only ``model_type`` that is supported with a ``quant_method``; None for any."""


class MissingFilesError(UserError):
    """Raised if the model lacks files that a download would provide."""


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
    """Return the architecture that a config describes, and why such a model cannot be trained here."""
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
    if model_type and (unknown := type_problem(ConfigFields(config, "config.json"))) is not None:
        if config.get("auto_map") and model_type not in config_classes():
            return UserError(
                "This model needs its own code",
                what=f"{name} (model_type {model_type!r}) loads only with trust_remote_code.",
                why="This option runs the author's Python code on this machine, which qlora-tui never does.",
                fix="Choose a model whose type is part of transformers.",
            )
        return _with_model_name(unknown, name)
    if kernels := named_kernels(config):
        return UserError(
            "This model chooses its own kernels",
            what=f"{name}: its config.json sets {kernels}.",
            why="This setting runs compiled code on this machine, from the repository that the setting "
            "names. qlora-tui chooses the kernels itself.",
            fix="Remove the key from config.json, or choose another copy of the model.",
        )
    classes = config.get("architectures")
    if (
        isinstance(classes, list)
        and classes
        and not str(classes[0]).endswith(CAUSAL_LM_SUFFIXES)
        and str(classes[0]) not in text_generators().get(str(model_type), ())
    ):
        return UserError(
            "This model does not generate text",
            what=f"{name} is a {classes[0]}.",
            why="Fine-tuning here needs a causal language model, with its output head.",
            fix="Choose the model it was made from.",
        )
    method = stored_as(config)
    if method is not None and not _is_trainable_as_stored(method, model_type):
        return _already_quantized(f"{name} is stored as {method}.")
    return None


def _already_quantized(what: str) -> UserError:
    return UserError(
        "This model is already quantized",
        what=what,
        why="Weights that are quantized with another method cannot be loaded as NF4.",
        fix="Choose the 16-bit version of the model.",
    )


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a model's experts are stored in MXFP4."""
    return bool(stored_as(config) == MXFP4)


def _is_trainable_as_stored(method: Any, model_type: Any) -> bool:
    return isinstance(method, str) and _TRAINABLE_AS_STORED.get(method, "none") in (None, model_type)


def _with_model_name(problem: UserError, name: str) -> UserError:
    return problem.replace(what=f"{name}: {problem.what}")


def _no_config(files: set[str], name: str) -> UserError:
    if "adapter_config.json" in files:
        return UserError(
            "This is an adapter, not a model",
            what=f"{name} contains a LoRA adapter.",
            why="Training needs a base model, not an adapter.",
            fix="Choose the base model that adapter_config.json names.",
        )
    return UserError(
        "No config.json",
        what=f"{name} has no config.json.",
        why="This file describes the model's layers and sizes.",
        fix="Copy the model's config.json into the folder of its weights, or download the model again.",
    )


def weights_problem(folder: Path, name: str) -> UserError | None:
    """Return the problem with the weights in ``folder``: pickled, missing or incomplete; otherwise None."""
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
            why="The index of its weights names files that are missing.",
            fix="Start the download again; finished files are skipped.",
        )
    return no_weights_problem((entry.name for entry in folder.iterdir()), name)


def tokenizer_problem(folder: Path, name: str) -> UserError | None:
    """Return the error for a model folder without ``tokenizer.json``; None if the folder has it."""
    if (folder / TOKENIZER).is_file():
        return None
    if old := next((file for file in _OLD_TOKENIZERS if (folder / file).is_file()), ""):
        return UserError(
            "No tokenizer",
            what=f"{name} has no {TOKENIZER}.",
            why=f"The model's tokenizer is available only in an older format ({old}).",
            fix="Load it with transformers' AutoTokenizer, then call save_pretrained to save it in the "
            "model's folder.",
            code=UNUSABLE_TOKENIZER,
        )
    return MissingFilesError(
        "No tokenizer",
        what=f"{name} has no {TOKENIZER}.",
        why="Without a tokenizer, text cannot be turned into tokens.",
        fix="Download the model again, with its tokenizer files.",
        code=UNUSABLE_TOKENIZER,
    )


def no_weights_problem(files: Iterable[str], name: str) -> UserError:
    """Build the error for ``files`` without loadable weights."""
    if pickled := sorted(file for file in files if file.endswith(PICKLE_SUFFIXES)):
        return UserError(
            "Only pickled weights",
            what=f"{name} has only pickled weights ({pickled[0]}), no safetensors.",
            why="Opening a pickle can run any code; qlora-tui reads safetensors only.",
            fix="Choose a copy of the model that is saved as safetensors.",
        )
    return MissingFilesError(
        "No weights",
        what=f"{name} has neither {SINGLE} nor {INDEX}.",
        why="There is nothing to train.",
        fix="Download the model again.",
    )


def is_template_file(name: str) -> bool:
    """Return whether ``name``, relative to a model folder, names a file with a chat template."""
    return _TEMPLATE_FILE.fullmatch(name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Return whether ``name``, relative to a model folder, names a file of the tokenizer or its template."""
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
    """Copy files, given by their names relative to a model folder. Raises ``OSError``."""
    for name in names:
        (destination / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, destination / name)


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the model's safetensors files, existing or not; empty if none are named.

    Raises UserError if the index cannot be read.
    """
    # A link into the cache without its blob is a missing file; the model still has weights.
    if (folder / SINGLE).is_file() or (folder / SINGLE).is_symlink():
        return (SINGLE,)
    if not (folder / INDEX).is_file():
        return ()
    return indexed_files(load_config(folder / INDEX, MAX_INDEX_BYTES), str(folder / INDEX))


def indexed_files(index: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the files that an index names.

    Raises UserError if the file is not an index, or names a file outside the folder.
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
    return UserError(
        "Invalid weight index",
        what=f"{where}: {what}.",
        why="The index maps each weight to its file.",
        fix="Download the model again.",
    )


MAX_HEADER_BYTES = 16 << 20
"""Maximum size of a header in bytes: about 130,000 tensors.

The library allows 100 MB, which take gigabytes once parsed.
"""


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the start of the data, and each tensor's dtype, shape, and ``data_offsets`` from that start.

    Raises OSError if the file cannot be read, and ValueError if its header is damaged or too large.
    """
    with open_foreign(file) as content:
        size = int.from_bytes(content.read(8), "little")
        if 8 + size > file.stat().st_size:
            raise ValueError("it is not as long as its header says")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        try:
            entries = json.loads(content.read(size))
        except (ValueError, RecursionError):
            raise ValueError("its header is not JSON") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("its header is not a JSON object of tensors")
    return 8 + size, entries


def tensor_entries(file: Path) -> dict[str, dict[str, Any]]:
    """Return each tensor's entry in the header of a file whose length matches its header.

    Raises OSError if the file cannot be read, and ValueError, with the reason, if it is damaged.
    """
    size_bytes = file.stat().st_size
    start, entries = read_header(file)
    entries.pop("__metadata__", None)
    try:
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (KeyError, TypeError, IndexError):
        raise ValueError("its header does not say where its tensors are") from None
    if end != size_bytes:
        raise ValueError("it is not as long as its header says")
    return entries


_MATRIX_DIMENSIONS = (2, 3)
"""Numbers of dimensions that weights have; masks in some files have four (GPT-Neo)."""
_NARROW_DTYPES = ("I8", "U8", "F8", "F6_", "F4")


def quantized_refusal(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> UserError | None:
    """Return why the weights cannot be loaded if they are quantized but the config does not mention this;
    otherwise None.

    A library would mistake matrices of 8-bit integers for unquantized weights, and ignore their scales.
    """
    for entry in entries.values():
        shape, dtype = entry.get("shape"), str(entry.get("dtype"))
        is_matrix = isinstance(shape, list) and len(shape) in _MATRIX_DIMENSIONS
        if is_matrix and dtype.startswith(_NARROW_DTYPES):
            return _already_quantized(f"{file} has matrices in {dtype}, which config.json does not mention.")
    return None


IMPLEMENTATIONS = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for prefix in ("", "_")
    for part in ("attn", "experts")
    for suffix in ("", "_internal", "_autoset")
)
"""Keys that select the attention and expert implementations, which this program chooses."""
_MODEL_KEYS = IMPLEMENTATIONS | {
    # Python files of a repository.
    "auto_map", "custom_generate", "custom_pipelines", "trust_remote_code", "code_revision",
    # Kernels on the Hub.
    "kernel_config", "use_kernels", "use_hub_kernels", "allow_all_kernels",
    # Other files and repositories.
    "configuration_files", "transformers_weights", "adapter_kwargs", "peft_config", "base_model_name_or_path",
    "_name_or_path", "name_or_path", "_adapter_model_path", "_commit_hash", "use_pretrained_backbone",
    # Settings of torch's compiler.
    "compile_config",
}  # fmt: skip
_QUANTIZATION_KEYS = frozenset(
    (
        "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_has_fp16_weight",
        "llm_int8_enable_fp32_cpu_offload",
    )
)  # fmt: skip
"""Keys of a ``quantization_config`` that are kept. They describe how bitsandbytes stored the weights."""
_ADAPTER_KEYS = frozenset(
    (
        "peft_type", "task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "lora_bias",
        "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern",
        "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
        "use_qalora", "qalora_group_size", "alora_invocation_tokens", "use_bdlora", "peft_version",
    )
)  # fmt: skip
"""Keys that affect the values that an adapter computes."""
_REMOVED_KEYS = frozenset(
    (
        "megatron_core", "megatron_config", "corda_config", "lora_ga_config", "eva_config", "loftq_config",
        "runtime_config",
    )
)  # fmt: skip
"""Keys that an adapter does not need for its computation. They name modules to import, files with statistics,
and devices.
"""
_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping")
"""Keys about an adapter's origin, which every adapter has and which are not read here."""
_PEFT_DEFAULTS = {"megatron_core": "megatron.core"}
"""Values that peft writes into every adapter."""
_BASE_UNCHANGED = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initializations that change only the adapter's matrices, which are then overwritten by its saved weights.

All other initializations of peft (``olora``, ``pissa``, ``corda``, ``loftq`` …) change the weights of the
base.
"""


def without_code(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a model config or generation config without the keys that select code, and the removed keys.

    Nested configs are included; their keys are named like ``text_config.auto_map``.
    """
    return _without_code_keys(config, "")


def _without_code_keys(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    clean: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in config.items():
        if key in _MODEL_KEYS or (key == "quantization_config" and (place or not isinstance(value, dict))):
            if value is not None:
                dropped.append(f"{place}{key}")
        elif key == "quantization_config":
            clean[key] = {name: part for name, part in value.items() if name in _QUANTIZATION_KEYS}
            dropped += [f"{key}.{name}" for name in value if name not in _QUANTIZATION_KEYS]
        elif isinstance(value, dict):
            clean[key], inner = _without_code_keys(value, f"{place}{key}.")
            dropped += inner
        elif isinstance(value, list):
            clean[key], inner = _without_code_entries(value, f"{place}{key}.")
            dropped += inner
        else:
            clean[key] = value
    return clean, dropped


def _without_code_entries(values: list[Any], place: str) -> tuple[list[Any], list[str]]:
    clean: list[Any] = []
    dropped: list[str] = []
    for number, value in enumerate(values):
        inner: list[str] = []
        if isinstance(value, dict):
            value, inner = _without_code_keys(value, f"{place}{number}.")
        elif isinstance(value, list):
            value, inner = _without_code_entries(value, f"{place}{number}.")
        clean.append(value)
        dropped += inner
    return clean, dropped


def named_kernels(config: Mapping[str, Any]) -> str | None:
    """Return ``key = 'owner/name'`` of the first key at any depth that names a kernel, or None."""
    for key, value in config.items():
        if key in IMPLEMENTATIONS:
            for name in value.values() if isinstance(value, dict) else (value,):
                if isinstance(name, str) and "/" in name:
                    return f"{key} = {name!r}"
        elif isinstance(value, dict) and (named := named_kernels(value)):
            return named
    return None


def adapter_without_code(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return a LoRA adapter's config with only the keys that affect its values, and the removed keys.

    Raises UserError if the adapter in ``where`` changes the base, or has an unknown setting.
    """
    if not_understood := _not_understood(config):
        raise UserError(
            "Cannot read the adapter",
            what=f"{where}: {not_understood}.",
            why="Such an adapter would silently change the base, or compute something other than what it "
            "was trained for.",
            fix="Convert it to a plain LoRA adapter with peft, or choose another.",
        )
    clean = {key: value for key, value in config.items() if key in _ADAPTER_KEYS}
    if config.get("init_lora_weights") is not None:
        clean["init_lora_weights"] = True
    dropped = [
        key
        for key, value in config.items()
        if key not in _ADAPTER_KEYS and value not in (None, {}, False, _PEFT_DEFAULTS.get(key))
    ]
    return clean, [key for key in dropped if key not in _ORIGIN]


def _not_understood(config: Mapping[str, Any]) -> str | None:
    """Describe the first setting of an adapter's config that changes the base model's weights, is not
    supported, or is unknown; None if there is none.
    """
    init_method = config.get("init_lora_weights")
    if not any(init_method is known or init_method == known for known in _BASE_UNCHANGED):
        return f"init_lora_weights is {str(init_method)[:40]!r}, which changes the weights of the base"
    if config.get("bias") not in (None, "none"):
        return f"bias is {str(config['bias'])[:40]!r}, which changes the biases of the base"
    for key in ("alora_invocation_tokens", "use_qalora", "use_bdlora"):
        if config.get(key):
            return f"{key} is set, which is not supported"
    known = _ADAPTER_KEYS | _REMOVED_KEYS | set(_ORIGIN)
    unknown = [key for key, value in config.items() if key not in known and value]
    return f"{unknown[0][:40]!r} is set, but qlora-tui does not know this setting" if unknown else None
