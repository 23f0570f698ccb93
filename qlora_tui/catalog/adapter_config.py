"""A LoRA adapter's config, checked before peft or torch reads it.

peft does not check most values: a rank of twenty million is allocated, and module names are regular
expressions, some of which take years. So types and bounds are checked here, patterns may not repeat, and the
modules that an adapter changes are read from its weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from qlora_tui.catalog.code_keys import adapter_without_code
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.safetensors_header import read_header
from qlora_tui.decoding import Count
from qlora_tui.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""An adapter's files, under their names in peft."""
MAX_PATTERNS = 20_000
"""Most patterns: one for each expert's projection in large mixtures."""
_Rank = Annotated[int, Meta(ge=1, le=1024)]
_Alpha = Annotated[float, Meta(ge=0, le=1e6)]
_Names = list[str] | None
_PLAIN_PATTERN = re.compile(r"\^?(?:\\?[\w.\-]|\[[\w\-]+\])*\$?")
"""Patterns that are matched in one pass: characters, escaped ones and sets of them."""
_LORA_KEY = re.compile(r"base_model\.model\.(.+?)\.lora_\w+(?:\.\w+)*")


class _Schema(Struct):
    """The keys of an adapter's config that reach peft, by type; ``code_keys`` drops all others."""

    peft_type: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    inference_mode: bool | None = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Meta(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: _Names = None
    modules_to_save: _Names = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    qalora_group_size: Annotated[int, Meta(ge=1, le=65536)] | None = None
    ensure_weight_tying: bool | None = None
    init_lora_weights: bool | str | None = None
    layers_pattern: list[str] | str | None = None
    layers_to_transform: list[Count] | Count | None = None
    layer_replication: list[list[Count]] | None = None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None
    alora_invocation_tokens: list[Count] | None = None
    use_bdlora: Literal[False] | None = None


def load_adapter_config(folder: Path) -> dict[str, Any]:
    """Load the config of the adapter in ``folder``. Raises UserError where it cannot be used."""
    file = folder / CONFIG
    values = load_config(file)
    adapter_without_code(values, str(file))  # refuses what changes the base
    try:
        config = msgspec.convert(values, _Schema)
    except (msgspec.ValidationError, OverflowError) as error:
        raise _problem(file, f"{error}") from None
    if config.layer_replication:
        raise _problem(file, "layer_replication is set, and layers cannot be replicated here")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key) or {}
        if len(patterns) > MAX_PATTERNS:
            raise _problem(file, f"{key} has {len(patterns):,} entries")
        for pattern in patterns:
            if not _is_plain(pattern):
                raise _problem(file, f"{key} has the key {pattern[:80]!r}, which is no plain name")
    return values


def with_exact_targets(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config with patterns replaced by the modules that the weights in ``folder`` change.

    Raises UserError where neither weights nor config name them exactly.
    """
    try:
        names = sorted(
            {match[1] for key in read_header(folder / WEIGHTS)[1] if (match := _LORA_KEY.fullmatch(key))}
        )
    except (OSError, ValueError) as error:
        raise _problem(folder / WEIGHTS, getattr(error, "strerror", None) or str(error)) from None
    patterns = {key: config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")}
    if names and not config.get("target_parameters"):
        narrowing = (*patterns, "layers_to_transform")
        return {**{k: v for k, v in config.items() if k not in narrowing}, "target_modules": names}
    for key, value in patterns.items():
        for pattern in [value] if isinstance(value, str) else value or ():
            if not _is_plain(pattern):
                raise _problem(folder / CONFIG, f"{key} has {pattern[:80]!r}, which is no plain name")
    return config


def _is_plain(pattern: str) -> bool:
    if not _PLAIN_PATTERN.fullmatch(pattern):
        return False
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _problem(file: Path, what: str) -> UserError:
    return UserError(
        "The adapter's config cannot be used",
        what=f"{file}: {what}.",
        why="It is damaged, of a kind that this program does not know, or made to take time or memory.",
        fix="Choose another adapter, or another checkpoint of the run.",
    )
