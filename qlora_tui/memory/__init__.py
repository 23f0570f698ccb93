"""The memory estimate: what a recipe will need, item by item, and what would fit instead.

Call :func:`estimate` (or :func:`compare` for NF4, int8 and 16 bits), :func:`check_fit` it against the
available memory, and call :func:`largest_settings` or :func:`cheapest_changes`; :func:`as_json` is what
``--json`` prints.

``estimate``       items, levels and uncertainty of one recipe; its verdict for a memory; its timeline
``execution``      which trainer's code runs, and what the versions of transformers do
``weights``        bytes of the frozen weights, in 4 bits, streamed from host memory, or as they are
``static_memory``  all that is there through a step: weights, adapter, optimizer states, batch, workspaces
``layout``         each layer by the shapes of its modules and norms, and what is trained
``activations``    what a layer of these shapes keeps for its backward, and takes beyond that
``step``           one training step: each kind of layer once, the loss, and the moments of both
``loading``        what loading a base allocates, in the order of the version that loads
``recording``      the exact form: loading and two traced steps on the model of CUDA's ``allocator``
``traces``         the steps that this process has traced, in every estimate of them
``levels``         from tensors to what the GPU sees, or the system of a CPU; converting a GGUF file
``calibration``    measurements of past runs and of copies on this machine, and the correction from them
``explain``        a sentence for each item; ``report``: the JSON output
``budget``         the memory of the device, and its CPU or GPU
``solver``         what fits: settings, changes, sizes of models; what variants of a recipe need
``quality``        what quantization changes in the predictions, measured in a child
``step_choice``    the rows at a time, optimizer states and recomputed layers for which memory is free; time
                   that streaming costs
"""

from qlora_tui.memory.calibration import Correction, MeasuredRun, correction_for, record_run
from qlora_tui.memory.estimate import PRECISIONS, Estimate, Item, Verdict, check_fit, compare, estimate
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.levels import UncertaintyBand
from qlora_tui.memory.report import as_json
from qlora_tui.memory.solver import (
    MemorySaving,
    WhatFits,
    cheapest_changes,
    largest_model_size,
    largest_settings,
    minimum_bytes,
)
from qlora_tui.memory.step_choice import KeptLayersPlan, StepChoice, choose_step, plan_kept_layers

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
