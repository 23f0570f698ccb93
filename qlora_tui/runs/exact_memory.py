"""Exact memory estimates: a child process traces a training step, and the trace is stored on disk.

A trace takes seconds, most of them for imports, so the child stays alive for a while. Its CPU time and memory
are limited, because it processes a ``config.json`` that cannot be trusted. A trace depends on the config, the
settings that change memory, the code paths, and the versions of the libraries; these form the key of the
trace in the cache folder. Loads no torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from threading import Lock, Thread
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import __version__
from qlora_tui.answer_cache import AnswerCache
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import load_model_config
from qlora_tui.data.confined import Confined, KilledError
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.recording import StepTrace
from qlora_tui.memory.traces import remember, traced_execution, traced_settings
from qlora_tui.recipe.schema import Recipe

KIND = "traces"
"""Name of the cache folder."""
MAX_FILES = 500
"""Maximum number of stored traces, which take about 20 KB each."""
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_CPU_S = 120.0
"""CPU time limit of a trace. A model with 100 layers takes 5 s; many experts take several times as long."""
_MEMORY_BYTES = 4 << 30
_WORKER = "qlora_tui.engine.trace_worker"
_NICENESS = 10
_one_at_a_time = Lock()
_cache = AnswerCache(KIND, StepTrace, max_bytes=16 << 20)


def _give_way() -> None:
    """Lower the priority of this process, so that a training run gets the CPU first."""
    os.nice(_NICENESS)


_child = Confined(_WORKER, cpu_s=_CPU_S, memory_bytes=_MEMORY_BYTES, prepare=_give_way)


class TraceRequest(Struct, kw_only=True, frozen=True):
    """A step to trace."""

    config: dict[str, Any]
    """The model's ``config.json``."""
    recipe: Recipe
    execution: ExecutionConfig
    """The code paths, and the device whose kernels are imitated."""
    room_bytes: int | None = None
    """The most memory that the GPU's allocator can take; None for no limit. Before it takes more, it releases
    free segments, unless its segments are expandable.
    """


class TraceStopped(Exception):
    """A trace was abandoned because its result is no longer needed."""


def trace_step(
    config: dict[str, Any],
    recipe: Recipe,
    execution: ExecutionConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepTrace:
    """Return the traced step of a recipe, from the cache or from a new trace, which takes seconds.

    ``should_stop`` is called once, after other traces have ended and before this one starts.

    Raises:
        TraceStopped: ``should_stop`` returned true.
        UserError: The libraries cannot build the model or run it without values, or the child exceeded its
            limits.
    """
    request = trace_request(config, recipe, execution)
    with _one_at_a_time:
        stored = _cache.find(_key(request))
        if stored is not None:
            return stored
        if should_stop():
            raise TraceStopped
        traced = _trace(request)
    _cache.keep(_key(request), traced, MAX_FILES)
    return traced


def trace_all(
    config: dict[str, Any],
    recipes: Iterable[Recipe],
    architecture: Architecture,
    device: Device,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trace the steps of those recipes that ``device`` has no trace of. All later estimates use the traces.

    Returns whether anything was traced. Raises the errors of :func:`trace_step`.
    """
    is_news = False
    for recipe in recipes:
        execution = trainer_execution(recipe, device, architecture)
        if device.traces.find(recipe, architecture, execution) is None:
            remember(recipe, architecture, execution, trace_step(config, recipe, execution, should_stop))
            is_news = True
    return is_news


def trace_soon(
    config: dict[str, Any], recipe: Recipe, execution: ExecutionConfig, seconds: float
) -> StepTrace | None:
    """Return the traced step of a recipe if it is available within ``seconds``; None if not, or if tracing
    fails.

    A trace that takes longer is stored for a later call. With 0 seconds, only the cache is read.
    """
    stored = stored_trace(config, recipe, execution)
    if stored is not None or not seconds:
        return stored
    found: list[StepTrace] = []

    def run() -> None:
        with suppress(UserError):
            found.append(trace_step(config, recipe, execution))

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def recall_trace(recipe: Recipe, architecture: Architecture, device: Device) -> bool:
    """Let all estimates use the cached trace of this recipe; return whether this added a trace."""
    execution = trainer_execution(recipe, device, architecture)
    if device.traces.find(recipe, architecture, execution) is not None:
        return False
    with suppress(UserError):
        stored = stored_trace(load_model_config(recipe.model.id), recipe, execution)
        if stored is not None:
            remember(recipe, architecture, execution, stored)
            return True
    return False


def stored_trace(config: dict[str, Any], recipe: Recipe, execution: ExecutionConfig) -> StepTrace | None:
    """Return the traced step of a recipe from the cache; None if it is not there."""
    return _cache.find(_key(trace_request(config, recipe, execution)))


def trace_request(config: dict[str, Any], recipe: Recipe, execution: ExecutionConfig) -> TraceRequest:
    """Return the trace request of a recipe, with only those settings that change memory."""
    return TraceRequest(config=config, recipe=traced_settings(recipe), execution=traced_execution(execution))


def _trace(request: TraceRequest) -> StepTrace:
    try:
        return _child.call(_in_child, request)
    except (KilledError, MemoryError) as error:
        raise UserError(
            "The step could not be traced",
            what=f"The tracing process ended early: {error or 'it takes too much memory'}.",
            why=f"The process is limited to {_CPU_S:.0f} s of processor time and "
            f"{_MEMORY_BYTES >> 30} GiB of memory.",
            fix="The instant estimate is still valid.",
        ) from error


def _in_child(request: TraceRequest) -> StepTrace:
    traced: StepTrace = importlib.import_module(_WORKER).trace(request)
    return traced


def _key(request: TraceRequest) -> bytes:
    return msgspec.json.encode((__version__, _versions(), request), order="deterministic")


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    found = []
    for library in _LIBRARIES:
        try:
            found.append(version(library))
        except PackageNotFoundError:
            found.append("")
    return tuple(found)
