"""Questions about one micro-batch of training: speed, memory, kernels, waits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.gpu_probe.probe import Answer, Probe
from bench.support.training_step import load_step_model
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Training

_ROWS = {"1 × 2048": [2048], "8 × 256": [256] * 8, "16 × 128": [128] * 16, "2 × 2048": [2048] * 2}
_CPU_ROWS = {"1 × 64": [64], "4 × 16": [16] * 4}


def step_small(probe: Probe) -> Answer:
    """0.5B, every layer checkpointed."""
    return _steps(probe, "0.5b")


def step_small_kept(probe: Probe) -> Answer:
    """0.5B, nothing recomputed."""
    return _steps(probe, "0.5b", training__gradient_checkpointing="off")


def step_large(probe: Probe) -> Answer:
    """8B, every layer checkpointed, no dropout."""
    return _steps(probe, "8b", lora__dropout=0.0)


def step_float16(probe: Probe) -> Answer:
    """0.5B in float16."""
    if not probe.on_gpu:
        return {"skipped": "float16 is for GPUs"}
    return _steps(probe, "0.5b", quantization__compute_dtype="float16")


def step_dora(probe: Probe) -> Answer:
    """0.5B with DoRA."""
    return _steps(probe, "0.5b", lora__use_dora=True)


def _steps(probe: Probe, size: str, **settings: Any) -> Answer:
    """Speed and peak of rows with few and many samples; on a GPU also kernels and waits."""
    folder = probe.model(size)
    recipe = Recipe(
        model=Model(id=str(folder)),
        lora=Lora(rank=16, dropout=0.05),
        data=Data(max_length=2048),
        training=Training(micro_batch_size=1, gradient_checkpointing="on"),
    )
    for key, value in settings.items():
        recipe = replace_setting(recipe, key.replace("__", "."), value)
    loaded = load_step_model(folder, recipe)
    answer: Answer = {"attention": loaded.base.attention, "loss": loaded.base.loss_description}
    for name, lengths in (_ROWS if probe.on_gpu else _CPU_ROWS).items():
        step = partial(loaded.run, lengths)
        milliseconds = probe.milliseconds(step, repeats=8)
        answer[name] = {
            "ms": round(milliseconds, 1),
            "tokens_per_s": round(sum(lengths) / milliseconds * 1e3),
        }
        if probe.on_gpu:
            answer[name]["above_model_gib"] = probe.peak_gib(step)
            answer[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if probe.on_gpu:
        answer["waits"] = probe.waits(partial(loaded.run, [512] * 4))
        answer["kernels"] = probe.kernels(partial(loaded.run, [256] * 8))
    return answer
