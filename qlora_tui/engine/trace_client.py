"""Starts the job that traces a step with torch, in a process of its own. Loads no torch."""

from __future__ import annotations

import asyncio
from threading import Event
from typing import Any

from msgspec import Struct

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.recording import StepTrace
from qlora_tui.recipe.schema import Recipe
from qlora_tui.worker import run_job


class TraceRequest(Struct, kw_only=True):
    """The step to trace."""

    config: dict[str, Any]
    """The model's ``config.json``."""
    recipe: Recipe
    execution: ExecutionConfig
    """The code that runs, and the device whose kernels are imitated."""
    room_bytes: int | None = None
    """What the allocator of a GPU can take, where its segments do not grow; None is unlimited."""


async def trace_step(config: dict[str, Any], recipe: Recipe, device: Device) -> StepTrace:
    """Count the memory of one step of ``recipe`` as this project's trainer runs it on ``device``.

    Takes seconds; the child ends when the task does.

    Raises UserError for a recipe that tracing does not support, or if the libraries cannot build the model.
    """
    execution = trainer_execution(recipe, device)
    parse_architecture(config)
    request = TraceRequest(config=config, recipe=recipe, execution=execution)
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
