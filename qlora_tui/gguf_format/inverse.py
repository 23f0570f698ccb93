"""Converts the tensors of a GGUF file back to tensors of weight files, by inverting the forward conversion.

The forward conversion is declared once, as functions from transformers' values to llama.cpp's values
(:mod:`qlora_tui.gguf_format.conventions`). All of them only move elements, multiply and add constants, or
compute -exp. A function is therefore determined by its results for a few tensors: row and column numbers show
where each element comes from, and zeros, ones and twos show the arithmetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_tui.gguf_format.conventions import convention_of
from qlora_tui.gguf_format.tensors import SourceTensor, gguf_tensors

_LAYER = re.compile(r"\.\d+\.")
_OF_ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+\.weight)")
_MAX_PROBE = 1 << 26
"""Maximum number of elements of a tensor that is used to probe a function. :func:`origin_of`
raises ValueError for a function that needs a larger one.
"""


@dataclass(frozen=True)
class Origin:
    """The origin of the elements of a stored tensor, and the arithmetic applied to them."""

    index: Tensor | None
    """Flat index of each element in the original tensor, not counting the axis ``kept``; None if no element
    moves.
    """
    factor: Tensor | None
    """Factor by which the function multiplies each element before it adds ``shift``; None for 1."""
    shift: Tensor | None
    is_negative_exp: bool
    kept: int | None
    """Axis of the original tensor along which the function treats all slices alike; None if there is none."""
    kept_as: int | None

    @property
    def keeps_first(self) -> bool:
        """Whether all slices along the first dimension are treated alike, and stay in place."""
        return self.kept == 0 and self.kept_as == 0

    @property
    def is_same(self) -> bool:
        """Whether the stored tensor equals the original."""
        return self.index is None and self.factor is None and self.shift is None and not self.is_negative_exp

    def restore(self, stored: Tensor, original: Tensor) -> None:
        """Undo the function: write elements of ``stored`` to their places in ``original`` (float32)."""
        values = stored
        if self.kept is not None:
            assert self.kept_as is not None
            values = values.movedim(self.kept_as, -1)
            original = original.movedim(self.kept, -1)
        lead = values.shape[:-1] if self.kept is not None else values.shape
        if self.shift is not None:
            values = values - self.shift.reshape(*lead, *(1,) * (values.ndim - len(lead)))
        if self.factor is not None:
            values = values / self.factor.reshape(*lead, *(1,) * (values.ndim - len(lead)))
        if self.is_negative_exp:
            values = torch.log(-values)
        width = values.shape[-1] if self.kept is not None else 1
        flat = values.reshape(-1, width)
        lead_of_original = original.shape[:-1] if self.kept is not None else original.shape
        if self.index is None:
            original.copy_(flat.reshape(original.shape))
            return
        places = torch.unravel_index(self.index, lead_of_original)
        original[places] = flat if self.kept is not None else flat[:, 0]


def origin_of(
    forward: Callable[[Tensor], Tensor], shape: Sequence[int], stored_shape: Sequence[int]
) -> Origin:
    """Return the origin of a stored tensor, by probing ``forward`` on tensors of ``shape``.

    Raises ValueError if the function cannot be undone.
    """
    kept = kept_as = None
    probe = tuple(shape)
    if len(shape) > 1:
        # All experts are treated alike, and in most tensors all columns are.
        axis = 0 if len(shape) > 2 else len(shape) - 1
        cut = tuple(1 if i == axis else size for i, size in enumerate(shape))
        try:
            made = tuple(forward(torch.zeros(cut)).shape)
        except (RuntimeError, IndexError):
            made = ()
        changed = [i for i, (a, b) in enumerate(zip(made, stored_shape, strict=False)) if a != b]
        if len(made) == len(stored_shape) and len(changed) <= 1 and shape[axis] > 1:
            where = changed[0] if changed else None
            if where is not None and made[where] == 1 and stored_shape[where] == shape[axis]:
                kept, kept_as, probe = axis, where, cut
    if math.prod(probe) > _MAX_PROBE:
        raise ValueError(f"a tensor of {math.prod(probe):,} elements is too large to be reordered")
    zeros, ones, twos = (forward(torch.full(probe, float(n))).float() for n in range(3))
    steps = ones - zeros
    is_negative_exp = bool(
        torch.allclose(zeros, -torch.ones(())) and torch.allclose(ones, -torch.tensor(math.e))
    )
    if not is_negative_exp and (not torch.allclose(twos - ones, steps) or bool((steps == 0).any())):
        raise ValueError("a tensor is stored in a way that cannot be undone")
    index = torch.zeros(zeros.shape, dtype=torch.int64)
    for axis, size in enumerate(probe):
        ramp = torch.arange(size, dtype=torch.float32) / max(1, size if is_negative_exp else 1)
        view = [1] * len(probe)
        view[axis] = size
        made_of = forward(ramp.reshape(view).expand(probe).contiguous()).float()
        places = torch.log(-made_of) * size if is_negative_exp else (made_of - zeros) / steps
        index = index * size + places.round().to(torch.int64)
    flat = index.flatten()
    if len(torch.unique(flat)) != len(flat):
        raise ValueError("two elements of a tensor come from the same one")
    same = stored_is_original(flat, math.prod(probe))
    return Origin(
        index=None if same else flat,
        factor=None if is_negative_exp or bool((steps == 1).all()) else steps,
        shift=None if is_negative_exp or not bool(zeros.any()) else zeros,
        is_negative_exp=is_negative_exp,
        kept=kept,
        kept_as=kept_as,
    )


def stored_is_original(index: Tensor, count: int) -> bool:
    """Return whether ``index`` is 0, 1, …, ``count`` - 1, so that no element moves."""
    return len(index) == count and bool((index == torch.arange(count)).all())


@dataclass(frozen=True)
class Source:
    """A tensor of the model (or one projection of all experts), and how a file stores it."""

    names: tuple[str, ...]
    """Name in weight files, or one name for each expert."""
    shape: tuple[int, ...]
    """Shape of the tensor, with experts as the first dimension."""
    stored: tuple[SourceTensor, ...]
    """Names and shapes in the file. ``read`` is not used."""
    origins: tuple[Origin, ...]
    """Origin of each tensor in ``stored``."""


def sources_of(shapes: Mapping[str, tuple[int, ...]], architecture: str, config: Any) -> list[Source]:
    """Return how a file stores each tensor of a model.

    Args:
        shapes: Shape of each tensor, by its name in weight files.
        architecture: ``general.architecture`` of the file.
        config: transformers' config of the text model.

    Raises:
        ValueError: The config belongs to another architecture, or its conversion cannot be undone.
        UserError: The architecture lacks a tensor.
    """
    config = copy(config)
    # Values that differ between layers are read per layer. Other code wants the value of most layers.
    config.allow_global_per_layer_attribute_access = True
    convention = convention_of(config)
    if convention.architecture != architecture:
        raise ValueError(
            f"a {config.model_type} is stored as {convention.architecture}, not as {architecture}"
        )
    if convention.scalars:
        raise ValueError(f"its {', '.join(convention.scalars.values())} cannot be read")
    groups: dict[str, list[str]] = {}
    for name in shapes:
        expert = _OF_ONE_EXPERT.fullmatch(name)
        groups.setdefault(f"{expert[1]}.{expert[2]}" if expert else name, []).append(name)
    now: dict[str, Tensor] = {}
    read: list[str] = []

    def reading(group: str) -> Callable[[], Tensor]:
        def values() -> Tensor:
            read.append(group)
            return now.get(group, torch.empty(sizes[group], device="meta"))

        return values

    sizes = {
        group: (len(names), *shapes[names[0]]) if names != [group] else shapes[group]
        for group, names in groups.items()
    }
    stored: dict[str, list[SourceTensor]] = {group: [] for group in groups}
    given = [SourceTensor(group, sizes[group], reading(group)) for group in groups]
    for tensor in gguf_tensors(given, convention, config):
        read.clear()
        tensor.read()
        stored[read[0]].append(tensor)
    known: dict[tuple[str, str], Origin] = {}
    sources = []
    for group, names in groups.items():
        if not stored[group]:
            continue  # a tied head
        origins = []
        for tensor in stored[group]:

            def forward(values: Tensor, tensor: SourceTensor = tensor, group: str = group) -> Tensor:
                now[group] = values
                return tensor.read()

            kind = (_LAYER.sub(".", group), f"{_LAYER.sub('.', tensor.name)} {sizes[group]}")
            if kind not in known:
                known[kind] = origin_of(forward, sizes[group], tensor.shape)
            now.clear()
            origins.append(known[kind])
        if sum(math.prod(tensor.shape) for tensor in stored[group]) != math.prod(sizes[group]):
            raise ValueError(f"a file of {architecture} does not hold all of {group}")
        sources.append(Source(tuple(names), sizes[group], tuple(stored[group]), tuple(origins)))
    return sources
