"""What torch's variable-length FlashAttention computes, written out, for machines without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """(tokens, heads, width); refuses what the kernel refuses."""
    tokens, heads, width = query.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert enable_gqa or key.shape[1] == heads
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q.dim() == 1 and torch.equal(cu_seq_q, cu_seq_k)
    assert int(cu_seq_q[-1]) == tokens and int(cu_seq_q.diff().max()) == max_q == max_k
    left, right = window_size
    assert right == 0
    place = torch.arange(tokens, device=query.device)
    sample = torch.bucketize(place, cu_seq_q[1:], right=True)
    distance = place[:, None] - place
    allowed = (sample[:, None] == sample) & (distance >= 0)
    if left >= 0:
        allowed &= distance <= left
    q = query.transpose(0, 1).float()
    k, v = (x.transpose(0, 1).float().repeat_interleave(heads // x.shape[1], 0) for x in (key, value))
    scores = (q @ k.transpose(1, 2)) * (width**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
