"""Faults to inject into a trainer process before it starts; see :mod:`tests.support.forkserver`."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from qlora_tui.memory import StepChoice
from qlora_tui.memory.step_choice import with_micro_batch, with_optimizer
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.training_settings import RecipeOptimizer
from qlora_tui.runs import control
from qlora_tui.runs.control import Kind
from qlora_tui.runs.directory import RunDir
from qlora_tui.training import loss, memory_meter, model, packed_attention
from qlora_tui.training.checks.step_comparison import StepReference
from qlora_tui.training.fused import norm_rotary
from qlora_tui.training.loop import Loop
from qlora_tui.training.trainer import Trainer

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
"""``linux/sched.h``, ``linux/mount.h``."""


def inject_oom(fits: dict[int, float]) -> None:
    """Raise out of memory where a step has more rows than fit: ``{step: rows}``; checkpointing doubles it."""
    train = Trainer.train_step

    def step(self: Trainer, *arguments: Any) -> Any:
        rows = self._training.micro_batch_size / (2 if self.model.is_gradient_checkpointing else 1)
        if rows > fits.get(self.step + 1, rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train(self, *arguments)

    Trainer.train_step = step  # type: ignore[method-assign, assignment]


def inject_oom_in_process(rank: str, fits: dict[int, float]) -> None:
    """:func:`inject_oom` in one of several processes."""
    if os.environ.get("RANK") == rank:
        inject_oom(fits)


def keep_pace(micro_batch_s: float) -> None:
    """Let no micro-batch take less, so that a run does not end before a test can act."""
    hook = Loop._after_micro_batch

    def after_micro_batch(self: Loop, done: int, total: int) -> None:
        time.sleep(micro_batch_s)
        hook(self, done, total)

    Loop._after_micro_batch = after_micro_batch  # type: ignore[method-assign]


def start_after(folder: str) -> None:
    """Announce this process by a file in a folder, and wait until the folder is removed."""
    with suppress(FileNotFoundError):
        (Path(folder) / str(os.getpid())).touch()
    while Path(folder).exists():
        time.sleep(0.05)


def request_within_step(folder: str, step: int, kind: Kind) -> None:
    """Put a request into ``control/`` after the first micro-batch of a step."""
    hook = Loop._after_micro_batch

    def after_micro_batch(self: Loop, done: int, total: int) -> None:
        if done == 1 and self.trainer.step == step - 1:
            control.send_request(RunDir(Path(folder)), kind)
        hook(self, done, total)

    Loop._after_micro_batch = after_micro_batch  # type: ignore[method-assign]


def inject_oom_with_kept_layers() -> None:
    """Raise out of memory where a layer keeps its activations despite gradient checkpointing."""
    train = Trainer.train_step

    def step(self: Trainer, *arguments: Any) -> Any:
        layers = self.model.get_base_model().model.layers
        if not all(layer.gradient_checkpointing for layer in layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train(self, *arguments)

    Trainer.train_step = step  # type: ignore[method-assign, assignment]


def no_memory_for_the_model() -> None:
    """Let loading the base model run out of memory."""

    def load(*args: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.load_base = load


def mount_small_tmpfs(folder: str, bytes_: int) -> None:
    """Mount a tmpfs of ``bytes_`` on ``folder``, for this process alone. Needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={bytes_}".encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "cannot mount a tmpfs")


def norm_without_offset() -> None:
    """Gemma's fused RMSNorm multiplies by w where it should by 1 + w."""
    stock = norm_rotary._rms_norm

    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, variant: Any) -> torch.Tensor:
        out, spread = stock(x, weight - 1, eps, variant)
        ctx.save_for_backward(x, spread)
        ctx.weight, ctx.variant = weight, variant
        return out

    norm_rotary._FusedRmsNorm.forward = staticmethod(forward)  # type: ignore[method-assign]


def choose_for_memory(rows: int, optimizer: RecipeOptimizer) -> None:
    """Let the free memory be right for so many rows at a time, and for this optimizer."""

    def choose(recipe: Recipe, *args: Any, **settings: Any) -> StepChoice:
        chosen = with_optimizer(with_micro_batch(recipe, rows), optimizer)
        return StepChoice(recipe, chosen, None, None, 1.0)  # type: ignore[arg-type]  # not estimated

    memory_meter.choose_step = choose  # type: ignore[attr-defined]


def refuse_kernels() -> None:
    """Let Triton refuse its kernels, as without a C compiler."""
    from qlora_tui.training.fused import kernel_choice

    reason = "No C compiler is found"
    kernel_choice._try_kernels = lambda device, dtype: (None, reason)


def samples_see_each_other() -> None:
    """Let packed attention treat a row as one sample, unnoticed by the checks of single parts."""
    whole = packed_attention.segment_mask
    vars(model)["packing_is_isolated"] = lambda *args: True
    vars(loss)["segment_mask"] = lambda lengths: whole([sum(lengths)])


def overflow_every_step() -> None:
    """Let every step be skipped, as under fp16 where gradients overflow at any scale."""

    def skip(self: AcceleratedOptimizer, closure: Any = None) -> None:
        self._is_overflow = True

    AcceleratedOptimizer.step = skip


def even_stock_code_differs() -> None:
    """Let every step of ours differ from the library's, whichever paths it uses."""
    stock = StepReference.compare

    def compare(self: StepReference, **settings: Any) -> Any:
        return replace(stock(self, **settings), loss=1e3)

    StepReference.compare = compare  # type: ignore[method-assign]


def request_within_evaluation(folder: str, step: int, kind: Kind) -> None:
    """Put a request into ``control/`` as the evaluation after a step begins."""
    stock = Loop._evaluate

    def evaluate(self: Loop, **settings: Any) -> bool:
        if self.trainer.step == step:
            control.send_request(RunDir(Path(folder)), kind)
        return stock(self, **settings)

    Loop._evaluate = evaluate  # type: ignore[method-assign]


def no_reference_step() -> None:
    """Let the library's step fail in the check of the first step, with an unexpected error."""

    def fails(self: StepReference) -> Any:
        raise KeyError("rope_type")

    StepReference._reference_step = fails  # type: ignore[method-assign]


def no_memory_for_the_reference_step(tokens: int) -> None:
    """Let the library's step run out of memory where it has more than ``tokens``."""
    stock = StepReference._reference_step

    def step(self: StepReference) -> Any:
        if self._excerpt.tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return stock(self)

    StepReference._reference_step = step  # type: ignore[method-assign]


def limit_address_space(more_bytes: int) -> None:
    """Limit how much the address space of this process may grow."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))
