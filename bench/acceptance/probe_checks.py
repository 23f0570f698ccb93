"""Checks of single parts on this GPU: torch, NVML, bitsandbytes, Triton kernels, attention, a full memory.

Each check imports torch when it runs, so that the program that starts the checks holds no GPU memory.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.acceptance.context import CheckContext, CheckSkipped, Outcome
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe
from qlora_tui.recipe.training_settings import Training

_PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    *("triton", "liger-kernel", "trl", "unsloth"),
)
_WEIGHT_SIZE = 4096
_FILL_BYTES = 1 << 31
_ROW_TOKENS = 2048
_HEADS, _KEY_HEADS, _HEAD_WIDTH = 32, 8, 128
"""Attention heads, key heads and head size of an 8B Llama."""


def machine(context: CheckContext) -> Outcome:
    """Report versions, and check that torch's allocator grows its segments as the trainer requests."""
    torch = _torch()
    facts: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    # Triton compiles with it at run time.
    facts["c_compiler"] = bool(shutil.which("cc") or shutil.which("gcc"))
    facts["has_gpu"] = torch.cuda.is_available()
    if not facts["has_gpu"]:
        return Outcome("skipped", f"torch {facts['torch']} sees no GPU", facts)
    gpu = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    facts |= {
        "gpu": gpu.name,
        "gpu_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "visible_gpus": torch.cuda.device_count(),
        "expandable_segments": settings.get("expandable_segments"),
    }
    with suppress(GpuUnavailableError), Nvml() as driver:
        facts["driver"] = driver.list_gpus()[0].driver
    grows = "grows" if facts["expandable_segments"] else "does not grow"
    return Outcome(
        "ok",
        f"torch {facts['torch']} with CUDA {facts['cuda']} sees {facts['visible_gpus']} GPUs, the first "
        f"{gpu.name} with driver {facts.get('driver', 'unknown')}; the allocator {grows} its segments",
        facts,
    )


def context_memory(context: CheckContext) -> Outcome:
    """Measure a process's GPU memory outside torch's pool while cuBLAS works, and compare it with NVML."""
    torch = _torch_on_gpu(context)
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()

    def outside_pool(processes: Any) -> int | None:
        used = next((p.memory_bytes for p in processes or () if p.pid == os.getpid()), None)
        return None if used is None else (used - torch.cuda.memory_reserved()) >> 20

    with Nvml() as driver:
        index = default_cuda_device().index
        after_import = outside_pool(driver.read(index, processes=True).processes)
        ones = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
        ones @ ones
        torch.cuda.synchronize()
        reading = driver.read(index, processes=True)
    figures = {
        "context_mib": after_import,
        "with_cublas_mib": outside_pool(reading.processes),
        "workspace_mib": torch.cuda.memory_allocated() >> 20,
        "utilization_percent": reading.utilization_percent,
        "power_w": reading.power_w,
        "throttle": reading.throttle,
    }
    if after_import is None:
        return Outcome("ok", "NVML does not report the memory of this process", figures)
    return Outcome(
        "ok",
        f"a process takes {after_import} MiB besides its tensors, {figures['with_cublas_mib']} MiB with "
        f"cuBLAS, whose workspace takes {figures['workspace_mib']} MiB of the tensors",
        figures,
    )


def four_bit(context: CheckContext) -> Outcome:
    """Compare NF4 with the CPU, measure unpacking and products, and check that products are reproducible."""
    torch = _torch()
    with faster_imports():
        import bitsandbytes as bnb
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if context.has_gpu else "cpu"
    weight = (torch.randn(_WEIGHT_SIZE, _WEIGHT_SIZE) * 0.02).to(torch.bfloat16)
    nf4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    packed, state = quantize_4bit(weight.to(device), **nf4)
    on_cpu = dequantize_4bit(*quantize_4bit(weight, **nf4))
    unpack_ms = _milliseconds(context, lambda: dequantize_4bit(packed, state))
    difference = _relative_difference(dequantize_4bit(packed, state).cpu(), on_cpu)
    # For each weight, half a byte is read and two bytes are written.
    gb_s = weight.numel() * 2.5 / unpack_ms / 1e6
    times, not_repeated = {}, []
    for rows in (1, 16, 512, 2048) if context.has_gpu else (1,):
        x = torch.randn(rows, _WEIGHT_SIZE, device=device, dtype=torch.bfloat16)
        product = partial(bnb.matmul_4bit, x, packed, quant_state=state)
        times[f"{rows} rows"] = round(_milliseconds(context, product), 4)
        if not torch.equal(product(), product()):
            not_repeated.append(rows)
    repeats = f"products of {not_repeated} rows do not repeat" if not_repeated else "products repeat"
    return Outcome(
        "ok",
        f"NF4 differs from the CPU's by {difference:.2g}, unpacks {gb_s:.0f} GB/s; {repeats}: "
        + ", ".join(f"{name} in {ms} ms" for name, ms in times.items()),
        {"difference_from_cpu": difference, "unpack_gb_s": gb_s, "ms": times, "not_repeated": not_repeated},
    )


def triton_kernels(context: CheckContext) -> Outcome:
    """Check that Triton kernels compile and agree with torch; compare the speed of our norm with torch's."""
    torch = _torch_on_gpu(context)
    from qlora_tui.training.fused.kernel_choice import find_kernels, refusal_of_kernels, verify_kernels

    device, words = torch.device("cuda", torch.cuda.current_device()), []
    figures: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16):
        verify_kernels(device, dtype)
        refusal = refusal_of_kernels(device, dtype)
        figures[str(dtype)[6:]] = refusal or "used"
        words.append(f"refused in {dtype}: {refusal}" if refusal else f"used in {dtype}")
    if (kernels := find_kernels(device, torch.bfloat16)) is not None:
        x = torch.randn(2048, _WEIGHT_SIZE, device=device, dtype=torch.bfloat16)
        weight = torch.ones(_WEIGHT_SIZE, device=device, dtype=torch.bfloat16)
        ours = partial(kernels.rms_norm, x, weight, 1e-6, offset=0.0, in_fp32=False)
        theirs = partial(torch.nn.functional.rms_norm, x, (_WEIGHT_SIZE,), weight, 1e-6)
        figures["norm_ms"] = [round(_milliseconds(context, norm), 4) for norm in (ours, theirs)]
        words.append(f"a norm takes {figures['norm_ms'][0]} ms, {figures['norm_ms'][1]} ms in torch")
    return Outcome.of(figures["bfloat16"] == "used", "; ".join(words), figures)


def varlen_attention(context: CheckContext) -> Outcome:
    """Compare forward and backward of a packed sequence with one call per sample and in one call."""
    torch = _torch()
    tokens = _ROW_TOKENS if context.has_gpu else 32
    device = "cuda" if context.has_gpu else "cpu"
    figures: dict[str, Any] = {}
    words: list[str] = []

    def random(heads: int) -> Any:
        return torch.randn(
            1, heads, tokens, _HEAD_WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True
        )

    def by_sample(query: Any, key: Any, value: Any, lengths: list[int]) -> Any:
        split = (torch.split(x, lengths, dim=2) for x in (query, key, value))
        attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return torch.cat([attend(*part).transpose(1, 2) for part in zip(*split, strict=True)], 1)

    def in_one_call(query: Any, key: Any, value: Any, lengths: list[int]) -> Any:
        starts = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        longest, scale = max(lengths), query.shape[-1] ** -0.5
        return torch.ops.aten._flash_attention_forward(
            *rows, starts, starts, longest, longest, 0.0, True, False, scale=scale
        )[0][None]

    for samples in (1, 4, 8, 16):
        lengths = [tokens // samples] * samples
        inputs = random(_HEADS), random(_KEY_HEADS), random(_KEY_HEADS)
        seed = torch.randn(1, tokens, _HEADS, _HEAD_WIDTH, device=device, dtype=torch.bfloat16)
        results = []
        for name, attend in (("one by one", by_sample), ("in one call", in_one_call)):

            def gradients(attend: Any = attend, inputs: Any = inputs, lengths: Any = lengths) -> Any:
                output = attend(*inputs, lengths)
                return output, *torch.autograd.grad(output, inputs, seed)  # noqa: B023  # called at once

            try:
                results.append(gradients())
                milliseconds = round(_milliseconds(context, gradients), 3)
            except (RuntimeError, NotImplementedError) as error:
                figures[f"{samples}, {name}"] = str(error)[:120]
            else:
                figures[f"{samples}, {name}"] = milliseconds
                words.append(f"{samples} samples {name} take {milliseconds} ms")
        if len(results) == 2:
            differences = [_relative_difference(b, a) for a, b in zip(*results, strict=True)]
            figures[f"{samples}, differences"] = differences
    refused = {value for value in figures.values() if isinstance(value, str)}
    return Outcome("ok", "; ".join([*words, *(f"refused: {why}" for why in refused)]), figures)


def out_of_memory(context: CheckContext) -> Outcome:
    """Check that torch's exceptions on a full GPU are recognized, for a tensor and for a product."""
    torch = _torch_on_gpu(context)
    from qlora_tui.gpu.cuda_errors import is_out_of_memory

    held: list[Any] = []

    def fill() -> None:
        while True:
            held.append(torch.empty(_FILL_BYTES, dtype=torch.uint8, device="cuda"))

    def multiply() -> None:
        # Leave the GPU nearly full, so that a product may find no memory for its workspace.
        held.pop()
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        while True:
            held.append(matrix @ matrix)

    figures: dict[str, Any] = {}
    for name, call in (("tensor", fill), ("product", multiply)):
        try:
            call()
        except Exception as error:
            figures[name] = {
                "type": type(error).__name__,
                "recognized": is_out_of_memory(error),
                "message": str(error)[:200],
            }
    return Outcome.of(
        all(each["recognized"] for each in figures.values()),
        "; ".join(
            f"a {name} on a full GPU raises {each['type']}, {'' if each['recognized'] else 'not '}recognized"
            for name, each in figures.items()
        ),
        figures,
    )


def step(context: CheckContext) -> Outcome:
    """Measure speed and peak of a micro-batch with few and with many samples, every layer checkpointed."""
    torch = _torch()
    from qlora_tui.training import model as loading
    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.compute_device import choose_attention, find_device

    recipe = Recipe(
        model=Model(id=context.model),
        lora=Lora(rank=16, dropout=0.05),
        data=Data(max_length=_ROW_TOKENS),
        training=Training(micro_batch_size=1),
    )
    recipe = replace_setting(recipe, "training.gradient_checkpointing", "on")
    device, folder = find_device(recipe), Path(context.model)
    attention = choose_attention(recipe, device)
    base = loading.prepare_base(folder, recipe, device, attention, "chunked", weighted=False)
    model = add_lora(base.model, recipe.lora, resolve_model(context.model).architecture).train()
    loading.checkpoint_activations(base.model)
    figures: dict[str, Any] = {"attention": base.attention, "loss": base.loss_description}
    tokens = _ROW_TOKENS if context.has_gpu else 64
    words = []
    for samples in (1, 8, 16):
        run = partial(_micro_batch, model, [tokens // samples] * samples, device.torch_device)
        if context.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        speed = tokens / _milliseconds(context, run, repeats=8) * 1e3
        peak = torch.cuda.max_memory_allocated() / 2**30 if context.has_gpu else 0.0
        figures[f"{samples} samples"] = {"tokens_per_s": round(speed), "peak_gib": round(peak, 2)}
        words.append(f"{samples} samples {speed:,.0f} tokens/s, {peak:.2f} GiB")
    return Outcome("ok", f"rows of {tokens} tokens: {'; '.join(words)}", figures)


def _micro_batch(model: Any, lengths: list[int], device: Any) -> None:
    """Compute loss and gradients for a row of samples of these lengths, with every second token trained."""
    torch = _torch()
    from qlora_tui.training.batches import on_device
    from qlora_tui.training.loss import IGNORED, loss_positions

    # Use token ids that every vocabulary has.
    ids = torch.randint(3, 500, (1, sum(lengths)))
    labels = ids.clone()
    labels[:, ::2] = IGNORED
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "loss_positions": loss_positions(labels)}
    batch |= {"segments": lengths, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    model(**on_device(batch, device), num_items_in_batch=1).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def _torch() -> Any:
    with faster_imports():
        import torch
    return torch


def _torch_on_gpu(context: CheckContext) -> Any:
    if not context.has_gpu:
        raise CheckSkipped("there is no GPU")
    return _torch()


def _milliseconds(context: CheckContext, call: Callable[[], object], *, repeats: int = 20) -> float:
    """Return the median time of a call, after a few warm-up calls."""
    synchronize = _torch().cuda.synchronize if context.has_gpu else lambda: None
    repeats, warmup = (repeats, 3) if context.has_gpu else (2, 1)
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warmup:]) * 1e3


def _relative_difference(result: Any, reference: Any) -> float:
    """Return |result − reference| / |reference|, in float64."""
    expected = reference.double()
    return float((result.double() - expected).norm() / expected.norm())
