"""Parts of a model as functions that keep less for the backward than the library's own, and do less.

Each gives what the part it stands for gives. :mod:`.linear`: a frozen module and its adapter; :mod:`.gated`:
the end of a gated MLP; :mod:`.norm`: RMSNorm; :mod:`.attention`: on a CPU, the attention of a row's samples.
:class:`.replace.ReplacedForwards` gives the library's own back.
"""

from __future__ import annotations

from torch import nn

from qlora_tui.training.lean.gated import use_lean_mlp
from qlora_tui.training.lean.linear import use_lean_lora
from qlora_tui.training.lean.norm import use_lean_norms


def use_lean(model: nn.Module) -> None:
    """Put them in, wherever the model's own does nothing else."""
    use_lean_lora(model)
    use_lean_mlp(model)
    use_lean_norms(model)
