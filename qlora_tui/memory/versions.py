"""Differences between versions of transformers' modeling code that affect the peak.

From the sources of 4.43.3, 4.44.2, 4.45.2, 4.46.3, 4.47.1, 4.48.1, 4.49.0, 4.50.3, 4.52.4, 4.53.3, 4.54.1,
4.55.4, 4.56.2 and 5.24: ``models/*/modeling_*.py``, ``loss/loss_utils.py``,
``integrations/sdpa_attention.py``.
"""

from __future__ import annotations

from typing import Literal

Version = tuple[int, int]
"""Major and minor version."""

CURRENT: Version = (5, 24)

FUSED_EXPERTS: Version = (5, 0)
"""First version in which experts are two 3-D parameters; before, each matrix was a linear module."""

LossCode = Literal["narrow", "rebound", "shifted", "padded"]
"""narrow: the model's own loss, in the logits' dtype, on a shifted copy.
rebound: the model's own loss on a shifted copy in float32; the 16-bit logits are freed once they are cast.
shifted: ``ForCausalLMLoss`` on a shifted copy in float32; the caller still holds the 16-bit logits.
padded: ``ForCausalLMLoss`` shifts the labels, so nothing is copied."""

_NARROW_FAMILIES = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "stablelm")
_LABELS_SHIFTED: Version = (4, 49)
"""First version in which ``ForCausalLMLoss`` pads the labels, and every family above calls it."""
_LOSS_FUNCTION: Version = (4, 46)
_LATE_LOSS_FUNCTION: dict[str, Version] = {"starcoder2": (4, 47), "mistral": (4, 48), "granite": (4, 48)}
"""Families that adopted ``self.loss_function`` later than the others."""

_REPEATED_FOR_FLASH = ("mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "starcoder2")
_ONE_ATTENTION_FOR_ALL: Version = (4, 48)
"""First version with one attention class; before, each family had one per kernel (``LlamaSdpaAttention``)."""
_SDPA_SHARES_HEADS: Version = (4, 54)
_SDPA_WITHOUT_COPIES: Version = (4, 56)


_EMBEDDING_SCALES_ITSELF: Version = (5, 4)
"""First version without the multiplication of the embedding's output in Gemma's and Gemma 2's models (5.2
still had it)."""


def multiplies_embedding(model_type: str, version: Version) -> bool:
    """Return whether the model multiplies its embedding's output, so that both exist in the first layer."""
    if model_type in ("gemma", "gemma2"):
        return version < _EMBEDDING_SCALES_ITSELF
    return model_type == "granite"


def loss_code(model_type: str, version: Version) -> LossCode:
    """Return the variant of a family's stock loss in one version."""
    if version >= _LABELS_SHIFTED:
        return "padded"
    if model_type in _NARROW_FAMILIES:
        return "narrow"
    return "shifted" if version >= _LATE_LOSS_FUNCTION.get(model_type, _LOSS_FUNCTION) else "rebound"


def repeats_heads_in_layer(model_type: str, version: Version, *, sdpa: bool) -> bool:
    """Return whether the layer itself copies shared key and value heads before it calls a fused kernel."""
    if version >= _ONE_ATTENTION_FOR_ALL:
        return False
    return sdpa or model_type in _REPEATED_FOR_FLASH


def repeats_heads_in_sdpa(version: Version) -> bool:
    """Return whether ``sdpa_attention_forward`` copies shared heads: later versions let the kernel share
    them, as long as there is no mask."""
    return _ONE_ATTENTION_FOR_ALL <= version < _SDPA_SHARES_HEADS


def copies_for_sdpa(version: Version) -> bool:
    """Return whether ``sdpa_attention_forward`` makes queries, keys and values contiguous, which all come as
    transposed views."""
    return _ONE_ATTENTION_FOR_ALL <= version < _SDPA_WITHOUT_COPIES
