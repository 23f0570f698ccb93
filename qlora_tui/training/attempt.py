"""One attempt at a run, from recipe to adapter: set up, train, finish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.gpu.torch_env import managed_memory_is_safe
from qlora_tui.runs.events import Finished, Paused, RunEnded, Stopped
from qlora_tui.runs.telemetry import JOULES_PER_KWH, EnergyMeter
from qlora_tui.training.adapter import load_best_weights, require_trained, write_adapter
from qlora_tui.training.answer_comparison import answer_validation, report_answers
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.control_requests import StopRequested
from qlora_tui.training.evaluation import compare_validation
from qlora_tui.training.host import lower_priority
from qlora_tui.training.loop import Loop
from qlora_tui.training.memory_meter import largest
from qlora_tui.training.reporter import TelemetryRecorder
from qlora_tui.training.run import Run
from qlora_tui.training.setup import setup


def run_attempt(run: Run) -> RunEnded:
    """Set up, train and finish.

    Returns:
        The event that ends the run, which the caller emits.

    Raises:
        Exception: the error that ended the attempt; a request to stop or pause is not an error.
    """
    telemetry = TelemetryRecorder(run.directory, run.reporter, run.rest.read)
    try:
        run.device = find_device(run.recipe, run.dist.local_rank)
        on_cpu = run.device.kind == "cpu"
        if on_cpu:
            lower_priority()
        run.dist.initialize(on_cpu=on_cpu)
        run.requests.raise_if_stop_requested()
        with _tracking(run):
            if run.dist.is_main_process:
                telemetry.start(gpus=0 if on_cpu else run.dist.world_size)
            setup(run)
            if not on_cpu and not managed_memory_is_safe():
                run.reporter.log("WSL2: optimizer states are not paged; they stay in the GPU's memory.")
            loop = Loop(run)
            loop.train()
            return _finish(run, loop, telemetry)
    except StopRequested as request:
        step = run.checkpoint.step if run.checkpoint else 0
        return Paused(step=step, hold=run.requests.hold) if request.kind == "pause" else Stopped(step=step)
    except Exception as error:
        if hasattr(run, "meter") and run.dist.world_size == 1 and is_out_of_memory(error):
            run.meter.record(ran_out=True)
        raise
    finally:
        telemetry.stop()


@contextmanager
def _tracking(run: Run) -> Iterator[None]:
    """Send events to the recipe's tracker. Raises UserError if the tracker is not installed."""
    report_to = run.recipe.training.report_to
    if report_to == "none" or not run.dist.is_main_process:
        yield
        return
    # Imported only here, because an integration loads its tracker and network libraries.
    from qlora_tui.training.tracker import RunTracker, describe_failure

    def report_failure(error: Exception) -> None:
        run.reporter.health("tracker_failed", *describe_failure(report_to, error))

    tracker = RunTracker(run.directory, run.recipe, report_failure)
    try:
        tracker.start()
        run.reporter.observer = tracker.observe
        yield
    finally:
        run.reporter.observer = lambda event: None
        tracker.close()


def _finish(run: Run, loop: Loop, telemetry: TelemetryRecorder) -> RunEnded:
    """Write the adapter unless the run was paused, and return the event that ends the run.

    If the run is finished, the main process also compares the adapter with its base.
    """
    directory, recipe, reporter, model = run.directory, run.recipe, run.reporter, run.model
    step, seconds = loop.trainer.step, loop.training_seconds()
    reporter.emit(largest(run.dist.all_gather(run.meter.measure("end"))))
    if run.dist.world_size == 1:
        run.meter.record()
    if loop.outcome == "paused":
        return Paused(step=step, hold=run.requests.hold)
    reporter.phase("saving", "adapter")
    reason, best_step = loop.reason, loop.progress.best_step
    if loop.outcome == "finished":
        if recipe.training.early_stopping and best_step is not None and best_step != step:
            reason = f"{reason}; {load_best_weights(directory, model, best_step)}"
        require_trained(model, loop.progress.initial_weights, step, loop.overflow_monitor.skipped)
    checksums = ""
    if run.dist.is_main_process:
        checksums = write_adapter(
            directory,
            model,
            recipe,
            run.base.folder,
            run.tokenizer,
            from_hub=run.files.source == "hub cache",
        )
    if loop.outcome == "stopped":
        return Stopped(step=step, checksums=checksums)
    # The other processes have nothing left to do, and end.
    is_main = run.dist.is_main_process
    run.dist = run.dist.disband()
    if not is_main:
        return Stopped(step=step)
    # Before compare_validation, which may put the starting weights into the model.
    answers = answer_validation(run, seconds)
    report_answers(run, answers, compare_validation(run))
    telemetry.stop()
    energy = EnergyMeter(directory.telemetry_path)
    energy.read_all()
    kwh = energy.kwh
    return Finished(
        step=step,
        seconds=seconds,
        tokens_per_s=loop.trained_tokens / max(seconds, 1e-9),
        reason=reason,
        energy_kwh=kwh,
        tokens_per_joule=loop.trainer.tokens / (kwh * JOULES_PER_KWH) if kwh else None,
        checksums=checksums,
    )
