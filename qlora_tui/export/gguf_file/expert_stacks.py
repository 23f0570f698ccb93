"""Experts as llama.cpp stores them: one tensor for a projection of all experts of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from qlora_tui.adapters.merged_weights import MergedTensor

_OF_ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+\.weight)")


def stack_experts(tensors: Iterable[MergedTensor]) -> Iterator[MergedTensor]:
    """Yield all tensors, with the matrices of experts as one tensor (experts, rows, columns).

    ``mlp.experts.0.up_proj.weight`` to ``mlp.experts.127.up_proj.weight`` become
    ``mlp.experts.up_proj.weight``, in the place of the first.
    """
    stacks: dict[str, dict[int, MergedTensor]] = {}
    order: list[MergedTensor | str] = []
    for tensor in tensors:
        match = _OF_ONE_EXPERT.fullmatch(tensor.name)
        if match is None:
            order.append(tensor)
            continue
        name = f"{match['experts']}.{match['projection']}"
        if name not in stacks:
            stacks[name] = {}
            order.append(name)
        stacks[name][int(match["number"])] = tensor
    for each in order:
        if isinstance(each, MergedTensor):
            yield each
        else:
            members = [tensor for _, tensor in sorted(stacks[each].items())]
            yield MergedTensor(each, (len(members), *members[0].shape), partial(_stacked, members))


def _stacked(members: Sequence[MergedTensor]) -> Tensor:
    """The values of the members, (members, rows, columns)."""
    stack: Tensor | None = None
    for number, member in enumerate(members):
        values = member.read()
        if stack is None:
            stack = values.new_empty(len(members), *member.shape)
        stack[number] = values
    assert stack is not None
    return stack
