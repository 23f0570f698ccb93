"""Whether an adapter can be trained further: it has the modules and ranks that the recipe gives a new one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tui.catalog.adapter_config import WEIGHTS, load_adapter_config
from qlora_tui.catalog.architecture_types import Architecture, inner_name
from qlora_tui.catalog.safetensors_header import read_header
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.fields import format_exact
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import alpha_of, rank_of, resolve_targets

_FACTOR_A = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
_ALPHA = 8
"""peft's default, where a config names none."""


def require_fit(folder: Path, lora: Lora, architecture: Architecture) -> None:
    """Raise UserError where the adapter in ``folder`` differs from a new one of this recipe.

    Routed experts, token rows, embedding and head are compared when the adapter is loaded
    (:mod:`qlora_tui.training.adapter`).
    """
    differences = adapter_differences(folder, lora, architecture)
    if differences:
        raise misfit(folder, "; ".join(differences))


def misfit(folder: Path, what: str) -> UserError:
    """Return the error for an adapter that differs in ``what`` from a new one of the recipe."""
    return UserError(
        "The adapter does not match the recipe",
        what=f"{folder} cannot be trained further: {what}.",
        why="An adapter keeps its modules, ranks and scale while it is trained.",
        fix="Use the adapter's LoRA settings, which recipe.toml or adapter_config.json in its folder has, or "
        "clear Start from (lora.init_from).",
    )


def adapter_differences(folder: Path, lora: Lora, architecture: Architecture) -> list[str]:
    """Return how the adapter differs from a new one: one clause each; empty where it does not.

    Raises UserError where it is no LoRA adapter in safetensors, or cannot be read.
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
            f"the recipe adapts {pluralize(len(more), 'module')} that it does not, as {more[0]}"
        )
    if more := sorted(ranks.keys() - wanted.keys()):
        differences.append(
            f"it adapts {pluralize(len(more), 'module')} that the recipe does not, as {more[0]}"
        )
    alphas = _Alphas(config)
    for name in wanted.keys() & ranks.keys():
        ours = rank_of(lora, wanted[name]), alpha_of(lora, wanted[name])
        theirs = ranks[name], alphas.of(wanted[name].name)
        if ours != theirs:
            differences.append(
                f"{name} has rank {ours[0]} and alpha {format_exact(ours[1])} in the recipe, "
                f"{theirs[0]} and {format_exact(theirs[1])} in the adapter"
            )
            break
    return differences


class _Alphas:
    """The alpha of each module, by the patterns of an adapter's config, which peft matches from its end."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._patterns: dict[str, float] = config.get("alpha_pattern") or {}
        self._compiled: list[tuple[re.Pattern[str], float]] | None = None
        self._default: float = config.get("lora_alpha", _ALPHA)

    def of(self, name: str) -> float:
        # This program writes full names, escaped: no pattern needs to be tried.
        if (exact := self._patterns.get(re.escape(name))) is not None:
            return exact
        if self._compiled is None:
            self._compiled = [
                (re.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in self._patterns.items()
            ]
        return next((alpha for pattern, alpha in self._compiled if pattern.match(name)), self._default)


def _ranks_of(folder: Path) -> dict[str, int]:
    """Rank of each adapted linear module, by its name from ``layers.`` on."""
    try:
        entries = read_header(folder / WEIGHTS)[1]
        return {
            inner_name(match[1]): int(entry["shape"][0])
            for key, entry in entries.items()
            if (match := _FACTOR_A.fullmatch(key)) and not _is_expert(match[1])
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


def _is_expert(name: str) -> bool:
    """Whether peft's wrapper of parameters, not of a linear module, has this name."""
    return name.endswith(("experts", "experts.base_layer"))


def trained_on(folder: Path) -> str:
    """Return the base model that the adapter names: a Hub id or a folder; empty where it names none."""
    return str(load_adapter_config(folder).get("base_model_name_or_path") or "")
