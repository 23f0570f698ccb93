"""The steps of a learning-rate range test: those of a run's trainer, at a rate that rises exponentially."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_tui.runs.lr_range import LrRange, RangeSettings, RangeStep, has_diverged, write_lr_range
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.memory_probe import probe_longest_batch
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.step_dataset import StepData
from qlora_tui.training.trainer import RunTrainer
from qlora_tui.worker_messages import send_progress


class RangeTrainer(RunTrainer):
    """Trains at the rates of a test; ``settings`` must be set before :meth:`train`."""

    settings = RangeSettings()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Create the schedule of the test; the optimizer's rate is the lowest one."""
        scheduled: Any = self.optimizer if optimizer is None else optimizer
        settings = self.settings
        self.lr_scheduler = LambdaLR(scheduled, lambda step: settings.rate(step) / settings.low)
        return self.lr_scheduler

    def loss_of(self, data: StepData) -> float:
        """Return the mean loss of a step's data, without training on it."""
        total = 0.0
        for batch in data["micro_batches"]:
            total += float(self.summed_loss(self.model_wrapped, batch, data.get("token_share", 1.0)))
        return total / (data["loss_weight_sum"] or 1)


class RangeCallback(TrainerCallback):
    """Records the steps of a test in its file, and ends it where the loss diverges.

    Args:
        path: the file.
        lr_range: the test without steps.
    """

    def __init__(self, prepared: PreparedRun, trainer: RangeTrainer, path: Path, lr_range: LrRange) -> None:
        self._prepared = prepared
        self._trainer = trainer
        self._path = path
        self._lr_range = lr_range
        self._untrained: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe memory as a run does, then compute the loss of each batch without training."""
        probe_longest_batch(self._prepared, self._trainer)
        steps = self._trainer.steps
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), no_grad_eval(self._trainer.model):
            for number in range(len(steps)):
                self._untrained.append(self._trainer.loss_of(steps[number]))
                send_progress(number + 1, 2 * len(steps))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a step."""
        if logs is None or "loss" not in logs:
            return
        loss, number, total = logs["loss"], state.global_step, len(self._untrained)
        step = RangeStep(
            rate=logs["learning_rate"],
            loss=loss if math.isfinite(loss) else None,
            untrained=self._untrained[number - 1],
        )
        steps = (*self._lr_range.steps, step)
        self._lr_range = structs.replace(
            self._lr_range,
            steps=steps,
            seconds=time.time() - self._lr_range.measured_at,
            diverged=has_diverged(steps),
        )
        write_lr_range(self._path, self._lr_range)
        send_progress(total + number, 2 * total)
        if self._lr_range.diverged:
            control.should_training_stop = True
