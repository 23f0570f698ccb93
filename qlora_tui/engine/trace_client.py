"""Starts the job that traces a step with torch, in a process of its own. Loads no torch."""

from __future__ import annotations

import asyncio
from threading import Event
from typing import Any

from msgspec import Struct

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.step import StepTrace, check_traceable
from qlora_tui.recipe.schema import Recipe
from qlora_tui.worker import run_job


class TraceRequest(Struct, kw_only=True):
    """The step to trace."""

    config: dict[str, Any]
    """The model's ``config.json``."""
    recipe: Recipe
    device: str = "cuda"
    """Device whose kernels to imitate: ``cuda`` or ``cpu``."""
    loss: str = "chunked"
    """``chunked`` (this project's) or ``stock`` (transformers', over all logits)."""
    dtype: str = "bfloat16"
    varlen: bool = True
    """Whether all samples of a packed sequence are attended in one call."""


async def trace_step(config: dict[str, Any], recipe: Recipe, device: Device) -> StepTrace:
    """Count the memory of one step of ``recipe`` as this project's trainer runs it on ``device``.

    Takes seconds; the child ends when the task does.

    Raises UserError for a recipe that tracing does not support, or if the libraries cannot build the model.
    """
    execution = trainer_execution(recipe, device)
    check_traceable(recipe, execution)
    parse_architecture(config)
    request = TraceRequest(
        config=config,
        recipe=recipe,
        device=device.kind,
        dtype="bfloat16" if execution.compute_itemsize == 2 else "float32",
        varlen=execution.varlen,
    )
    stop = Event()
    try:
        return await asyncio.to_thread(
            run_job,
            "qlora_tui.engine.trace_worker:trace",
            request,
            result=StepTrace,
            title="The step could not be traced",
            subject="The tracing process",
            fix="Run `qlora-tui doctor` to check the installation.",
            should_stop=stop.is_set,
        )
    finally:
        # A canceled task leaves its thread, which then ends the process.
        stop.set()
