"""Parts of a model as autograd functions that save less for the backward, and compute less, than the library.

Each returns what the library's code returns. :mod:`.lora_linear`: a frozen linear layer and its adapter;
:mod:`.gated_mlp`: the end of a gated MLP; :mod:`.rms_norm`: RMSNorm; :mod:`.cpu_attention`: attention over
packed samples on a CPU. :class:`.patching.PatchedForwards` switches back to the library's forwards.
"""

from __future__ import annotations

from torch import nn

from qlora_tui.training.fused.gated_mlp import fuse_gated_mlp
from qlora_tui.training.fused.lora_linear import fuse_lora
from qlora_tui.training.fused.rms_norm import fuse_rms_norm


def use_fused(model: nn.Module) -> None:
    """Use the fused functions for every module that computes nothing else."""
    fuse_lora(model)
    fuse_gated_mlp(model)
    fuse_rms_norm(model)
