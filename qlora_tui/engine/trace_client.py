"""Client of the trace worker, a child process that loads torch, traces a step and exits. Loads no torch."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import subprocesses
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.engine.log_file import open_log, truncated_log
from qlora_tui.engine.protocol import Failure
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.step import StepTrace, check_traceable
from qlora_tui.recipe.schema import Recipe


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
    try:
        answer = msgspec.json.decode(await _answer(msgspec.json.encode(request)), type=StepTrace | Failure)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(
            "The step could not be traced",
            what="The tracing process did not answer.",
            fix=f"Its last output is in {truncated_log()}; `qlora-tui doctor` checks the installation.",
        ) from error
    if isinstance(answer, Failure):
        raise answer.problem()
    return answer


async def _answer(request: bytes) -> bytes:
    with open_log() as log:
        child = await asyncio.create_subprocess_exec(
            *subprocesses.module_argv("qlora_tui.engine.trace_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=subprocesses.subprocess_env(),
        )
    try:
        output, _ = await child.communicate(request)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
    return output
