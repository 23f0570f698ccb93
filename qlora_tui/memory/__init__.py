"""The memory estimate: what a recipe will need, item by item, and what would fit instead.

Call :func:`estimate` (or :func:`compare` for NF4, int8 and 16 bits), :func:`judge` it against the memory
there is, ask :func:`what_fits` or :func:`cheapest_changes`; :func:`as_json` is what ``--json`` prints.

``codepath`` says which trainer's code is meant, ``versions`` and ``trl_loss`` what its libraries did;
``step`` walks one step of it over the ``tape``, with ``layout``, ``blocks``, ``ops``, ``attention``,
``linear`` and ``loss`` for what most families share, and ``moe``, ``latent``, ``cohere`` and ``fused`` for
what some have, ``lean`` for what our trainer keeps less of;
``weights`` and ``residents`` count what stays; ``replay`` puts ``loading`` and the ``recording`` of each part
on a model of CUDA's ``allocator``; ``conversion`` is the peak of converting a GGUF file; ``tiers`` (on a CPU
with ``kernels``) goes from tensors to what the card sees; ``traced`` takes a counted step in place of the
walked one; ``learning`` corrects by what past runs measured; ``explain`` has the sentence of each item,
``report`` all of them for programs.

``room`` is what there is to compute on (``processor``: where that is the CPU); ``verdict`` holds the estimate
against it, ``solver`` finds what would fit, ``classes`` how large a model.
"""

from qlora_tui.memory.classes import ModelClass, largest_model
from qlora_tui.memory.codepath import CodePath, Device, our_path
from qlora_tui.memory.estimate import PRECISIONS, Estimate, Item, compare, estimate
from qlora_tui.memory.learning import Correction, Peaks, correction_for, remember
from qlora_tui.memory.report import as_json
from qlora_tui.memory.solver import Change, WhatFits, cheapest_changes, least_bytes, what_fits
from qlora_tui.memory.tiers import Band
from qlora_tui.memory.verdict import Verdict, judge

__all__ = [
    "PRECISIONS",
    "Band",
    "Change",
    "CodePath",
    "Correction",
    "Device",
    "Estimate",
    "Item",
    "ModelClass",
    "Peaks",
    "Verdict",
    "WhatFits",
    "as_json",
    "cheapest_changes",
    "compare",
    "correction_for",
    "estimate",
    "judge",
    "largest_model",
    "least_bytes",
    "our_path",
    "remember",
    "what_fits",
]
