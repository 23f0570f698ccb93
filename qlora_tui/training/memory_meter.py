"""Measures the peak memory of a run and compares it with the estimate."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from msgspec import structs

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.gpu.torch_env import grows_segments, managed_memory_is_safe
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.memory import Device as EstimatedDevice
from qlora_tui.memory import Estimate, MeasuredRun, correction_for, estimate, record_run, trainer_execution
from qlora_tui.memory.budget import (
    liger_is_installed,
    torch_has_varlen,
    torch_is_for_cuda,
    triton_is_installed,
)
from qlora_tui.memory.calibration import measured_speed
from qlora_tui.memory.execution import LEAN_OPTIMIZER
from qlora_tui.memory.step_choice import KeptLayersPlan, choose_step, plan_kept_layers, with_optimizer
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.events import MemoryMeasured
from qlora_tui.training.compute_device import ComputeDevice, free_host_bytes, versions
from qlora_tui.training.model import PreparedBase


class MemoryMeter:
    """Measures peak memory of this process, and has the estimate for the recipe."""

    def __init__(self, recipe: Recipe, architecture: Architecture, device: ComputeDevice) -> None:
        self._recipe = recipe
        self._architecture = architecture
        self._device = device
        self.execution = trainer_execution(recipe, _as_estimated(device), architecture)
        """The execution that the estimate assumes. Initially the expected execution; :meth:`use` replaces it
        with the actual execution.
        """
        self.is_modelled = False
        """Whether the loss and the code paths of the run are known, and the estimate models them."""
        self.estimate = self._estimate(recipe, corrected=True)
        """The estimate; None if it does not support the model."""
        self._longest_batch: Recipe | None = None
        """The recipe, with the sequence length of the longest micro-batch."""
        self._longest_batch_estimate: Estimate | None = None

    def use(self, base: PreparedBase, *, triton: bool) -> None:
        """Estimate with the loss, attention and kernels that the run really uses.

        If the estimate cannot model them, it is not changed. This is so if sequences are padded although
        packed ones were expected, or the reverse, and if a fast path other than the loss was switched off.
        Then no layers keep their activations, and the peak is not recorded.
        """
        expected = self.execution
        self.is_modelled = base.padding_free == expected.segments and set(base.replaced) <= {"loss"}
        if self.is_modelled:
            varlen, triton = base.packed == "varlen", expected.triton and triton
            self.execution = replace(expected, loss=base.loss, varlen=varlen, triton=triton)
            self.estimate = self._estimate(self._recipe, corrected=True)

    def measure(self, when: Literal["probe", "end"]) -> MemoryMeasured:
        """Return the peak so far and the estimate; ``when`` names the time of the measurement."""
        allocated = reserved = 0
        if self._device.kind == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device.torch_device)
            reserved = torch.cuda.max_memory_reserved(self._device.torch_device)
            peak = reserved + self._context_bytes()
        else:
            peak = peak_resident_bytes()
        return MemoryMeasured(
            when=when,
            estimated_bytes=self.estimate.process_bytes if self.estimate else 0,
            measured_bytes=peak,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
        )

    def set_longest_batch(self, sequences: int, tokens: int, samples: int) -> None:
        """Set the longest micro-batch of the run, whose estimate is compared with the peak.

        The recipe allows ``data.max_length`` tokens per sequence, but all of the data may be shorter.
        """
        rows = sequences * (2 if self._recipe.trains_pairs else 1)
        data = structs.replace(self._recipe.data, max_length=max(1, -(-tokens // rows)))
        training = structs.replace(self._recipe.training, micro_batch_size=sequences)
        self.execution = replace(self.execution, samples=samples)
        self._longest_batch = structs.replace(self._recipe, data=data, training=training)
        self._longest_batch_estimate = self._estimate(self._longest_batch, corrected=False)

    def set_recipe(self, recipe: Recipe) -> None:
        """Update the estimate for a recipe whose automatic settings have been resolved."""
        self._recipe = recipe
        self.execution = trainer_execution(recipe, _as_estimated(self._device), self._architecture)
        self.estimate = self._estimate(recipe, corrected=True)

    def choose_step(
        self, recipe: Recipe, longest: int, free_bytes: int, *, after_running_out: bool
    ) -> Recipe:
        """Return the recipe with the fastest optimizer and micro-batch size that fit in free memory.

        If the estimate does not support the model, the settings with the least memory are returned.

        Args:
            longest: tokens of the longest sequence.
            free_bytes: result of :meth:`free_bytes`; with several processes, the smallest.
            after_running_out: choose the settings with the least memory instead.
        """
        least = with_optimizer(recipe, LEAN_OPTIMIZER)
        if after_running_out:
            return least
        measured = structs.replace(recipe, data=structs.replace(recipe.data, max_length=max(1, longest)))
        device = self._corrected_device()
        try:
            choice = choose_step(measured, self._architecture, free_bytes, device=device)
        except UserError:
            return least
        return structs.replace(recipe, training=choice.recipe.training)

    def plan_kept_layers(
        self, limit: int | None, least: Callable[[int], int] = lambda free_bytes: free_bytes
    ) -> KeptLayersPlan | None:
        """Return how many layers can keep their activations in the longest batch, and estimate with them.

        Call :meth:`set_longest_batch` first. No layers are kept if the run's code is not modeled.

        Args:
            limit: maximum number of layers; None for any number.
            least: returns the smallest free memory of all processes, given that of this one.

        Returns:
            None if the recipe fixes the number, or the estimate does not support the model.
        """
        recipe = self._longest_batch
        if recipe is None or self._longest_batch_estimate is None:
            return None
        plan = plan_kept_layers(
            recipe,
            self._architecture,
            least(self.free_bytes()),
            device=self._corrected_device(),
            execution=self.execution,
            limit=limit if self.is_modelled else 0,
        )
        if plan is not None and plan.kept_layers:
            self.estimate = plan.estimate
            self._longest_batch_estimate = self._estimate(
                recipe, corrected=False, kept_layers=plan.kept_layers
            )
        return plan

    def record(self, *, ran_out: bool = False) -> None:
        """Record peak and prediction, which correct later estimates on this machine.

        A run that ran out of memory is recorded only if it used more than predicted: how much it would have
        needed is unknown. A run that never reached its longest batch is not recorded, nor is a run whose
        code or layers the estimate does not model exactly.
        """
        predicted, peak = self._longest_batch_estimate, self.measure("end")
        if predicted is None or not (self.is_modelled and predicted.exact):
            return
        if ran_out and peak.measured_bytes <= predicted.process_bytes:
            return
        outside = predicted.bytes_of("context") + predicted.bytes_of("runtime")
        with suppress(OSError):  # a full disk loses only the record, not the run
            record_run(
                MeasuredRun(
                    at=peak.at,
                    machine=self._device.name,
                    driver=_driver(),
                    versions=versions(),
                    model_type=self._architecture.model_type,
                    ran_out=ran_out,
                    own_process=True,
                    counts_gaps=True,
                    managed_bytes=predicted.process_bytes - predicted.reserved_bytes - outside,
                    predicted_allocated_bytes=predicted.allocated_bytes,
                    predicted_reserved_bytes=predicted.reserved_bytes,
                    predicted_process_bytes=predicted.process_bytes,
                    measured_allocated_bytes=peak.allocated_bytes,
                    measured_reserved_bytes=peak.reserved_bytes,
                    measured_process_bytes=peak.measured_bytes,
                )
            )

    def _estimate(self, recipe: Recipe, *, corrected: bool, kept_layers: int = 0) -> Estimate | None:
        where = self._corrected_device() if corrected else _as_estimated(self._device)
        try:
            return estimate(
                recipe,
                self._architecture,
                execution=replace(self.execution, kept_layers=kept_layers),
                device=where,
            )
        except UserError:
            return None

    def _corrected_device(self) -> EstimatedDevice:
        return replace(_as_estimated(self._device), correction=correction_for(self._device.name))

    def free_bytes(self) -> int:
        """Return the device memory that no other process uses: free memory, and this process's, in bytes."""
        if self._device.kind == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device.torch_device)
            held = torch.cuda.memory_reserved(self._device.torch_device) + self._context_bytes()
            return int(free) + held
        return free_host_bytes() + int(psutil.Process().memory_info().rss)

    def _context_bytes(self) -> int:
        """Return this process's GPU memory outside torch's pool; estimated if the driver has no figure."""
        gpu_bytes = _gpu_memory_used()
        if gpu_bytes is None:
            return self.estimate.bytes_of("context") if self.estimate else 0
        return max(0, gpu_bytes - torch.cuda.memory_reserved(self._device.torch_device))


def largest(measured: list[MemoryMeasured]) -> MemoryMeasured:
    """Return the measurement of the process with the highest peak."""
    return max(measured, key=lambda each: each.measured_bytes)


def _as_estimated(device: ComputeDevice) -> EstimatedDevice:
    cuda = device.kind == "cuda"
    return EstimatedDevice(
        kind=device.kind,
        capability=torch.cuda.get_device_capability(device.torch_device) if cuda else (0, 0),
        multiprocessors=torch.cuda.get_device_properties(device.torch_device).multi_processor_count
        if cuda
        else None,
        native_bfloat16=device.dtype == torch.bfloat16,
        cuda_libraries=torch_is_for_cuda(),
        liger=cuda and liger_is_installed(),
        expandable_segments=grows_segments(os.environ),
        managed_memory=managed_memory_is_safe(),
        triton=cuda and triton_is_installed(),
        varlen=torch_has_varlen(),
        speed=measured_speed(device.name) if cuda else None,
    )


def peak_resident_bytes() -> int:
    """Return the largest resident set size of this process so far; 0 if the kernel does not report it.

    ``ru_maxrss`` is not used, because it starts with the size of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _gpu_memory_used() -> int | None:
    try:
        with Nvml() as driver:
            processes = driver.read(default_cuda_device().index, processes=True).processes or ()
    except GpuUnavailableError:
        return None
    return next((p.memory_bytes for p in processes if p.pid == os.getpid()), None)


def _driver() -> str:
    """Return the version of the GPU driver; empty if there is none."""
    try:
        return default_cuda_device().driver or ""
    except GpuUnavailableError:
        return ""
