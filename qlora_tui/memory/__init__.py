"""The memory estimate: what a recipe will need, item by item, and what would fit instead.

Call :func:`estimate` (or :func:`compare` for NF4, int8 and 16 bits), :func:`check_fit` it against the
available memory, and call :func:`largest_settings` or :func:`cheapest_changes`; :func:`as_json` is what
``--json`` prints.

``execution``         which trainer's code runs; ``versions``: what its libraries do
``step``              activations and gradients of one training step of it: each kind of layer once, on
                      ``autograd``. ``layout`` and ``decoder_layer``: the layers; ``ops``, ``attention``,
                      ``linear`` and ``loss``: what an operation allocates and saves; ``moe`` (of a
                      ``mixture``), ``mla`` and ``cohere``: what some families have;
                      ``fused_lora`` and ``expert_loop``: our trainer's functions that save less memory.
                      ``step_trace`` has a traced step in its place.
``parameter_memory``  bytes of frozen weights with their quantization scales, adapter and optimizer states;
                      ``static_memory`` lists them as items, with the batch and workspaces;
                      ``four_bit``: which weights are quantized to 4 bits, and their tensors
``replay``            puts ``loading`` and the ``allocation_trace`` of each part on a model of CUDA's
                      ``allocator``
``conversion``        the peak of converting a GGUF file
``levels``            from tensors to what the GPU sees (on a CPU with ``onednn_cache``)
``general_answers``   what the forgetting curve computes between two steps
``moments``           the times of a step that may be its peak; ``timeline``: all of them, from loading to the
                      optimizer
``calibration``       corrects by measurements of past runs
``explain``           a sentence for each item; ``report``: the JSON output
``budget``            the memory of the device (``cpu`` describes a CPU); ``verdict`` compares the estimate
                      with it
``streamed_layers``   layers that wait in host memory; ``streaming_cost``: what that costs in time, from
                      ``transfer_speed``, measured once per machine
``solver``            finds what fits; ``model_sizes``: how large a model fits; ``step_choice``: the rows
                      at a time, optimizer states and kept activations for which memory is free
"""

from qlora_tui.memory.calibration import Correction, MeasuredRun, correction_for, record_run
from qlora_tui.memory.estimate import PRECISIONS, Estimate, Item, compare, estimate
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.levels import UncertaintyBand
from qlora_tui.memory.model_sizes import ModelClass, largest_model_size
from qlora_tui.memory.report import as_json
from qlora_tui.memory.solver import MemorySaving, WhatFits, cheapest_changes, largest_settings, minimum_bytes
from qlora_tui.memory.step_choice import KeptLayersPlan, StepChoice, choose_step, plan_kept_layers
from qlora_tui.memory.verdict import Verdict, check_fit

__all__ = [
    "PRECISIONS",
    "Correction",
    "Device",
    "Estimate",
    "ExecutionConfig",
    "Item",
    "KeptLayersPlan",
    "MeasuredRun",
    "MemorySaving",
    "ModelClass",
    "StepChoice",
    "UncertaintyBand",
    "Verdict",
    "WhatFits",
    "as_json",
    "cheapest_changes",
    "check_fit",
    "choose_step",
    "compare",
    "correction_for",
    "estimate",
    "largest_model_size",
    "largest_settings",
    "minimum_bytes",
    "plan_kept_layers",
    "record_run",
    "trainer_execution",
]
