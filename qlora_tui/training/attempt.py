"""One attempt at a run, in three stages: prepare, train, finish."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.gpu.wsl import managed_memory_is_safe
from qlora_tui.runs.energy import JOULES_PER_KWH, EnergyMeter
from qlora_tui.runs.events import Finished, Paused, RunEnded, Stopped
from qlora_tui.training.answer_comparison import answer_validation, report_answers
from qlora_tui.training.callbacks import RunCallback
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.control_requests import StepAbandoned, StopRequested
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.final_adapter import load_best_weights, require_trained, write_adapter
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.preference.objective import PreferenceObjective
from qlora_tui.training.preference.preference_steps import PreferenceSteps
from qlora_tui.training.preparation import prepare_run
from qlora_tui.training.prepared_run import AttemptContext, PreparedRun
from qlora_tui.training.priority import lower_priority
from qlora_tui.training.step_dataset import StepDataset
from qlora_tui.training.telemetry_recorder import TelemetryRecorder
from qlora_tui.training.trainer import RunTrainer, training_arguments
from qlora_tui.training.validation_change import compare_validation

if TYPE_CHECKING:
    from qlora_tui.training.tracker import RunTracker


class TrainingAttempt:
    """One attempt at a run, from recipe to adapter."""

    def __init__(self, context: AttemptContext) -> None:
        self.meter: MemoryMeter | None = None
        """Set once the device is known; its estimate explains an out-of-memory error."""
        self._context = context
        self._tracker: RunTracker | None = None
        self._telemetry = TelemetryRecorder(context.run, context.reporter)

    def run(self) -> RunEnded:
        """Run all stages.

        Returns:
            The event that ends the run, to be emitted by the caller.

        Raises:
            Exception: whatever ended the attempt; a request to stop or pause is no error.
        """
        context = self._context
        try:
            return self._train(self._prepare())
        except StopRequested as request:
            step = context.checkpoint.step if context.checkpoint else 0
            ended = Paused if request.kind == "pause" else Stopped
            return ended(at=time.time(), step=step)
        except Exception as error:
            if self.meter is not None and context.dist.world_size == 1 and is_out_of_memory(error):
                self.meter.record(ran_out=True)
            raise
        finally:
            self._telemetry.stop()
            self._stop_tracking()

    def _prepare(self) -> PreparedRun:
        context = self._context
        recipe, dist = context.recipe, context.dist
        device = find_device(recipe, dist.local_rank)
        if device.kind == "cpu":
            lower_priority()
        dist.initialize(on_cpu=device.kind == "cpu")
        context.requests.raise_if_stop_requested()
        self._start_tracking()
        context.reporter.phase("loading", recipe.model.id)
        files = resolve_model(recipe.model.id)
        self.meter = MemoryMeter(recipe, files.architecture, device)
        if dist.is_main_process:
            self._telemetry.start(on_gpu=device.kind == "cuda")
        return prepare_run(context, files, device, self.meter)

    def _start_tracking(self) -> None:
        """Open the recipe's tracker, if it names one. Raises UserError where that is not installed."""
        context, report_to = self._context, self._context.recipe.training.report_to
        if report_to == "none" or not context.dist.is_main_process:
            return
        # Only here: an integration loads its tracker, and that the network.
        from qlora_tui.training.tracker import RunTracker, describe_failure

        def report_failure(error: Exception) -> None:
            context.reporter.health("tracker_failed", *describe_failure(report_to, error))

        self._tracker = RunTracker(context.run, context.recipe, report_failure)
        self._tracker.start()
        context.reporter.observer = self._tracker.observe

    def _stop_tracking(self) -> None:
        self._context.reporter.observer = lambda event: None
        if self._tracker is not None:
            self._tracker.close()

    def _train(self, prepared: PreparedRun) -> RunEnded:
        checkpoint = prepared.checkpoint
        trainer = _create_trainer(prepared)
        if prepared.device.kind == "cuda" and not managed_memory_is_safe():
            prepared.reporter.log("WSL2: optimizer states are not paged; they stay in the GPU's memory.")
        callback = RunCallback(prepared, trainer)
        trainer.add_callback(callback)
        tokens_before = trainer.tokens
        is_abandoned = False
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        except StepAbandoned:
            # Saved after this block, when the exception no longer holds the activations of the step.
            is_abandoned = True
        if is_abandoned:
            callback.abandon_step()
        seconds = callback.training_seconds()
        return self._finish(prepared, trainer, callback, seconds, trainer.tokens - tokens_before)

    def _finish(
        self, prepared: PreparedRun, trainer: RunTrainer, callback: RunCallback, seconds: float, tokens: int
    ) -> RunEnded:
        """Write the adapter. ``seconds`` and ``tokens`` are what this attempt spent and trained on."""
        run, recipe, reporter = prepared.run, prepared.recipe, prepared.reporter
        step = trainer.state.global_step
        reporter.emit(prepared.meter.measure("end"))
        if prepared.dist.world_size == 1:
            prepared.meter.record()
        if callback.outcome == "paused":
            return Paused(at=time.time(), step=step)
        reporter.phase("saving", "adapter")
        reason, best_step = callback.reason, callback.progress.best_step
        keeps_best = recipe.training.early_stopping and callback.outcome == "finished"
        if keeps_best and best_step is not None and best_step != step:
            reason = f"{reason}; {load_best_weights(run, trainer.model, best_step)}"
        if callback.outcome == "finished":
            require_trained(
                trainer.model, callback.progress.initial_weights, step, callback.overflow_monitor.skipped
            )
        checksums = ""
        if prepared.dist.is_main_process:
            checksums = write_adapter(
                run,
                trainer.model,
                recipe,
                prepared.base.folder,
                prepared.tokenizer,
                from_hub=prepared.files.source == "hub cache",
            )
        if callback.outcome == "stopped":
            return Stopped(at=time.time(), step=step, checksums=checksums)
        # Before the next, which may put the weights of the start into the model.
        answers = answer_validation(prepared, trainer.model, seconds)
        report_answers(prepared, answers, compare_validation(prepared, trainer.model))
        self._telemetry.stop()
        energy = EnergyMeter(run.telemetry_path)
        energy.read_all()
        # The energy is that of one GPU, so with several it cannot be divided by all tokens.
        kwh = energy.kwh if prepared.dist.world_size == 1 else None
        return Finished(
            at=time.time(),
            step=step,
            seconds=seconds,
            tokens_per_s=tokens / max(seconds, 1e-9),
            reason=reason,
            energy_kwh=energy.kwh,
            tokens_per_joule=trainer.tokens / (kwh * JOULES_PER_KWH) if kwh else None,
            checksums=checksums,
        )


def _create_trainer(prepared: PreparedRun) -> RunTrainer:
    recipe = prepared.recipe
    objective = PreferenceObjective.of(recipe, prepared.starting_adapter)
    steps = _answer_steps(prepared) if objective is None else PreferenceSteps(prepared)
    arguments = training_arguments(
        recipe, prepared.device, len(prepared.step_plan.steps), prepared.run.checkpoints_dir
    )
    return RunTrainer(prepared.model, arguments, steps, recipe.training, objective)


def _answer_steps(prepared: PreparedRun) -> StepDataset:
    return StepDataset(
        prepared.step_plan,
        prepared.samples,
        micro_batch=prepared.recipe.training.micro_batch_size,
        padding_free=prepared.base.padding_free,
        pad_id=prepared.pad_id,
        multiple=prepared.device.row_multiple,
        rank=prepared.dist.rank,
        world_size=prepared.dist.world_size,
    )
