"""The edge of a step: told, watched over, validated, saved, and what was asked done.

Between two steps nothing is half done, so here is where a run is looked at and where it ends.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError, disk_problem
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.control import Kind
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import CheckpointSaved, Evaluated, SampleGenerated, Step
from qlora_tui.training import checkpoints
from qlora_tui.training.accuracy import has_short_answers
from qlora_tui.training.batches import TokenizedDataset, validation_batches
from qlora_tui.training.checkpoints import CheckpointState
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.evaluation import generate_samples, validate
from qlora_tui.training.failure import is_full_disk
from qlora_tui.training.health import StepMonitor, too_few_steps
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.trainer import RunTrainer

_KINDS: tuple[Kind, ...] = ("evaluate", "sample", "checkpoint")
AttemptOutcome = Literal["finished", "stopped", "paused"]


@dataclass(frozen=True)
class RunContext:
    """What the edge needs to know of the run."""

    run: RunDir
    recipe: Recipe
    device: ComputeDevice
    tokenizer: ChatTokenizer
    validation: TokenizedDataset
    data_hash: str
    packing_isolated: bool
    pad_id: int
    thinking: Thinking
    """How sample prompts are asked."""
    dist: DistributedContext


@dataclass
class CallbackState:
    """What changes from step to step and is not transformers' to keep."""

    best_step: int | None = None
    best_loss: float | None = None
    last_losses: list[float] = field(default_factory=list)
    evaluated_step: int = -1
    checkpoint_step: int = -1
    ends_with_epoch: bool = False


class RunCallback:
    """Called by the trainer before the first and after each step."""

    def __init__(
        self, context: RunContext, trainer: RunTrainer, reporter: Reporter, requests: ControlRequests
    ) -> None:
        self.outcome: AttemptOutcome = "finished"
        self.reason = "all steps done"
        self.progress = CallbackState()
        self.overhead_s = 0.0
        """Seconds that went into validating, sampling and saving; no training time."""
        self._context = context
        self._trainer = trainer
        self._reporter = reporter
        self._requests = requests
        self._watch = StepMonitor()
        self._emitted_at = time.perf_counter()
        self._emitted_tokens = 0
        self._validation = validation_batches(
            context.validation,
            context.recipe.training.micro_batch_size,
            context.recipe.data.max_length,
            packing_isolated=context.packing_isolated,
        )

        short = has_short_answers(context.validation)
        self._short_answers_end = frozenset(context.tokenizer.turn_end_ids) if short else None

    def restore(self, state: CheckpointState) -> None:
        """Go on from a checkpoint."""
        self._trainer.tokens = state.tokens
        self.progress = CallbackState(
            best_step=state.best_step,
            best_loss=state.best_loss,
            last_losses=list(state.last_losses),
            evaluated_step=state.step,
            checkpoint_step=state.step,
        )

    def on_train_begin(self) -> None:
        """Before the first step of an attempt: validate, unless it goes on from a checkpoint."""
        if self.progress.evaluated_step < 0:
            self.evaluate(0)
        few = too_few_steps(self._trainer.state.max_steps)
        if few is not None and not self._trainer.state.global_step:
            self._reporter.health(few.kind, few.evidence, few.remedy)
        self._reporter.phase("training")
        self._emitted_at, self._emitted_tokens = time.perf_counter(), self._trainer.tokens

    def on_step_end(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """After an optimizer step."""
        spent_before_s = self.overhead_s
        step = self._trainer.state.global_step
        plan = self._trainer.steps.step_plan.steps[step - 1]
        last = step == self._trainer.state.max_steps
        emitted = self._emit_step(step, plan.epoch, loss, learning_rate, grad_norm, force=last)
        self._check_health(step, loss, grad_norm)
        self._requests.poll()
        self._change_learning_rate()
        stop_kind = self._requests.stop_kind()
        if self._requests.take("finish_epoch"):
            self.progress.ends_with_epoch = True
        ends = last or (plan.ends_epoch and self.progress.ends_with_epoch)
        requested = {kind for kind in _KINDS if self._requests.take(kind)}
        if self._is_due("eval_every", step, plan.ends_epoch or ends) or "evaluate" in requested:
            improved = self.evaluate(step)
            self._stop_early()
            if improved and not ends:
                self.save(step)
        elif "sample" in requested:
            self._sample(step)
        stops = self._trainer.control.should_training_stop
        if (
            self._is_due("checkpoint_every", step, plan.ends_epoch)
            or "checkpoint" in requested
            or ends
            or stops
            or stop_kind
        ):
            self.save(step, force=bool(stop_kind))
        if stop_kind:
            self.outcome = "paused" if stop_kind == "pause" else "stopped"
        elif ends and not last:
            self.reason = "finished at the end of the epoch, as asked"
        if stop_kind or ends:
            self._trainer.control.should_training_stop = True
        self._exclude_from_timing(self.overhead_s - spent_before_s)
        if self._trainer.control.should_training_stop and not emitted:
            # The run's last step is known wherever it ends.
            self._emit_step(step, plan.epoch, loss, learning_rate, grad_norm, force=True)

    def evaluate(self, step: int) -> bool:
        """Validate and sample; True where the loss is the best so far."""
        context, started = self._context, time.perf_counter()
        self.progress.evaluated_step = step
        if not self._validation and not context.recipe.training.sample_prompts:
            return False
        self._reporter.phase("evaluating")
        improved = bool(self._validation) and self._validate(step)
        self._sample(step)
        self.overhead_s += time.perf_counter() - started
        return improved

    def save(self, step: int, *, force: bool = False) -> None:
        """Write a checkpoint, once a step.

        A disk that is full or fails costs the checkpoint, not the run, unless it ``force`` be written.
        """
        if self.progress.checkpoint_step == step:
            return
        started = time.perf_counter()
        self._reporter.phase("saving", f"checkpoint at step {step}")
        context, progress = self._context, self.progress
        state = CheckpointState(
            step=step,
            tokens=self._trainer.tokens,
            data_hash=context.data_hash,
            packing_isolated=context.packing_isolated,
            recipe=checkpoints.recipe_text(context.recipe),
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            last_losses=tuple(progress.last_losses),
        )
        try:
            folder = checkpoints.write(context.run, state, self._trainer.save_checkpoint_files, context.dist)
        except OSError as error:
            if force:
                raise
            self._report_unsaved_checkpoint(step, error)
            return
        progress.checkpoint_step = step
        self._reporter.emit(
            CheckpointSaved(at=time.time(), step=step, folder=str(folder.relative_to(context.run.path)))
        )
        if context.dist.is_main_process:
            # What cannot be deleted now is deleted after the next checkpoint.
            with suppress(OSError):
                checkpoints.prune(context.run, context.recipe.training.keep_checkpoints, progress.best_step)
        self.overhead_s += time.perf_counter() - started

    def _report_unsaved_checkpoint(self, step: int, error: OSError) -> None:
        problem = disk_problem(error, self._context.run.checkpoints_dir)
        reason = f"{problem.title[0].lower()}{problem.title[1:]}" if problem else str(error)
        self._reporter.log(f"checkpoint at step {step}: {error}")
        self._reporter.health(
            "disk_full" if is_full_disk(error) else "checkpoint_unwritten",
            f"The checkpoint at step {step} could not be written: {reason}.",
            "Training continues, and earlier checkpoints are kept. "
            + (f"{problem.why} {problem.fix}".strip() if problem else "The log has the details."),
            step=step,
        )

    def _emit_step(
        self, step: int, epoch: float, loss: float, learning_rate: float, grad_norm: float, *, force: bool
    ) -> bool:
        """Tell the step where its turn has come, or it must be; True where it was."""
        self._reporter.update(step=step, loss=loss if math.isfinite(loss) else None)
        broken = not (math.isfinite(loss) and math.isfinite(grad_norm))
        every = self._context.recipe.training.log_every
        if step % every and not force and not broken:
            return False
        now, tokens = time.perf_counter(), self._trainer.tokens
        rate = (tokens - self._emitted_tokens) / max(now - self._emitted_at, 1e-9)
        self._emitted_at, self._emitted_tokens = now, tokens
        self._reporter.emit(
            Step(
                at=time.time(),
                step=step,
                epoch=epoch,
                loss=loss if math.isfinite(loss) else None,
                learning_rate=learning_rate,
                grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                tokens=tokens,
                tokens_per_s=rate,
            )
        )
        total = self._trainer.state.max_steps
        self._reporter.log(
            f"step {step}/{total}  loss {loss:.4f}  lr {learning_rate:.2e}  norm {grad_norm:.3f}"
            f"  {rate:.0f} tokens/s"
        )
        return True

    def _check_health(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not self._scales_loss):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            value = loss if what == "loss" else grad_norm
            remedy = "Lower training.learning_rate or raise training.warmup_ratio."
            self._reporter.health(
                "nan_loss", f"The {what} is {value} at step {step}.", remedy, step=step, error=True
            )
            saved_step = self.progress.checkpoint_step
            hint = (
                f"the checkpoint of step {saved_step} is good"
                if saved_step >= 0
                else "there is no checkpoint yet"
            )
            raise UserError(
                "The loss is not a number",
                what=f"At step {step} the {what} was {value}.",
                why=f"Nothing learnt after that would be of use; {hint}.",
                fix="Lower training.learning_rate and start again, or train in another compute dtype.",
            )
        for finding in self._watch.check(step, loss, grad_norm):
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step)

    def _exclude_from_timing(self, spent_s: float) -> None:
        """What was spent between steps is not counted as training."""
        self._emitted_at += spent_s
        if spent_s and not self._trainer.control.should_training_stop:
            self._reporter.phase("training")

    @property
    def _scales_loss(self) -> bool:
        # Under fp16 a step whose scaled gradients overflow is skipped and the scale lowered: that is routine.
        return bool(self._trainer.args.fp16)

    def _is_due(self, interval_name: str, step: int, epoch_ends: bool) -> bool:
        every: int = getattr(self._context.recipe.training, interval_name)
        return epoch_ends if not every else step % every == 0 or step == self._trainer.state.max_steps

    def _validate(self, step: int) -> bool:
        context = self._context
        local_sums = validate(
            self._trainer.model,
            context.validation,
            self._validation[context.dist.rank :: context.dist.world_size],
            packing_isolated=context.packing_isolated,
            pad_id=context.pad_id,
            multiple=context.device.row_multiple,
            device=context.device.torch_device,
            progress=lambda done, of: self._reporter.progress("evaluating", done, of),
            short_answers_end=self._short_answers_end,
        )
        total, trained, exact, answered = context.dist.all_reduce_sum(local_sums)
        loss = total / (trained or 1)
        progress = self.progress
        # The loss before training is no candidate: its adapter has learnt nothing.
        best = step > 0 and math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        if best:
            progress.best_loss, progress.best_step, progress.last_losses = loss, step, []
        elif step > 0:
            progress.last_losses.append(loss)
        self._reporter.emit(
            Evaluated(
                at=time.time(),
                step=step,
                loss=loss if math.isfinite(loss) else None,
                best=best,
                accuracy=exact / answered if answered else None,
            )
        )
        self._reporter.log(f"validation loss {loss:.4f} at step {step}{' (best)' if best else ''}")
        return best

    def _sample(self, step: int) -> None:
        context = self._context
        prompts = context.recipe.training.sample_prompts
        model: Any = self._trainer.model
        for prompt, answer in generate_samples(
            model, context.tokenizer, prompts, context.device.torch_device, context.thinking
        ):
            self._reporter.emit(SampleGenerated(at=time.time(), step=step, prompt=prompt, answer=answer))

    def _stop_early(self) -> None:
        patience = self._context.recipe.training.early_stopping
        if patience and len(self.progress.last_losses) >= patience:
            self._trainer.control.should_training_stop = True
            self.reason = f"no better validation loss in {patience} validations"

    def _change_learning_rate(self) -> None:
        request = self._requests.take("set_learning_rate")
        if request is None or request.value is None:
            return
        scheduler: Any = self._trainer.lr_scheduler
        shape = scheduler.get_last_lr()[0] / scheduler.base_lrs[0]
        if shape <= 0 or not 0 < request.value <= 1:
            return
        # It is what the warm-up leads to; after that it holds from now on, and falls as it would have fallen.
        state = self._trainer.state
        warming_up = state.global_step < self._trainer.args.get_warmup_steps(state.max_steps)
        peak = request.value if warming_up else request.value / shape
        scheduler.base_lrs = [peak] * len(scheduler.base_lrs)
        scheduler._last_lr = [peak * shape] * len(scheduler.base_lrs)
        for group in scheduler.optimizer.param_groups:
            group["lr"] = peak * shape
