"""The memory estimate: what a recipe will need, item by item, and what would fit instead.

Call :func:`estimate` (or :func:`compare` for NF4, int8 and 16 bits), :func:`check_fit` it against the memory
there is, ask :func:`largest_settings` or :func:`cheapest_changes`; :func:`as_json` is what ``--json`` prints.

``execution`` says which trainer's code is meant, ``versions`` and ``trl_loss`` what its libraries did;
``step`` walks one step of it over the ``autograd``, with ``layout``, ``decoder_layer``, ``ops``,
``attention``, ``linear`` and ``loss`` for what most families share, and ``moe``, ``mla``, ``cohere`` and
``unsloth_kernels`` for what some have, ``fused_lora`` for what our trainer keeps less of; ``weights`` and
``static_memory`` count what stays; ``replay`` puts ``loading`` and the ``allocation_trace`` of each part on
a model of CUDA's ``allocator``; ``conversion`` is the peak of converting a GGUF file; ``levels`` (on a CPU
with ``onednn_cache``) goes from tensors to what the card sees; ``step_trace`` takes a counted step in place
of the walked one; ``calibration`` corrects by what past runs measured; ``explain`` has the sentence of each
item, ``report`` all of them for programs.

``budget`` is what there is to compute on (``cpu``: where that is the CPU); ``verdict`` holds the estimate
against it, ``solver`` finds what would fit, ``model_sizes`` how large a model.
"""

from qlora_tui.memory.calibration import Correction, MeasuredRun, correction_for, record_run
from qlora_tui.memory.estimate import PRECISIONS, Estimate, Item, compare, estimate
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.levels import UncertaintyBand
from qlora_tui.memory.model_sizes import ModelClass, largest_model_size
from qlora_tui.memory.report import as_json
from qlora_tui.memory.solver import MemorySaving, WhatFits, cheapest_changes, largest_settings, minimum_bytes
from qlora_tui.memory.verdict import Verdict, check_fit

__all__ = [
    "PRECISIONS",
    "Correction",
    "Device",
    "Estimate",
    "ExecutionConfig",
    "Item",
    "MeasuredRun",
    "MemorySaving",
    "ModelClass",
    "UncertaintyBand",
    "Verdict",
    "WhatFits",
    "as_json",
    "cheapest_changes",
    "check_fit",
    "compare",
    "correction_for",
    "estimate",
    "largest_model_size",
    "largest_settings",
    "minimum_bytes",
    "record_run",
    "trainer_execution",
]
