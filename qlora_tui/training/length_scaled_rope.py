"""Rotary positions whose frequencies depend on the length of a sequence, for several samples in one call.

LongRoPE uses one set of frequencies up to the original context length, and another set beyond it. Dynamic NTK
uses different frequencies for each length beyond it. transformers takes the length from the largest position
of the whole call, and with dynamic NTK also from earlier calls. So the result for a short sample depends on
whether a long one is in the same call, packed or padded. Here each sample has the frequencies of its own
length, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CALL_LENGTH = ("dynamic", "longrope")
"""Parts of the names of rope types whose frequencies depend on the positions of a call.

See ``dynamic_rope_update`` in ``transformers.modeling_rope_utils``.
"""


def scale_each_sample(model: Any) -> None:
    """Make a model with length-scaled rotary positions compute them sample by sample.

    A model without them is not changed.
    """
    rotary = [module for module in model.modules() if _scales_with_length(module)]
    if not rotary:
        return
    lengths = _SampleLengths()
    model.get_decoder().register_forward_pre_hook(lengths.take, with_kwargs=True)
    for module in rotary:
        _patch(module, lengths)


def frequency_switch(config: Any) -> int | None:
    """Return the length in tokens beyond which LongRoPE uses other frequencies; None without LongRoPE.

    Dynamic NTK has constant frequencies up to the context length, which no chat exceeds.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    groups = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    return min(
        (
            group["original_max_position_embeddings"]
            for group in groups
            if group.get("rope_type") == "longrope"
        ),
        default=None,
    )


def _scales_with_length(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    names = types.values() if isinstance(types, dict) else [types]
    return any(part in str(name) for name in names for part in _CALL_LENGTH)


class _SampleLengths:
    """Lengths of the samples of the current call, read from its attention mask.

    Recomputing a layer reads the lengths too, so they are kept until the next call.
    """

    def __init__(self) -> None:
        self.packed: list[int] = []
        """Lengths of the samples that lie end to end in one sequence."""
        self.rows: list[int] = []
        """Lengths of the samples of a padded batch, one per row."""

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the attention mask with which the decoder is called. This is a forward hook."""
        mask = kwargs.get("attention_mask")
        self.packed, self.rows = [], []
        if not torch.is_tensor(mask) or mask.is_meta:
            return
        if mask.dim() == 4 and mask.dtype == torch.int32:
            self.packed = mask.flatten().diff().tolist()
        elif mask.dim() == 2:
            self.rows = mask.sum(-1).tolist()


def _patch(module: Any, lengths: _SampleLengths) -> None:
    original: Callable[..., Any] = module.forward

    def of_sample(x: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        _forget_lengths(module)
        return original(x, positions, *args, **kwargs)

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if sum(lengths.packed) == position_ids.shape[-1]:
            samples = list(torch.split(position_ids, lengths.packed, dim=-1))
            return _joined([of_sample(x, each, *args, **kwargs) for each in samples], dim=1)
        rows = position_ids.expand(*position_ids.shape[:-2], max(len(lengths.rows), 1), -1)
        if len(set(lengths.rows)) > 1 and rows.shape[-2] == len(lengths.rows):
            # Everything after the end of a sample is padding, whose positions are not used.
            samples = [
                rows[..., i : i + 1, :].clamp(max=max(length - 1, 0)) for i, length in enumerate(lengths.rows)
            ]
            return _joined([of_sample(x, each, *args, **kwargs) for each in samples], dim=0)
        return of_sample(x, position_ids, *args, **kwargs)

    module.forward = forward


def _forget_lengths(module: Any) -> None:
    """Restore the frequencies for short sequences if transformers replaced them for a longer one."""
    # A buffer, or an attribute in earlier versions of transformers.
    names = [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]
    for name in names:
        prefix = name.removesuffix("original_inv_freq")
        cached = f"{prefix}max_seq_len_cached"
        if getattr(module, cached, module.original_max_seq_len) != module.original_max_seq_len:
            setattr(module, f"{prefix}inv_freq", getattr(module, name).clone())
            setattr(module, cached, module.original_max_seq_len)


def _joined(tables: list[Any], *, dim: int) -> Any:
    """Return the tables of all samples as one: cos and sin (rows, tokens, width), or one complex table."""
    if torch.is_tensor(tables[0]):
        return torch.cat(tables, dim=dim)
    return tuple(torch.cat(parts, dim=dim) for parts in zip(*tables, strict=True))
