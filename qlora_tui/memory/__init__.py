"""The memory estimate: the memory that a recipe will need, item by item, and settings that would fit.

Call :func:`estimate` (or :func:`compare` for NF4, int8 and 16 bits), check the result against the
available memory with :func:`check_fit`, and call :func:`largest_settings` or :func:`cheapest_changes`.

``estimate``       items, levels and uncertainty of one recipe; whether it fits a budget; its timeline
``execution``      the code that a trainer runs, and the differences between versions of transformers
``weights``        bytes of the frozen weights, in 4 bits, streamed from host memory, or unquantized
``static_memory``  constant memory of a step: weights, adapter, optimizer states, batch, workspaces
``layout``         each layer as the shapes of its modules and norms, and the trained tensors
``activations``    memory that a layer saves for its backward, and memory that it takes in addition
``step``           one training step: each kind of layer once, the loss, and the possible peak moments
``loading``        allocations while a base is loaded, in the order of the installed transformers
``recording``      the exact estimate: loading and two traced steps, replayed on the ``allocator`` of CUDA
``traces``         the steps that this process has traced, which replace the formula in estimates
``levels``         from tensor bytes to those that the GPU or the system counts; converting a GGUF file
``calibration``    measurements of past runs and of copies on this machine, and the resulting correction
``explain``        a sentence for each item
``budget``         the memory of the device, and its CPU or GPU
``solver``         settings, changes and model sizes that fit; the memory of a recipe's variants
``quality``        how quantization changes the predictions, measured in a child process
``step_choice``    rows at a time, optimizer states and recomputed layers for the free memory; the time
                   that streaming takes
"""

from qlora_tui.memory.calibration import Correction, MeasuredRun, correction_for, record_run
from qlora_tui.memory.estimate import PRECISIONS, Estimate, Item, Verdict, check_fit, compare, estimate
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.levels import UncertaintyBand
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
