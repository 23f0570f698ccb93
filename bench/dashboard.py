"""What the live screen costs: bytes and processor a second while a run takes a step a second.

    python -m bench.dashboard [--seconds N] [--json]

A writer plays the trainer (a step, a telemetry sample and a heartbeat a second), so that only the screen is
measured. Budgets: 5 % of one core and 3 kB/s at 80×24.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.terminal import Terminal

SIZES = ((80, 24), (160, 50))
_STEPS_BEFORE = 1200
_SETTLED_S = 4.0


def main() -> int:
    """Measure at both sizes, quiet and live; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = str(Path(home) / kind.lower())
        trainer = PlayedTrainer()
        for columns, lines in SIZES:
            for live in (False, True):
                rows.append(measure(trainer, columns, lines, live, args.seconds))
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(
            f"{row['size']:>7} {row['run']:<6} {row['bytes_per_s']:8,.0f} bytes/s  "
            f"{row['cpu_percent']:5.1f} % of a core  {row['memory_mb']:.0f} MB"
        )
    return 0


def measure(
    trainer: PlayedTrainer, columns: int, lines: int, live: bool, seconds: float
) -> dict[str, object]:
    """One size; ``live`` with a step a second, else with nothing happening."""
    command = [sys.executable, "-m", "qlora_tui"]
    with Terminal(command, columns=columns, rows=lines) as terminal:
        terminal.wait_for("Train")
        terminal.watch(_SETTLED_S)
        terminal.press("5")
        terminal.watch(_SETTLED_S)
        stop = threading.Event()
        thread = threading.Thread(target=trainer.play, args=(stop,), daemon=True)
        if live:
            thread.start()
            terminal.watch(2.0)
        before = terminal.cpu_s()
        painted = terminal.watch(seconds)
        used = terminal.cpu_s() - before
        stop.set()
        return {
            "size": f"{columns}x{lines}",
            "run": "live" if live else "quiet",
            "bytes_per_s": painted / seconds,
            "cpu_percent": 100 * used / seconds,
            "memory_mb": terminal.memory_bytes() / 1e6,
        }


class PlayedTrainer:
    """Writes what a trainer would."""

    def __init__(self) -> None:
        from qlora_tui.recipe.schema import Data, Model, Recipe, Source
        from qlora_tui.runs.directory import create
        from qlora_tui.runs.events import DataReady, PhaseChanged, Started
        from qlora_tui.runs.log import EventWriter

        recipe = Recipe(model=Model(id="bench/model"), data=Data(sources=(Source(path="rows.jsonl"),)))
        self._run = create(recipe)
        self._log = EventWriter(self._run.events_path)
        self._luck = random.Random(1)
        self._step = 0
        now = time.time()
        self._log.append(Started(at=now, attempt=1, pid=os.getpid()))
        self._log.append(
            DataReady(
                at=now,
                samples=4800,
                validation_samples=240,
                tokens=3_000_000,
                trained_tokens=1_000_000,
                rows=1600,
                steps_per_epoch=1500,
                total_steps=3000,
                data_hash="0",
            )
        )
        self._log.append(PhaseChanged(at=now, phase="training"))
        for before in range(_STEPS_BEFORE, 0, -1):
            self._tell(now - before)

    def play(self, stop: threading.Event) -> None:
        """A step a second until stopped."""
        while not stop.wait(1.0):
            self._tell(time.time())

    def _tell(self, at: float) -> None:
        from qlora_tui.gpu.reading import Reading
        from qlora_tui.runs.events import Step
        from qlora_tui.runs.process import mark
        from qlora_tui.runs.status import Status, write_status
        from qlora_tui.runs.telemetry import Sample, encode

        self._step += 1
        luck, step = self._luck, self._step
        loss = 1.2 + 1.5 * 0.997**step + luck.gauss(0, 0.1)
        self._log.append(
            Step(
                at=at,
                step=step,
                epoch=step / 1500,
                loss=loss,
                learning_rate=2e-4 * (1 - step / 3000),
                grad_norm=abs(luck.gauss(0.4, 0.1)),
                tokens=step * 3000,
                tokens_per_s=luck.gauss(2300, 40),
            )
        )
        reading = Reading(
            at=at,
            index=0,
            utilization_percent=min(100, round(luck.gauss(96, 3))),
            memory_used_bytes=19_500_000_000,
            memory_total_bytes=25_700_000_000,
            power_w=luck.gauss(310, 15),
            power_limit_w=450.0,
            temperature_c=round(luck.gauss(61, 1)),
            sm_clock_mhz=2520,
            throttle=(),
        )
        with self._run.telemetry_path.open("ab") as file:
            file.write(encode(Sample(at=at, rss_bytes=3_200_000_000, cpu_percent=104.0, gpu=reading)))
        write_status(
            self._run,
            Status(
                state="running",
                at=at,
                process=mark(),
                phase="training",
                step=step,
                total_steps=3000,
                loss=loss,
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
