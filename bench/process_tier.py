"""The process tier on a CPU: estimated beside measured, on real models, for the first and the second run.

    python -m bench.process_tier --model MODEL… --data FILE [--cell NAME…] [--steps 12] [--json]

Each cell is a model, a quantization method and a set of settings. It gets empty state and cache directories,
in which two runs are trained one after the other by the program's own trainer: the first one converts a GGUF
file and tokenizes, the second one finds both done. The figures:

``measured``   the trainer's largest resident set (``MemoryMeasured`` at the end of the run)
``recipe``     the estimate of the recipe, without any correction: rows as long as ``data.max_length``
``run``        the estimate of the run's longest micro-batch, which is what learned corrections compare
``anonymous``  of the resident set at its largest, what is no page of a file; by ``at``, the phase it was in
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui import subprocesses
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.memory import estimate
from qlora_tui.memory.budget import budget_for
from qlora_tui.memory.calibration import load_runs
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.presets import find_preset
from qlora_tui.recipe.schema import Model, Quantization, Recipe, Source
from qlora_tui.runs import actions
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Failed, MemoryMeasured
from qlora_tui.runs.status import read_status

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu-demo": {},
    "512": {"data.max_length": 512},
    "1024": {"data.max_length": 1024},
    "512 x 2": {"data.max_length": 512, "training.micro_batch_size": 2},
    "512 x 2 unpacked": {"data.max_length": 512, "training.micro_batch_size": 2, "data.packing": False},
    "1024 checkpointing": {"data.max_length": 1024, "training.gradient_checkpointing": "on"},
}
METHODS = ("nf4", "none")
LOOK_EVERY_S = 0.02


@dataclass
class Cell:
    """One run of one cell, in bytes."""

    model: str
    method: str
    settings: str
    run: int
    """1 for the first in fresh directories."""
    measured_bytes: int
    recipe_bytes: int
    run_bytes: int
    anonymous_bytes: int
    peak_phase: str
    phases: dict[str, tuple[int, int]]
    """Largest resident set, and the anonymous part of it, by phase."""
    items: dict[str, int]
    """Of the estimate of the recipe."""

    @property
    def recipe_error(self) -> float:
        return self.recipe_bytes / self.measured_bytes - 1

    @property
    def run_error(self) -> float:
        return self.run_bytes / self.measured_bytes - 1


class Watch:
    """A process's resident set by phase of its run, looked at from outside."""

    def __init__(self, run: RunDir, pid: int) -> None:
        self.phases: dict[str, tuple[int, int]] = {}
        self._run, self._pid = run, pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No further look."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        status = Path(f"/proc/{self._pid}/status")
        while not self._ended.wait(LOOK_EVERY_S):
            with suppress(OSError, KeyError, ValueError):
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                resident, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
                at = read_status(self._run)
                phase = at.phase or at.state
                self.phases[phase] = max(self.phases.get(phase, (0, 0)), (resident, anonymous))


def main() -> int:
    """Measure the requested cells; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="GGUF files or models' folders")
    parser.add_argument("--data", required=True, help="a file of conversations")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cell", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--items", action="store_true", help="items of the estimate and the peak by phase, too"
    )
    args = parser.parse_args()
    cells = []
    for model in args.model:
        for method in args.method:
            for name in args.cell:
                recipe = recipe_for(str(Path(model).resolve()), args.data, method, SETTINGS[name], args.steps)
                with tempfile.TemporaryDirectory() as scratch:
                    for number in range(1, args.runs + 1):
                        cell = train(recipe, Path(scratch), name, number)
                        print(line_of(cell), file=sys.stderr, flush=True)
                        if args.items:
                            print(details(cell), file=sys.stderr, flush=True)
                        cells.append(cell)
    print(json.dumps([asdict(cell) for cell in cells]) if args.json else table(cells))
    return 0


def recipe_for(model: str, data: str, method: Any, settings: dict[str, Any], steps: int) -> Recipe:
    """The preset ``cpu-demo`` with these settings on it."""
    recipe = msgspec.structs.replace(
        find_preset("cpu-demo").recipe(),
        model=Model(id=model),
        quantization=Quantization(method=method),
    )
    source = (Source(path=str(Path(data).resolve())),)
    recipe = msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, sources=source))
    for key, value in {**settings, "training.max_steps": steps}.items():
        recipe = replace_setting(recipe, key, value)
    return recipe


def train(recipe: Recipe, scratch: Path, settings: str, number: int) -> Cell:
    """One run in the directories under ``scratch``. SystemExit where it fails."""
    for kind in ("STATE", "CACHE", "CONFIG"):
        os.environ[f"XDG_{kind}_HOME"] = str(scratch / kind.lower())
    run = actions.prepare(recipe)
    with run.log_path.open("wb") as log:
        trainer = subprocess.Popen(
            subprocesses.module_argv("qlora_tui.training", str(run.path)),
            env=subprocesses.subprocess_env(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(run, trainer.pid)
        trainer.wait()
        watch.end()
    events = EventTail(run.events_path).drain()
    ends = [event for event in events if isinstance(event, MemoryMeasured) and event.when == "end"]
    if not ends:
        failed = [event.what for event in events if isinstance(event, Failed)]
        raise SystemExit(f"{recipe.model.id}, {settings}: {failed or run.log_path.read_text()[-2000:]}")
    architecture = resolve_model(recipe.model.id).architecture
    # Without a correction: these directories have at most one run yet.
    predicted = estimate(recipe, architecture, device=replace(budget_for(None).device, correction=None))
    phase, (_, anonymous) = max(watch.phases.items(), key=lambda item: item[1])
    return Cell(
        model=Path(recipe.model.id).name,
        method=recipe.quantization.method,
        settings=settings,
        run=number,
        measured_bytes=ends[-1].measured_bytes,
        recipe_bytes=predicted.process_bytes,
        run_bytes=load_runs()[-1].predicted_process_bytes,
        anonymous_bytes=anonymous,
        peak_phase=phase,
        phases=watch.phases,
        items={item.key: item.bytes for item in predicted.items},
    )


MIB = 2**20


def line_of(cell: Cell) -> str:
    """One line of the table."""
    return (
        f"{cell.model:<34} {cell.method:<5} {cell.settings:<19} {cell.run}"
        f" {cell.measured_bytes / MIB:8,.0f} {cell.anonymous_bytes / MIB:8,.0f} {cell.peak_phase:<10}"
        f" {cell.recipe_bytes / MIB:7,.0f} {cell.recipe_error:+6.1%}"
        f" {cell.run_bytes / MIB:7,.0f} {cell.run_error:+6.1%}"
    )


def details(cell: Cell) -> str:
    """Peaks by phase, and the items of the estimate of the recipe, in MiB."""
    phases = ", ".join(
        f"{phase} {resident / MIB:,.0f} ({anonymous / MIB:,.0f})"
        for phase, (resident, anonymous) in cell.phases.items()
    )
    items = ", ".join(f"{key} {size / MIB:,.1f}" for key, size in cell.items.items())
    return f"    {phases}\n    {items}"


def table(cells: list[Cell]) -> str:
    """All of them, and the largest error of either estimate."""
    head = (
        f"{'model':<34} {'':<5} {'settings':<19} # {'measured':>8} {'anonymous':>8} {'at':<9}"
        f" {'recipe':>7} {'':>6} {'run':>7}"
    )
    worst = [max((getattr(cell, f"{of}_error") for cell in cells), key=abs) for of in ("recipe", "run")]
    return "\n".join(
        [head, *map(line_of, cells), f"largest error: recipe {worst[0]:+.1%}, run {worst[1]:+.1%} (MiB)"]
    )


if __name__ == "__main__":
    sys.exit(main())
