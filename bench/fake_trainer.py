"""A fake trainer: it writes what one writes in a run, a step a second or faster, without training."""

from __future__ import annotations

import os
import random
import threading
import time

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import (
    CheckpointSaved,
    DataReady,
    Evaluated,
    PhaseChanged,
    SampleGenerated,
    Started,
    Step,
)
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from qlora_tui.runs.telemetry import Reading, encode

_MILESTONE = 200
"""Steps between evaluations, checkpoints and samples."""


class FakeTrainer:
    """A run of ``total`` steps, ``done`` of which lie behind it. Its own clock goes a second a step."""

    def __init__(self, done: int, total: int) -> None:
        self.step = 0
        self._total = total
        self._run = create_run(
            Recipe(model=Model(id="bench/model"), data=Data(sources=(Source(path="rows.jsonl"),)))
        )
        self._log = EventWriter(self._run.events_path)
        self._luck = random.Random(1)
        self._began = time.time() - done
        self._log.append(Started(at=self._began, attempt=1, pid=os.getpid()))
        self._log.append(
            DataReady(
                at=self._began,
                samples=4800,
                validation_samples=240,
                tokens=3_000_000,
                trained_tokens=1_000_000,
                rows=1600,
                steps_per_epoch=total // 2,
                total_steps=total,
                data_hash="0",
            )
        )
        self._log.append(PhaseChanged(at=self._began, phase="training"))
        self.take(done)

    def play(self, stop: threading.Event) -> None:
        """A step a second until stopped."""
        while not stop.wait(1.0):
            self.take(1)

    def take(self, steps: int) -> None:
        """So many steps at once."""
        for _ in range(steps):
            self.step += 1
            self._tell_step()
            if self.step % _MILESTONE == 0:
                self._tell_milestone()
        write_status(
            self._run,
            Status(
                state="running",
                at=time.time(),
                process=process_identity(),
                phase="training",
                step=self.step,
                total_steps=self._total,
            ),
        )

    @property
    def _at(self) -> float:
        return self._began + self.step

    def _loss(self) -> float:
        return 1.2 + 1.5 * 0.997**self.step

    def _tell_step(self) -> None:
        luck, step = self._luck, self.step
        self._log.append(
            Step(
                at=self._at,
                step=step,
                epoch=2 * step / self._total,
                loss=self._loss() + luck.gauss(0, 0.1),
                learning_rate=2e-4 * (1 - step / self._total),
                grad_norm=abs(luck.gauss(0.4, 0.1)),
                tokens=step * 3000,
                tokens_per_s=luck.gauss(2300, 40),
            )
        )
        reading = GpuMetrics(
            at=self._at,
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
        sample = Reading(at=self._at, rss_bytes=3_200_000_000, cpu_percent=104.0, gpu=reading)
        with self._run.telemetry_path.open("ab") as file:
            file.write(encode(sample))

    def _tell_milestone(self) -> None:
        at, step = self._at, self.step
        self._log.append(Evaluated(at=at, step=step, loss=self._loss() + 0.05, best=True))
        self._log.append(CheckpointSaved(at=at, step=step, folder=f"checkpoints/step-{step}"))
        self._log.append(
            SampleGenerated(
                at=at, step=step, prompt="My parcel is late.", answer="I am sorry. I will look.\n" * 3
            )
        )
