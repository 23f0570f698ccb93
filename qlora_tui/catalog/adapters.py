"""Checks a LoRA adapter's config before peft or torch reads it, and whether the adapter fits a recipe.

peft does not check most values: a rank of twenty million is allocated, and module names are regular
expressions, some of which take years. So types and bounds are checked here, patterns must not contain
repetition operators, and the modules that an adapter changes are read from its weights. An adapter can be
trained further if it has the modules, ranks and scales that the recipe would give a new adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from qlora_tui.catalog.architecture_types import Architecture, LinearModule, inner_name
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import adapter_without_code, read_header
from qlora_tui.decoding import Count
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_number, pluralize
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import alpha_of, rank_of, resolve_targets

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""An adapter's files, under their names in peft."""
MAX_PATTERNS = 20_000
"""Maximum number of patterns. Large MoE models need one pattern per projection of each expert."""
_Rank = Annotated[int, Meta(ge=1, le=1024)]
_Alpha = Annotated[float, Meta(ge=0, le=1e6)]
_Names = list[str] | None
_PLAIN_PATTERN = re.compile(r"\^?(?:\\?[\w.\-]|\[[\w\-]+\])*\$?")
"""Matches patterns without repetition: characters, escaped characters and character sets."""
_LORA_KEY = re.compile(r"base_model\.model\.(.+?)\.lora_\w+(?:\.\w+)*")


class _Schema(Struct):
    """The keys of an adapter's config that reach peft; ``adapter_without_code`` drops all others."""

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
    """Load the config of the adapter in ``folder``. Raises UserError if the config cannot be used."""
    file = folder / CONFIG
    values = load_config(file)
    adapter_without_code(values, str(file))  # refuses settings that change the base
    try:
        config = msgspec.convert(values, _Schema)
    except (msgspec.ValidationError, OverflowError) as error:
        raise _problem(file, f"{error}") from None
    if config.layer_replication:
        raise _problem(file, "layer_replication is set, which is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key) or {}
        if len(patterns) > MAX_PATTERNS:
            raise _problem(file, f"{key} has {len(patterns):,} entries")
        for pattern in patterns:
            if not _is_plain(pattern):
                raise _problem(file, f"{key} has the key {pattern[:80]!r}, which is not a plain module name")
    return values


def with_exact_targets(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config with patterns replaced by the modules that the weights in ``folder`` change.

    The config is returned unchanged if it has ``target_parameters``, or if the weights have no LoRA factors.
    Raises UserError if the weights cannot be read, or if a pattern that is kept is not a plain name.
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
                raise _problem(
                    folder / CONFIG, f"{key} has {pattern[:80]!r}, which is not a plain module name"
                )
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
        why="The file is damaged, describes an unknown kind of adapter, or was crafted to exhaust CPU "
        "time or memory.",
        fix="Choose another adapter, or another checkpoint of the run.",
    )


_FACTOR_A = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
_EXPERTS = ("experts", "experts.base_layer")
"""Suffixes of the names of peft's wrappers around parameters. Such a wrapper is not a linear module."""
_ALPHA = 8
"""peft's default if a config sets no alpha."""


def require_fit(folder: Path, lora: Lora, architecture: Architecture) -> None:
    """Raise UserError if the adapter in ``folder`` differs from a new adapter with the settings ``lora``.

    Routed experts, token rows, embedding and head are compared when the adapter is loaded
    (:mod:`qlora_tui.training.adapter`).
    """
    differences = adapter_differences(folder, lora, architecture)
    if differences:
        raise misfit(folder, "; ".join(differences))


def misfit(folder: Path, what: str) -> UserError:
    """Return the error for an adapter that does not match the recipe. ``what`` states the differences."""
    return UserError(
        "The adapter does not match the recipe",
        what=f"{folder} cannot be trained further: {what}.",
        why="An adapter keeps its modules, ranks and scale while it is trained.",
        fix="Use the adapter's LoRA settings (see recipe.toml or adapter_config.json in its folder), or "
        "clear “Start from” (lora.init_from).",
    )


def adapter_differences(folder: Path, lora: Lora, architecture: Architecture) -> list[str]:
    """Return how the adapter differs from a new one, as clauses; empty if it does not differ.

    Of all ranks and alphas that differ, only one is listed. Raises UserError if the config cannot be used, or
    if the weights are not readable safetensors.
    """
    config = load_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        return [f"it is a {config.get('peft_type')} adapter, not LoRA"]
    ranks = _ranks_of(folder)
    wanted = {
        inner_name(m.name): m for m in resolve_targets(lora, architecture.targets) if m.part != "expert"
    }
    differences = [
        f"{label} is {'on' if value else 'off'} in the recipe and {'off' if value else 'on'} in the adapter"
        for key, label, value in (
            ("use_rslora", "rsLoRA", lora.use_rslora),
            ("use_dora", "DoRA", lora.use_dora),
            ("modules_to_save", "Train embeddings", lora.train_embeddings),
        )
        if bool(config.get(key)) != value
    ]
    if more := sorted(wanted.keys() - ranks.keys()):
        differences.append(
            f"the recipe adapts {pluralize(len(more), 'module')} that the adapter does not, such as {more[0]}"
        )
    if more := sorted(ranks.keys() - wanted.keys()):
        differences.append(
            f"the adapter has {pluralize(len(more), 'module')} that the recipe does not adapt, "
            f"such as {more[0]}"
        )
    alphas = _Alphas(config)
    for name in wanted.keys() & ranks.keys():
        ours = rank_of(lora, wanted[name]), alpha_of(lora, wanted[name])
        theirs = ranks[name], alphas.of(wanted[name].name)
        if ours != theirs:
            differences.append(
                f"{name} has rank {ours[0]} and alpha {format_number(ours[1])} in the recipe, "
                f"{theirs[0]} and {format_number(theirs[1])} in the adapter"
            )
            break
    return differences


class _Alphas:
    """The alpha of each module, from patterns in an adapter's config that match the ends of names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._patterns: dict[str, float] = config.get("alpha_pattern") or {}
        self._compiled: list[tuple[re.Pattern[str], float]] | None = None
        self._default: float = config.get("lora_alpha", _ALPHA)

    def of(self, name: str) -> float:
        # This program writes full, escaped names, so no pattern needs to be matched.
        if (exact := self._patterns.get(re.escape(name))) is not None:
            return exact
        if self._compiled is None:
            self._compiled = [
                (re.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in self._patterns.items()
            ]
        return next((alpha for pattern, alpha in self._compiled if pattern.match(name)), self._default)


def _ranks_of(folder: Path) -> dict[str, int]:
    """Return the rank of each adapted linear module, keyed by its inner name (:func:`inner_name`)."""
    try:
        entries = read_header(folder / WEIGHTS)[1]
        return {
            inner_name(match[1]): int(entry["shape"][0])
            for key, entry in entries.items()
            if (match := _FACTOR_A.fullmatch(key)) and not match[1].endswith(_EXPERTS)
        }
    except OSError as error:
        raise UserError(
            "No safetensors weights",
            what=f"{folder / WEIGHTS}: {error.strerror or error}.",
            why="An adapter is read from safetensors only: a pickle can run any code.",
            fix="Choose a run that has finished, or another adapter.",
        ) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            "The adapter is damaged",
            what=f"{folder / WEIGHTS}: {error}.",
            fix="Choose another adapter, or another checkpoint of the run.",
        ) from None


def trained_on(folder: Path) -> str:
    """Return the base model that the adapter names: a Hub ID or a folder; empty if it names none."""
    return str(load_adapter_config(folder).get("base_model_name_or_path") or "")


def adapter_parameters(modules: Iterable[LinearModule], lora: Lora) -> int:
    """Return the number of trained parameters of adapters for these modules: rank × (in + out) for each
    matrix and, with DoRA, a magnitude for each output.
    """
    return sum(
        rank_of(lora, module) * (module.in_features + module.out_features) * module.copies
        + (module.out_features if lora.use_dora else 0)
        for module in modules
    )
