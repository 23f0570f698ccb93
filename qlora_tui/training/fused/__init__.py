"""Parts of a model as autograd functions that save less for the backward pass, and compute less, than the
code of transformers and peft, called "the library" below.

Each computes the same as the library's code: MLPs, norms and rotary positions are tested before they are
replaced, and ``training.checks`` compares the whole step. :mod:`.lora`: frozen linear layers and their
adapters; :mod:`.gated_mlp`: the end of a gated MLP; :mod:`.norm_rotary`: RMSNorm and rotary positions;
:mod:`.cpu_attention`: attention over packed samples on a CPU. On a GPU, gated MLPs, norms and rotary
positions use :mod:`.triton_kernels` if :mod:`.kernel_choice` allows it. :class:`.patching.PatchedForwards`
switches back to the library's forward methods.
"""

from __future__ import annotations

from typing import Any

from qlora_tui.training.fused.gated_mlp import fuse_gated_mlp
from qlora_tui.training.fused.kernel_choice import verify_kernels
from qlora_tui.training.fused.lora import AdapterCasts, fuse_lora
from qlora_tui.training.fused.norm_rotary import fuse_rms_norm, fuse_rotary


def use_fused(model: Any) -> None:
    """Use the fused functions in every module of a ``PeftModel`` whose results they reproduce."""
    frozen = next(p for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    verify_kernels(frozen.device, frozen.dtype)
    casts = AdapterCasts()
    decoder = model.get_base_model().get_decoder()
    casts.refresh_in(decoder, fuse_lora(model, decoder, casts))
    fuse_gated_mlp(model, casts)
    fuse_rms_norm(model)
    fuse_rotary(model, frozen.device, frozen.dtype)
