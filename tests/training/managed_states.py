"""Optimizer states in memory that no CPU may touch while a GPU computes, as managed memory is on WSL2.

Run as ``python -m tests.training.managed_states CASE``: a touch too early is a segmentation fault.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from qlora_tui.training import trainer as trainer_module
from qlora_tui.training.trainer import Trainer

_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Gpu:
    """Kernels in flight, and the managed memory that they close to the CPU."""

    def __init__(self) -> None:
        self._pages = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(2)]
        self.paged = [torch.frombuffer(page, dtype=torch.uint8) for page in self._pages]

    def launch(self) -> None:
        """Queue a kernel."""
        self._protect(_NO_ACCESS)

    def synchronize(self) -> None:
        """Wait for all kernels."""
        self._protect(_READ_WRITE)

    def _protect(self, access: int) -> None:
        for states in self.paged:
            address, size = ctypes.c_void_p(states.data_ptr()), ctypes.c_size_t(mmap.PAGESIZE)
            assert ctypes.CDLL(None).mprotect(address, size, access) == 0


GPU = Gpu()


class OnGpu(Tensor):
    """A tensor that a kernel fills."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where a real one would be."""
        return torch.device("cuda")

    def zero_(self) -> Tensor:
        """Fill with zeros."""
        GPU.launch()
        return super().zero_()


def optimizer() -> Any:
    """Return one that has done its first step: bitsandbytes pages the moments and not their scales."""
    states = [
        {"state1": paged, "absmax1": torch.ones(2).as_subclass(OnGpu), "step": 1} for paged in GPU.paged
    ]
    return SimpleNamespace(state=dict(enumerate(states)))


def too_early(optimizer: Any) -> None:
    """Touch a state while a kernel is in flight."""
    optimizer.state[0]["state1"].zero_()


def save(optimizer: Any) -> None:
    """Write a checkpoint."""

    trainer: Any = SimpleNamespace(
        model=None,
        optimizer=SimpleNamespace(state_dict=lambda: [state["state1"] for state in optimizer.state.values()]),
        schedule=SimpleNamespace(state_dict=dict),
        _accelerator=SimpleNamespace(is_main_process=True, scaler=None),
        _device=torch.device("cpu"),
        _random_numbers_file="rng_state.pth",
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(trainer_module, "save_adapter", lambda model, to: None),
    ):
        Trainer.save(trainer, Path(folder))


def main() -> None:
    """Do what the first argument names, right after a step."""
    states = optimizer()
    with (
        patch.object(torch.cuda, "is_initialized", return_value=True),
        patch.object(torch.cuda, "synchronize", GPU.synchronize),
    ):
        GPU.launch()
        {"too_early": too_early, "reset": trainer_module._reset_states, "save": save}[sys.argv[1]](states)
    GPU.synchronize()
    print(
        [
            int(state["state1"].sum() + state["absmax1"].sum()) + state["step"]
            for state in states.state.values()
        ]
    )


if __name__ == "__main__":
    main()
