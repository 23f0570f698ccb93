"""Maps the tensors of a base's weight files to the parameters of its model, and back.

transformers renames and converts tensors when it loads them: it stacks experts, splits or joins projections,
and drops or adds prefixes. An adapter changes the parameters of the model, but a merged model has the tensors
of its base. Both directions therefore use transformers' own code (``core_model_loading.py``), on the model
that the config describes, built without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tui.adapters.weight_files import stored_tensors
from qlora_tui.catalog.architecture_types import inner_name
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import CONFIG, weight_files
from qlora_tui.errors import UserError


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """Tensors that are converted together, and the parameters that result."""

    stored: tuple[str, ...]
    """Names of the tensors in the weight files."""
    parameters: Mapping[str, torch.Size]
    """Shape of each parameter, by its name in the model."""
    converter: Any = None
    """transformers' converter; None if the single tensor is the single parameter."""
    patterns: tuple[str, ...] = ()
    """The converter's pattern that each stored name matches."""

    @property
    def is_converted(self) -> bool:
        """Return whether the tensors are converted to the parameters, rather than only renamed."""
        return self.converter is not None


class StoredLayout:
    """The layout of one base's weight files."""

    def __init__(self, folder: Path) -> None:
        """Read the names and shapes of all tensors, and build the model without weights.

        Raises UserError if transformers cannot build the model.
        """
        from qlora_tui.training.model_class import build_on_meta

        self.shapes = {
            name: tensor.shape
            for file in weight_files(folder)
            for name, tensor in stored_tensors(folder / file).items()
        }
        self._folder = folder
        self.last_merged: tuple[TensorGroup, Any, dict[str, Tensor]] | None = None
        """The last merged group, the function that rounded its parameters, and its merged tensors."""
        self._model = build_on_meta(load_config(folder / CONFIG))
        self._sizes = {name: tensor.shape for name, tensor in self._model.state_dict().items()}

    @cached_property
    def groups(self) -> tuple[TensorGroup, ...]:
        """All groups of tensors that the model reads."""
        from transformers import conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        conversions = conversion_mapping.get_model_conversion_mapping(self._model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        plain: list[TensorGroup] = []
        joined: dict[str, list[tuple[str, str]]] = {}
        for stored in sorted(self.shapes, key=dot_natural_key):
            prefix = self._model.base_model_prefix
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._sizes)
            if name not in self._sizes and stored in self._sizes:
                name, pattern = stored, None
            if name not in self._sizes:
                continue
            if pattern is None:
                plain.append(TensorGroup((stored,), {name: self._sizes[name]}))
            else:
                joined.setdefault(name, []).append((stored, pattern))
        self._model._weight_conversions = [each for each in conversions if each.was_used()]
        return (*plain, *(self._joined(name, by_pattern, parts) for name, parts in joined.items()))

    def _joined(
        self, first: str, by_pattern: Mapping[str, Any], parts: Iterable[tuple[str, str]]
    ) -> TensorGroup:
        stored, patterns = zip(*parts, strict=True)
        group = TensorGroup(stored, {first: self._sizes[first]}, by_pattern[patterns[0]], patterns)
        empty = {name: torch.empty(self.shapes[name], device="meta") for name in stored}
        parameters = self.to_model(group, empty)
        if {name: tensor.shape for name, tensor in self.to_files(group, parameters).items()} != {
            name: torch.Size(self.shapes[name]) for name in stored
        }:
            raise UserError(
                "This base cannot be merged",
                what=f"{self._folder} stores {first} as several tensors ({stored[0]} and others). "
                "transformers can read this layout but cannot write it.",
                why="A merged model is saved in the layout of its base.",
                fix="Use the adapter with peft instead.",
            )
        return TensorGroup(stored, {n: t.shape for n, t in parameters.items()}, group.converter, patterns)

    @cached_property
    def by_parameter(self) -> dict[str, TensorGroup]:
        """The group of each parameter of the model."""
        return {name: group for group in self.groups for name in group.parameters}

    @cached_property
    def by_stored(self) -> dict[str, TensorGroup]:
        """The group of each stored tensor that the model reads."""
        return {name: group for group in self.groups for name in group.stored}

    def parameter_of(self, name: str) -> str | None:
        """Return the parameter that ``name`` refers to in an adapter; None if there is none.

        ``name`` is the name of a parameter, or of the module whose weight is meant. Names in a text model
        differ from those in the same model with a vision tower. If no parameter has the name, the part that
        begins at ``layers.`` is compared; it must match only one parameter.
        """
        for known in (name, f"{name}.weight"):
            if known in self.by_parameter:
                return known
            similar = self._by_inner_name.get(inner_name(known), ())
            if len(similar) == 1 and "layers." in known:
                return similar[0]
        return None

    @cached_property
    def _by_inner_name(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.by_parameter:
            names.setdefault(inner_name(name), []).append(name)
        return names

    @cached_property
    def shared(self) -> dict[str, str]:
        """For each parameter that shares its weight, the other parameter that uses this weight."""
        tied = self._model.get_expanded_tied_weights_keys(all_submodels=True)
        return {**tied, **{source: target for target, source in tied.items()}}

    def is_transposed(self, parameter: str) -> bool:
        """Return whether a parameter's matrices are (inputs, outputs), as in GPT-2 and in some experts.

        A 4-bit run stores these matrices as (outputs, inputs), so its adapter does not show this.
        """
        from transformers.pytorch_utils import Conv1D

        module = self._model.get_submodule(parameter.rpartition(".")[0])
        return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))

    def to_model(self, group: TensorGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that the tensors of a group are converted to."""
        if group.converter is None:
            return dict(zip(group.parameters, tensors.values(), strict=True))
        converter = deepcopy(group.converter)
        first = next(iter(group.parameters))
        for name, pattern in zip(group.stored, group.patterns, strict=True):
            converter.add_tensor(first, name, pattern, tensors[name])
        converted = converter.convert(first, model=self._model, config=self._model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in converted.items()}

    def to_files(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a group by their names in the files, converted from all its parameters."""
        from transformers.core_model_loading import revert_weight_conversion

        if group.converter is None:
            return dict(zip(group.stored, parameters.values(), strict=True))
        reverted = revert_weight_conversion(self._model, dict(parameters))
        # In the files of a model without its head, names lack the first part.
        return {
            next((s for s in group.stored if s == name or name.endswith(f".{s}")), name): tensor
            for name, tensor in reverted.items()
        }
