"""Compiles what the kernels' functions launch, with Triton's own compiler for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training import fused

SOURCE = Path(fused.__file__).with_name("triton_kernels.py")
SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}
"""Supported GPUs, and shared memory that a block can have there (CUDA C++ Programming Guide, technical
specifications per compute capability)."""
REGISTERS = 1 << 16
"""32-bit registers of a multiprocessor, which a block cannot exceed, on all of them (the same table)."""


@dataclass(frozen=True)
class Shape:
    """What the kernels see of a model."""

    hidden: int
    heads: int
    key_heads: int
    head: int
    """Columns of a head, which head norms normalize."""
    rotary: int
    """Columns that rotary positions rotate."""


MODELS = {
    "SmolLM2-135M": Shape(576, 9, 3, 64, 64),
    "gemma-3-4b": Shape(2560, 8, 4, 256, 256),
    "Llama-3.1-8B": Shape(4096, 32, 8, 128, 128),
    "Qwen3.5-27B, partly rotated": Shape(5120, 24, 4, 256, 64),
    "falcon-7b, one key head": Shape(4544, 71, 1, 64, 64),
    "Llama-3.1-70B": Shape(8192, 64, 8, 128, 128),
    "Llama-3.1-405B": Shape(16384, 128, 8, 128, 128),
}


@dataclass(frozen=True)
class Usage:
    """What a compiled launch needs."""

    kernel: str
    warps: int
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread: memory of the GPU that spilled registers use."""
    shared_bytes: int
    """Per block."""

    def problem(self, capability: tuple[int, int]) -> str:
        """Why this launch is slow or impossible on a GPU; empty if it is neither."""
        if self.stack_bytes:
            return f"{self.kernel} spills {self.stack_bytes} bytes"
        if self.registers * self.warps * 32 > REGISTERS:
            return f"{self.kernel} needs {self.registers} registers in {self.warps} warps"
        if self.shared_bytes > SHARED_KIB[capability] * 1024:
            return f"{self.kernel} needs {self.shared_bytes} bytes of shared memory"
        return ""


def load(source: Path) -> ModuleType:
    """The kernels of a source file, as a module of their own."""
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch_all(kernels: ModuleType, shape: Shape, tensor: Callable[..., Tensor]) -> None:
    """Call every function of the kernels with tensors of a model's shape."""
    rows, tokens = 2, 50
    for width in (shape.hidden, shape.head):
        x, weight = tensor(rows, tokens, width), tensor(width)
        for in_fp32 in (False, True):
            _, inv_rms = kernels.rms_norm(x, weight, 1e-6, offset=0.0, in_fp32=in_fp32)
        kernels.rms_norm_backward(x, x, weight, inv_rms, offset=0.0)
    q, k = (tensor(rows, heads, tokens, shape.head) for heads in (shape.heads, shape.key_heads))
    for backward in (False, True):
        table = tensor(1, tokens, shape.rotary)
        kernels.rotate(q, k, table, table, backward=backward)
    gate = tensor(rows, tokens, 4 * shape.hidden)
    for activation in ("silu", "gelu_tanh"):
        kernels.gated_product(gate, gate, activation)
        kernels.gated_product_backward(gate.clone(), gate, gate, activation)


class Compiler:
    """The kernels of a source file, compiled and not run when their functions launch them."""

    def __init__(self, source: Path, capability: tuple[int, int]) -> None:
        from triton.runtime.jit import JITFunction

        self.capability = capability
        self.kernels = load(source)
        self.functions = {name: f for name, f in vars(self.kernels).items() if isinstance(f, JITFunction)}
        self.compiled: list[tuple[str, Any]] = []
        for name, function in self.functions.items():
            function.run = self._compile_only(name, function)

    def _compile_only(self, name: str, function: Any) -> Callable[..., Any]:
        run = function.run

        def compile_only(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            result = run(*args, grid=grid, warmup=True, **options)
            self.compiled.append((name, result))
            return result

        return compile_only

    def launch(self, shape: Shape) -> None:
        """Compile every launch of a training step of this shape, in the dtype that the trainer chooses."""
        dtype = torch.float16 if self.capability < (8, 0) else torch.bfloat16
        launch_all(self.kernels, shape, lambda *size: torch.empty(size, dtype=dtype, device="meta"))

    def usages(self, folder: Path) -> list[Usage]:
        """What the launches so far need, from the disassembler of the CUDA toolkit in Triton's wheel."""
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usages = []
        for name, result in self.compiled:
            file = folder / "kernel.cubin"
            file.write_bytes(result.asm["cubin"])
            command = [str(tool), "-res-usage", str(file)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = re.search(r"REG:(\d+) STACK:(\d+)", text)
            assert found is not None, text
            registers, stack = map(int, found.groups())
            usages.append(Usage(name, result.metadata.num_warps, registers, stack, result.metadata.shared))
        return usages


class NoGpu:
    """Triton's driver of a machine without a GPU that compiles for one."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        from triton.backends.compiler import GPUTarget

        major, minor = self._capability
        return GPUTarget("cuda", major * 10 + minor, 32)
