"""Parts of a model as functions that keep less for the backward than the library's own, and do less.

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
    """Put them in, wherever the model's own does nothing else."""
    fuse_lora(model)
    fuse_gated_mlp(model)
    fuse_rms_norm(model)
