"""Tests model types in separate processes, which are forked after the imports."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec

from bench.model_types.estimates import compare_estimate
from bench.model_types.outcome import Walked
from bench.model_types.walk import walk

_PROCESSES = 2
_LIMIT_S = 600
"""Seconds that a type may take, on a machine with other load."""
_PRELOAD = [
    "torch", "peft", "bitsandbytes", "datasets", "transformers.models.auto.modeling_auto",
    "qlora_tui.training.attempt", "qlora_tui.training.supervisor", "qlora_tui.export.merge",
    "qlora_tui.chat.loading", "qlora_tui.engine.trace_worker", "bench.model_types.walk",
]  # fmt: skip


def all_types() -> list[str]:
    """Return all types that transformers builds as a causal language model, with or without images."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted({*causal, *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def walk_all(types: Sequence[str], method: str, only: str | None = None) -> Iterator[Walked]:
    """Test model types in separate processes, which are forked after the imports; yield the results.

    Args:
        types: The model types, in order.
        method: Quantization of the models that are trained.
        only: ``walk`` or ``estimate``, to omit the other.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    waiting, running = list(reversed(types)), dict[Connection, tuple[str, Any, float]]()
    while waiting or running:
        while waiting and len(running) < _PROCESSES:
            model_type = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_walk_in, args=(model_type, method, only, theirs))
            process.start()
            theirs.close()
            running[ours] = (model_type, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for connection, (model_type, process, started) in list(running.items()):
            if connection in ready:
                try:
                    yield msgspec.json.decode(connection.recv_bytes(), type=Walked)
                except EOFError:
                    process.join()
                    yield Walked(model_type=model_type, verdict="wrong", reason=f"exit {process.exitcode}")
            elif time.monotonic() - started > _LIMIT_S:
                process.kill()
                yield Walked(model_type=model_type, verdict="wrong", reason=f"not done after {_LIMIT_S} s")
            else:
                continue
            process.join()
            del running[connection]


def describe_here(configs: Sequence[Any], should_stop: Any) -> list[Any]:
    """Describe configs in this process, which has done its imports, instead of in another one."""
    from qlora_tui.catalog import described
    from qlora_tui.training import description

    descriptions = [description._describe_within_limits(config) for config in configs]
    for config, each in zip(configs, descriptions, strict=True):
        described.keep(config, each)
    return descriptions


def _walk_in(model_type: str, method: Any, only: str | None, connection: Connection) -> None:
    """Test one model type in its own folders."""
    import torch
    from transformers.utils import logging

    from qlora_tui.catalog import described
    from qlora_tui.training import attempt

    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its own
    vars(attempt)["lower_priority"] = lambda: None
    vars(described)["_describe"] = describe_here
    with tempfile.TemporaryDirectory(prefix="model-types-") as folder:
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = f"{folder}/{kind.lower()}"
        log = os.open(os.environ.get("WALK_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        walked = Walked(model_type=model_type, verdict="trained")
        if only != "estimate":
            walked = walk(model_type, Path(folder), method)
        if only != "walk" and walked.verdict == "trained":
            walked.estimate = compare_estimate(model_type)
        connection.send_bytes(msgspec.json.encode(walked))
