"""The tensors of a GGUF file, derived from those of weight files: names, shapes and values.

llama.cpp stores the experts of a layer as one tensor per projection, and likewise Gemma 3n's streams. Names
come from the tables of the ``gguf`` package; other differences are declared in ``conventions``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_tui.errors import UserError
from qlora_tui.gguf_format.conventions import Convention
from qlora_tui.gguf_format.rewrites import EVERYWHERE, Change, Rewrite

_IN_TEXT_MODEL = re.compile(r"(.*\.)?(language_model|text_model)\.")
"""Prefix of names in the text part of a multimodal model."""
_OUTER_NAMES = ("backbone.", "transformer.", "model.")
_NOT_READ = re.compile(r"(.*\.)?(rotary_emb|mtp)\.|(model\.)?(visual|vision_\w+|audio_\w+)\.")
"""Names of tensors that are not read: computed tables of rotary embeddings, layers that predict later tokens,
and encoders of images and audio.
"""
_OF_ONE = re.compile(r"(?P<holder>.+\.(experts|altup_\w+))\.(?P<number>\d+)\.(?P<matrix>(\w+\.)?weight)")
"""A matrix that belongs to one of several experts or streams."""
_HEAD = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a weight file or of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns the values of the tensor, of shape ``shape``."""


def gguf_tensors(tensors: Iterable[SourceTensor], convention: Convention, config: Any) -> list[SourceTensor]:
    """Return the tensors of the GGUF file. Raises UserError for a tensor that the architecture lacks."""
    names = _Names(convention.architecture, config)
    every = list(tensors)
    of_text = [tensor for tensor in every if _IN_TEXT_MODEL.match(tensor.name)]
    heads = [tensor for tensor in every if tensor.name.endswith(_HEAD) and tensor not in of_text]
    text = (
        replace(tensor, name=name)
        for tensor in ([*of_text, *heads] if of_text else every)
        if (name := text_name(tensor.name, config)) is not None
    )
    rules = (*convention.rewrites, *EVERYWHERE)
    scalars = tuple(convention.scalars)
    stored = []
    for tensor in stack_experts(text):
        if scalars and tensor.name.endswith(scalars):
            continue
        parts = [tensor]
        for rule in rules:
            parts = [each for part in parts for each in _rewritten(part, rule, config)]
        stored += [SourceTensor(names.of(part.name), part.shape, part.read) for part in parts]
    return stored


def _rewritten(tensor: SourceTensor, rule: Rewrite, config: Any) -> list[SourceTensor]:
    """Return the tensors that a rule produces from a tensor; the tensor itself if the rule does not apply."""
    names = rule.names(tensor.name)
    if names is None:
        return [tensor]
    return [
        _changed(tensor, name, change, config) for name, (_, change) in zip(names, rule.into, strict=True)
    ]


def _changed(tensor: SourceTensor, name: str, change: Change, config: Any) -> SourceTensor:
    shape = tuple(change(torch.empty(tensor.shape, device="meta"), config).shape)
    return SourceTensor(name, shape, lambda: change(tensor.read(), config))


def text_name(tensor: str, config: Any) -> str | None:
    """Return a tensor's name as in a text model; None if GGUF files omit the tensor.

    GGUF files omit a tied head, which llama.cpp takes from the embedding, layers that predict later tokens,
    and tensors whose names match ``_NOT_READ``.
    """
    if _NOT_READ.match(tensor) or (tensor.endswith(_HEAD) and config.tie_word_embeddings):
        return None
    inner = _IN_TEXT_MODEL.sub("", tensor)
    if inner.endswith((_HEAD, "lm_head.bias")):
        return inner[inner.index("lm_head") :]
    outer = next((prefix for prefix in _OUTER_NAMES if inner.startswith(prefix)), "")
    name = f"model.{inner.removeprefix(outer)}"
    layer = _LAYER.match(name)
    return None if layer and int(layer[1]) >= config.num_hidden_layers else name


class _Names:
    """Names of an architecture's tensors in the ``gguf`` package."""

    def __init__(self, architecture: str, config: Any) -> None:
        import gguf

        self._architecture = architecture
        by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(by_name[architecture], config.num_hidden_layers)

    def of(self, tensor: str) -> str:
        """Return the GGUF name of a tensor. Raises UserError if it is unknown."""
        if tensor.startswith("blk."):  # already a GGUF name, given by a rule
            return tensor
        for known in _spellings(tensor):
            if (name := self._map.get_name(known, try_suffixes=(".weight", ".bias", ".scale"))) is not None:
                return str(name)
        raise UserError(
            "This model cannot be exported as GGUF",
            what=f"The model has a tensor {tensor}, which llama.cpp's {self._architecture} lacks.",
            fix="Export the model with `qlora-tui export merge`, and report the problem.",
        )


def _spellings(tensor: str) -> Iterator[str]:
    """Yield possible spellings of a tensor's name in the tables of the ``gguf`` package.

    The tables have another spelling if the parameter has no module of its own, or if they name the model's
    layers differently.
    """
    names = [tensor]
    if tensor.endswith("_bias"):
        module = tensor.removesuffix("_bias")
        names = [f"{module}.bias", f"{tensor}.bias", f"{module}_proj.bias"]
    elif not tensor.endswith((".weight", ".bias", ".scale", ".A_log", ".D")):
        names = [f"{tensor}.weight"]
    for name in names:
        for layers in ("model.", "backbone.", "model.language_model.", "transformer.", ""):
            yield name.replace("model.", layers, 1)


def stack_experts(tensors: Iterable[SourceTensor]) -> Iterator[SourceTensor]:
    """Yield all tensors, with the matrices of experts stacked to one tensor (experts, rows, columns).

    ``mlp.experts.0.up_proj.weight`` to ``mlp.experts.127.up_proj.weight`` become
    ``mlp.experts.up_proj.weight``, in the place of the first one.
    """
    stacks: dict[str, dict[int, SourceTensor]] = {}
    order: list[SourceTensor | str] = []
    for tensor in tensors:
        match = _OF_ONE.fullmatch(tensor.name)
        if match is None:
            order.append(tensor)
            continue
        name = f"{match['holder']}.{match['matrix']}"
        if name not in stacks:
            stacks[name] = {}
            order.append(name)
        stacks[name][int(match["number"])] = tensor
    for each in order:
        if isinstance(each, SourceTensor):
            yield each
        else:
            members = [tensor for _, tensor in sorted(stacks[each].items())]
            yield SourceTensor(each, (len(members), *members[0].shape), partial(_stacked, members))


def _stacked(members: Sequence[SourceTensor]) -> Tensor:
    """Return the stacked values of the members, (members, rows, columns)."""
    stack: Tensor | None = None
    for number, member in enumerate(members):
        values = member.read()
        if stack is None:
            stack = values.new_empty(len(members), *member.shape)
        stack[number] = values
    assert stack is not None
    return stack
