"""Questions about torch, NVML and bitsandbytes on this GPU."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from bench.acceptance.machine import describe_machine
from bench.gpu_probe.probe import Answer, Probe, relative_difference
from qlora_tui.gpu.driver import open_driver
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.fused.kernel_choice import find_kernels, refusal_of_kernels, verify_kernels

_WEIGHT_SIZE = 4096
_FILL_BYTES = 1 << 31


def machine(probe: Probe) -> Answer:
    """Versions, and whether torch's allocator grows its segments as the trainer requests."""
    answer = describe_machine() | {"visible_gpus": torch.cuda.device_count()}
    if probe.on_gpu:
        torch.zeros(1, device=probe.device)
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        answer["expandable_segments"] = settings.get("expandable_segments")
    return answer


def context(probe: Probe) -> Answer:
    """GPU memory of this process beside torch's pool, with cuBLAS at work, and what NVML reads."""
    if not probe.on_gpu:
        return {"skipped": "there is no GPU"}
    probe.free_memory()
    with open_driver() as driver:
        index = default_cuda_device().index
        after_import = _outside_pool(driver.read(index, processes=True).processes)
        ones = torch.ones(256, 256, device=probe.device, dtype=torch.bfloat16)
        ones @ ones
        probe.synchronize()
        reading = driver.read(index, processes=True)
    return {
        "names_process": after_import is not None,
        "context_mib": after_import,
        "with_cublas_mib": _outside_pool(reading.processes),
        "pool_mib": torch.cuda.memory_reserved() >> 20,
        "workspace_mib": torch.cuda.memory_allocated() >> 20,
        "utilization_percent": reading.utilization_percent,
        "power_w": reading.power_w,
        "throttle": reading.throttle,
    }


def _outside_pool(processes: Any) -> int | None:
    """MiB of this process outside torch's pool; None where NVML does not name it."""
    used = next((p.memory_bytes for p in processes or () if p.pid == os.getpid()), None)
    return None if used is None else (used - torch.cuda.memory_reserved()) >> 20


def four_bit(probe: Probe) -> Answer:
    """NF4 beside the CPU, speed of unpacking and of products by rows, and whether two products are equal."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = (torch.randn(_WEIGHT_SIZE, _WEIGHT_SIZE) * 0.02).to(torch.bfloat16)
    nf4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    packed, state = quantize_4bit(weight.to(probe.device), **nf4)
    on_cpu = dequantize_4bit(*quantize_4bit(weight, **nf4))
    unpack_ms = probe.milliseconds(lambda: dequantize_4bit(packed, state))
    answer: Answer = {
        "difference_from_cpu": relative_difference(dequantize_4bit(packed, state).cpu(), on_cpu),
        # Read half a byte, write two, for each weight.
        "unpack_gb_s": round(weight.numel() * 2.5 / unpack_ms / 1e6, 1),
    }
    for rows in (1, 16, 512, 2048) if probe.on_gpu else (1,):
        x = torch.randn(rows, _WEIGHT_SIZE, device=probe.device, dtype=torch.bfloat16)

        def product(x: torch.Tensor = x) -> torch.Tensor:
            result: torch.Tensor = bnb.matmul_4bit(x, packed, quant_state=state)
            return result

        answer[f"{rows} rows"] = {
            "ms": round(probe.milliseconds(product), 4),
            "equal_twice": bool(torch.equal(product(), product())),
        }
    return answer


def triton_kernels(probe: Probe) -> Answer:
    """Whether Triton's kernels compile and compute what torch does; speed of a norm, ours and torch's."""
    if not probe.on_gpu:
        return {"skipped": "Triton compiles for GPUs"}
    device, answer = torch.device("cuda", torch.cuda.current_device()), {}
    for dtype in (torch.bfloat16, torch.float16):
        verify_kernels(device, dtype)
        answer[str(dtype)[6:]] = refusal_of_kernels(device, dtype) or "used"
    if (kernels := find_kernels(device, torch.bfloat16)) is not None:
        x = torch.randn(2048, _WEIGHT_SIZE, device=device, dtype=torch.bfloat16)
        weight = torch.ones(_WEIGHT_SIZE, device=device, dtype=torch.bfloat16)
        ours = partial(kernels.rms_norm, x, weight, 1e-6, offset=0.0, in_fp32=False)
        theirs = partial(torch.nn.functional.rms_norm, x, (_WEIGHT_SIZE,), weight, 1e-6)
        answer["norm_ms"] = [round(probe.milliseconds(norm), 4) for norm in (ours, theirs)]
    return answer


def out_of_memory(probe: Probe) -> Answer:
    """What torch raises on a full GPU, for a tensor and for a product, and whether it is recognized."""
    if not probe.on_gpu:
        return {"skipped": "memory runs out for real on a GPU only"}
    held: list[torch.Tensor] = []

    def fill() -> None:
        while True:
            held.append(torch.empty(_FILL_BYTES, dtype=torch.uint8, device=probe.device))

    def multiply() -> None:
        # Nearly full: a product may find no memory for its workspace.
        held.pop()
        matrix = torch.randn(8192, 8192, device=probe.device, dtype=torch.bfloat16)
        while True:
            held.append(matrix @ matrix)

    answer: Answer = {}
    for name, call in (("tensor", fill), ("product", multiply)):
        try:
            call()
        except Exception as error:
            answer[name] = {
                "type": type(error).__name__,
                "recognized": is_out_of_memory(error),
                "message": str(error)[:200],
            }
    held.clear()
    probe.free_memory()
    return answer
