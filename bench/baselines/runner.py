"""Measures one trainer from outside: its speed, its memory, its losses."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench.baselines.job import TrainingJob

T = TypeVar("T")
LOOK_EVERY_S = 0.01
"""Seconds between two measurements of a process's memory."""


@dataclass
class Measurement:
    """Figures of one training."""

    tokens: int = 0
    """Trained tokens, without padding."""
    tokens_per_s: float = 0.0
    """Tokens per second (without padding) from the end of the first step to the end of the last."""
    tokens_per_cpu_s: float = 0.0
    """Tokens per second of CPU time, which other load on the machine hardly changes."""
    trained_per_s: float = 0.0
    """Tokens in the loss per second, from the end of the first step to the end of the last."""
    losses: list[float] = field(default_factory=list)
    """Training loss by step."""
    grad_norms: list[float] = field(default_factory=list)
    """Norm of the whole gradient by step, before clipping, if the trainer reports it."""
    data_hash: str = ""
    """Digest of all tokens and labels, if the trainer reports it."""
    growth_bytes: int = 0
    """Peak memory in training, minus the memory of the loaded model."""
    peak_bytes: int = 0
    """On a GPU: peak of allocated memory, including the model."""
    estimated_bytes: int = 0
    """Estimated memory, if the trainer estimates it."""
    process_bytes: int = 0
    """On a CPU, to compare with ``estimated_bytes``: largest resident set, including the model."""
    evaluated: dict[int, float] = field(default_factory=dict)
    """Validation loss by step, if the trainer evaluates."""


def in_turn(ways: Iterable[T], repeat: int) -> list[T]:
    """Return the trainers, reversed in every second repeat, so that gradual changes affect all alike."""
    forward = list(ways)
    return forward if repeat % 2 == 0 else forward[::-1]


class Growth:
    """Measures by how much a process's resident set grows beyond its size at the beginning."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._base = self._most = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with suppress(psutil.Error):
            while not self._ended.wait(LOOK_EVERY_S):
                self._most = max(self._most, self._process.memory_info().rss)

    def end(self) -> int:
        """Stop measuring; return the largest growth in bytes."""
        self._ended.set()
        self._thread.join()
        return self._most - self._base


def lines_of(python: str, module: str, arguments: Sequence[str], log: Path) -> Iterator[dict[str, Any]]:
    """Yield a program's events as it prints them. Raises SystemExit if it fails."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"event"'):
                yield json.loads(line)
        if process.wait() != 0:
            raise SystemExit(f"{module} failed with exit code {process.returncode}; its words are in {log}")


def measure(python: str, way: str, job: TrainingJob, scratch: Path) -> Measurement:
    """Train once with a trainer, which is a module of :mod:`bench.baselines`, and return the figures."""
    result = Measurement()
    first = last = None
    growth: Growth | None = None
    process: psutil.Process | None = None
    cpu_s: list[tuple[int, float]] = []
    """Tokens and CPU seconds at a step."""
    held = 0
    name = Path(job.out).name
    file = job.write(scratch / f"{name}.json")
    for line in lines_of(python, f"bench.baselines.{way}", [str(file)], scratch / f"{name}.log"):
        match line["event"]:
            case "loaded":
                growth = Growth(line["pid"])
                process = psutil.Process(line["pid"])
                held = line.get("allocated", 0)
            case "step":
                last = line
                first = first or line
                result.losses.append(line["loss"])
                if process is not None:
                    # A short run may have ended before this line is read.
                    with suppress(psutil.NoSuchProcess):
                        used = process.cpu_times()
                        cpu_s.append((line["tokens"], used.user + used.system))
                if "grad_norm" in line:
                    result.grad_norms.append(line["grad_norm"])
            case "data":
                result.data_hash = line["hash"]
            case "evaluated":
                result.evaluated[line["step"]] = line["loss"]
            case "peak" if line["allocated"]:
                result.peak_bytes = line["allocated"]
                result.growth_bytes = line["allocated"] - held if held else 0
                result.estimated_bytes = line.get("estimated", 0)
            case "peak":
                result.process_bytes, result.estimated_bytes = line["process"], line["estimated"]
    if growth is not None and not result.peak_bytes:
        result.growth_bytes = growth.end()
    if first is None or last is None or first is last:
        raise SystemExit(f"{way} took fewer than two steps; its words are in {scratch}")
    result.tokens = last["tokens"]
    seconds = last["at"] - first["at"]
    result.tokens_per_s = (last["tokens"] - first["tokens"]) / seconds
    if cpu_s and cpu_s[-1][1] > cpu_s[0][1]:
        tokens, used_s = (after - before for before, after in zip(cpu_s[0], cpu_s[-1], strict=True))
        result.tokens_per_cpu_s = tokens / used_s
    result.trained_per_s = (last["trained"] - first["trained"]) / seconds
    return result
