"""Keys of configs that would choose which code runs: rejected, or removed before a library reads them.

``trust_remote_code=False`` does not cover all of them. Transformers loads a kernel from the Hub when
``attn_implementation`` names a repository (CVE-2026-4372 in versions before 5.3), peft imports the module
that ``megatron_core`` names, and both read further files that a config names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tui.errors import UserError

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
    # What torch compiles.
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
"""Keys that describe how bitsandbytes stored weights; the catalog rejects other storage formats."""
_ADAPTER_KEYS = frozenset(
    (
        "peft_type", "task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "lora_bias",
        "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "rank_pattern",
        "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
        "use_qalora", "qalora_group_size", "alora_invocation_tokens", "use_bdlora", "peft_version",
    )
)  # fmt: skip
"""Keys that decide the values an adapter computes."""
_REMOVED_KEYS = frozenset(
    (
        "megatron_core", "megatron_config", "corda_config", "lora_ga_config", "eva_config", "loftq_config",
        "runtime_config",
    )
)  # fmt: skip
"""Modules to import, files of statistics and where to compute: an adapter is the same without them."""
_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping")
"""Keys on an adapter's origin, which every adapter has and nothing here reads."""
_PEFT_DEFAULTS = {"megatron_core": "megatron.core"}
"""Values that peft writes into every adapter."""
_BASE_UNCHANGED = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initializations that set the matrices of an adapter alone, which its own weights then replace. All others
of peft (``olora``, ``pissa``, ``corda``, ``loftq`` …) write into the weights of the base."""


def without_code(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a model's or generation config without the keys that choose code, and the removed keys.

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
    """Return ``key = 'owner/name'`` of the first key at any depth that names a kernel repository, or None."""
    for key, value in config.items():
        if key in IMPLEMENTATIONS:
            for name in value.values() if isinstance(value, dict) else (value,):
                if isinstance(name, str) and "/" in name:
                    return f"{key} = {name!r}"
        elif isinstance(value, dict) and (named := named_kernels(value)):
            return named
    return None


def adapter_without_code(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return a LoRA adapter's config with only the keys that decide its values, and the removed keys.

    Raises UserError where the adapter in ``where`` changes the base, or has a setting that is unknown here.
    """
    if not_understood := _not_understood(config):
        raise UserError(
            "Cannot read the adapter",
            what=f"{where}: {not_understood}.",
            why="The base would be changed, or the adapter compute something else, without a word.",
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
    """The first setting with which peft would change the base, or which is unknown here, in words."""
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
    return f"{unknown[0][:40]!r} is set, which is unknown here" if unknown else None
