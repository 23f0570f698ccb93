"""Checks that packed attention agrees with the library's attention in each layer of the loaded model.

The model is run once on a short sample. Its sliding windows are first made shorter than the sample. Each
layer's queries, keys and values go through the library's attention for that layer, with the mask that the
library makes for it, and through :mod:`qlora_tui.training.packed_attention`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.training import packed_attention
from qlora_tui.training.checks.rounding import within_noise, within_rounding
from qlora_tui.training.packed_attention import set_attention

_NAME = "qlora_check"
"""Name under which the comparing attention implementation is registered with transformers."""
_WINDOW = 3
"""Length to which sliding windows and chunks of the model are shortened, in tokens."""
_WINDOWS = re.compile(r"window(_size)?$|attention_chunk_size$")
"""Names of settings that limit how far back a token attends."""
_SCORES = 3.0
"""Standard deviation of each head's scores: large enough for uneven weights, too small for one-hot ones."""
_ROUNDINGS = 64.0
"""Maximum error, in fp32 rounding errors, of an output that is computed in float64. The library computes its
softmax in fp32.
"""
_NOISE = {torch.float32: 32.0, torch.bfloat16: 6.0, torch.float16: 6.0}
"""Maximum error of an output element in the run's dtype, as a multiple of the noise.

The noise is the error of the library's eager attention at each head's worst token, as the root mean square
over the channels. It is at least a third of the machine epsilon times the magnitude of the summed terms.
"""


AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer, computed from queries, keys and values."""


class AttentionMismatchError(RuntimeError):
    """Raised if the attention of a layer differs from the library's."""


def reference_logits(model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """Compute the logits of one sample with the library's attention, and compare ours in each layer.

    Returns:
        Logits (tokens, vocabulary).

    Raises:
        AttentionMismatchError: our attention differs in a layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    used = model.config._attn_implementation
    AttentionInterface.register(_NAME, partial(_compare, packed_attention.packed_attention_of(model)))
    AttentionMaskInterface.register(_NAME, eager_mask)
    if not set_attention(model, _NAME):
        raise AttentionMismatchError
    try:
        logits: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0]
    finally:
        set_attention(model, used)
    return logits


def setting_owners(model: nn.Module) -> list[Any]:
    """Return the model's modules and their configs: the objects that may hold settings of a forward."""
    modules = list(model.modules())
    configs = [getattr(module, "config", None) for module in modules]
    # Idefics has a number as an attribute named config.
    return [*modules, *{id(each): each for each in configs if hasattr(each, "__dict__")}.values()]


@contextmanager
def short_windows(model: nn.Module) -> Iterator[None]:
    """Limit every sliding window of the model to a few tokens, so that short samples extend beyond it."""
    former = []
    for holder in setting_owners(model):
        for name, window in list(vars(holder).items()):
            if _WINDOWS.search(name) and type(window) is int and window > _WINDOW:
                former.append((holder, name, window))
                setattr(holder, name, _WINDOW)
    try:
        yield
    finally:
        for holder, name, window in former:
            setattr(holder, name, window)


def _compare(
    packed: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the library's attention output. Raises AttentionMismatchError if ours, ``packed``, differs."""
    dtype = query.dtype
    # The library's masks add the lowest number of the dtype to masked scores.
    masks = {
        kind: None if attention_mask is None else attention_mask.to(kind) for kind in (torch.float64, dtype)
    }

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _reference(module, q, k, v, masks[q.dtype], **kwargs)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = packed_attention.segment_mask([q.shape[2]])
        output: Tensor = packed(module, q, k, v, mask, **kwargs)[0]
        return output

    if not attention_matches(ours, reference, query, key, value, kwargs.get("scaling")):
        raise AttentionMismatchError(type(module).__name__)
    return reference(query.double(), key.double(), value.double()).to(dtype), None


def attention_matches(
    ours: AttentionFn,
    reference: AttentionFn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> bool:
    """Return whether two attention functions agree on the tensors of a layer.

    The queries are scaled so that scores have a typical size: large scores would put all weight on one key,
    and small ones would hide a soft cap. A comparison in float64 tests the formula; one in the run's dtype
    tests the kernel.
    """
    usual = (query * _factors(query, key, scaling)).to(query.dtype)
    q, k, v = usual.double(), key.double(), value.double()
    expected, scale = reference(q, k, v), reference(q, k, v.abs())
    if not within_rounding(ours(q, k, v).float(), expected.float(), scale, _ROUNDINGS):
        return False
    rounded = reference(usual, key, value).double() - expected
    noise = rounded.square().mean(-1, keepdim=True).sqrt().amax(1, keepdim=True)
    floor = torch.finfo(query.dtype).eps / 3 * scale
    largest = torch.maximum(noise, floor)
    return within_noise(ours(usual, key, value), expected, largest, _NOISE[query.dtype])


def _reference(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Return the output of the family's own eager attention (batch, tokens, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
    if kwargs.get("scaling") is None:
        kwargs = {**kwargs, "scaling": query.shape[-1] ** -0.5}
    output: Tensor = eager(module, query, key, value, mask, **kwargs)[0]
    return output


def _factors(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Return factors (1, heads, 1, 1) that scale the queries to give each head's scores a typical size."""
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ keys.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    return _SCORES / scores.std((-1, -2), keepdim=True).clamp(min=1e-9)
