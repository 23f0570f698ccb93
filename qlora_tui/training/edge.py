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
from qlora_tui.runs.events import CheckpointSaved, Evaluated, Sampled, Step
from qlora_tui.training import checkpoints
from qlora_tui.training.accuracy import has_short_answers
from qlora_tui.training.asked import Requests
from qlora_tui.training.batches import Samples, validation_batches
from qlora_tui.training.checkpoints import State
from qlora_tui.training.device import Device
from qlora_tui.training.evaluation import answers, validate
from qlora_tui.training.failure import is_full_disk
from qlora_tui.training.health import StepWatch, too_few_steps
from qlora_tui.training.loop import RunTrainer
from qlora_tui.training.processes import Processes
from qlora_tui.training.reporter import Reporter

_KINDS: tuple[Kind, ...] = ("evaluate", "sample", "checkpoint")
Ending = Literal["finished", "stopped", "paused"]


@dataclass(frozen=True)
class Setting:
    """What the edge needs to know of the run."""

    run: RunDir
    recipe: Recipe
    device: Device
    tokenizer: ChatTokenizer
    validation: Samples
    data_hash: str
    kept_apart: bool
    pad_id: int
    thinking: Thinking
    """How sample prompts are asked."""
    among: Processes


@dataclass
class Progress:
    """What changes from step to step and is not transformers' to keep."""

    best_step: int | None = None
    best_loss: float | None = None
    last_losses: list[float] = field(default_factory=list)
    evaluated_step: int = -1
    checkpoint_step: int = -1
    ends_with_epoch: bool = False


class Edge:
    """Called by the trainer before the first and after each step."""

    def __init__(self, setting: Setting, trainer: RunTrainer, reporter: Reporter, requests: Requests) -> None:
        self.ending: Ending = "finished"
        self.reason = "all steps done"
        self.progress = Progress()
        self.evaluating_s = 0.0
        """Seconds that went into validating, sampling and saving; no training time."""
        self._setting = setting
        self._trainer = trainer
        self._reporter = reporter
        self._requests = requests
        self._watch = StepWatch()
        self._told_at = time.perf_counter()
        self._told_tokens = 0
        self._validation = validation_batches(
            setting.validation,
            setting.recipe.training.micro_batch,
            setting.recipe.data.max_length,
            kept_apart=setting.kept_apart,
        )

        short = has_short_answers(setting.validation)
        self._short_answers_end = frozenset(setting.tokenizer.turn_end_ids) if short else None

    def restore(self, state: State) -> None:
        """Go on from a checkpoint."""
        self._trainer.tokens = state.tokens
        self.progress = Progress(
            best_step=state.best_step,
            best_loss=state.best_loss,
            last_losses=list(state.last_losses),
            evaluated_step=state.step,
            checkpoint_step=state.step,
        )

    def begin(self) -> None:
        """Before the first step of an attempt: validate, unless it goes on from a checkpoint."""
        if self.progress.evaluated_step < 0:
            self.evaluate(0)
        few = too_few_steps(self._trainer.state.max_steps)
        if few is not None and not self._trainer.state.global_step:
            self._reporter.health(few.kind, few.evidence, few.remedy)
        self._reporter.phase("training")
        self._told_at, self._told_tokens = time.perf_counter(), self._trainer.tokens

    def step_done(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """After an optimizer step."""
        spent_before_s = self.evaluating_s
        step = self._trainer.state.global_step
        plan = self._trainer.steps.schedule.steps[step - 1]
        last = step == self._trainer.state.max_steps
        told = self._tell(step, plan.epoch, loss, learning_rate, grad_norm, must=last)
        self._look_after(step, loss, grad_norm)
        self._requests.look()
        self._change_learning_rate()
        asked_to_end = self._requests.ending()
        if self._requests.take("finish_epoch"):
            self.progress.ends_with_epoch = True
        ends = last or (plan.ends_epoch and self.progress.ends_with_epoch)
        asked = {kind for kind in _KINDS if self._requests.take(kind)}
        if self._is_due("evaluate_every", step, plan.ends_epoch or ends) or "evaluate" in asked:
            improved = self.evaluate(step)
            self._stop_early()
            if improved and not ends:
                self.save(step)
        elif "sample" in asked:
            self._sample(step)
        stops = self._trainer.control.should_training_stop
        if (
            self._is_due("checkpoint_every", step, plan.ends_epoch)
            or "checkpoint" in asked
            or ends
            or stops
            or asked_to_end
        ):
            self.save(step, must=bool(asked_to_end))
        if asked_to_end:
            self.ending = "paused" if asked_to_end == "pause" else "stopped"
        elif ends and not last:
            self.reason = "finished at the end of the epoch, as asked"
        if asked_to_end or ends:
            self._trainer.control.should_training_stop = True
        self._back_to_training(self.evaluating_s - spent_before_s)
        if self._trainer.control.should_training_stop and not told:
            # The run's last step is known wherever it ends.
            self._tell(step, plan.epoch, loss, learning_rate, grad_norm, must=True)

    def evaluate(self, step: int) -> bool:
        """Validate and sample; True where the loss is the best so far."""
        setting, started = self._setting, time.perf_counter()
        self.progress.evaluated_step = step
        if not self._validation and not setting.recipe.training.sample_prompts:
            return False
        self._reporter.phase("evaluating")
        improved = bool(self._validation) and self._validate(step)
        self._sample(step)
        self.evaluating_s += time.perf_counter() - started
        return improved

    def save(self, step: int, *, must: bool = False) -> None:
        """Write a checkpoint, once a step.

        A disk that is full or fails costs the checkpoint, not the run, unless it ``must`` be written.
        """
        if self.progress.checkpoint_step == step:
            return
        started = time.perf_counter()
        self._reporter.phase("saving", f"checkpoint at step {step}")
        setting, progress = self._setting, self.progress
        state = State(
            step=step,
            tokens=self._trainer.tokens,
            data_hash=setting.data_hash,
            kept_apart=setting.kept_apart,
            recipe=checkpoints.recipe_text(setting.recipe),
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            last_losses=tuple(progress.last_losses),
        )
        try:
            folder = checkpoints.write(setting.run, state, self._trainer.save_parts, setting.among)
        except OSError as error:
            if must:
                raise
            self._report_unwritten(step, error)
            return
        progress.checkpoint_step = step
        self._reporter.tell(
            CheckpointSaved(at=time.time(), step=step, folder=str(folder.relative_to(setting.run.path)))
        )
        if setting.among.is_first:
            # What cannot be deleted now is deleted after the next checkpoint.
            with suppress(OSError):
                checkpoints.prune(setting.run, setting.recipe.training.keep_checkpoints, progress.best_step)
        self.evaluating_s += time.perf_counter() - started

    def _report_unwritten(self, step: int, error: OSError) -> None:
        problem = disk_problem(error, self._setting.run.checkpoints_dir)
        reason = f"{problem.title[0].lower()}{problem.title[1:]}" if problem else str(error)
        self._reporter.log(f"checkpoint at step {step}: {error}")
        self._reporter.health(
            "disk_full" if is_full_disk(error) else "checkpoint_unwritten",
            f"The checkpoint at step {step} could not be written: {reason}.",
            "Training continues, and earlier checkpoints are kept. "
            + (f"{problem.why} {problem.fix}".strip() if problem else "The log has the details."),
            step=step,
        )

    def _tell(
        self, step: int, epoch: float, loss: float, learning_rate: float, grad_norm: float, *, must: bool
    ) -> bool:
        """Tell the step where its turn has come, or it must be; True where it was."""
        self._reporter.update(step=step, loss=loss if math.isfinite(loss) else None)
        broken = not (math.isfinite(loss) and math.isfinite(grad_norm))
        every = self._setting.recipe.training.log_every
        if step % every and not must and not broken:
            return False
        now, tokens = time.perf_counter(), self._trainer.tokens
        rate = (tokens - self._told_tokens) / max(now - self._told_at, 1e-9)
        self._told_at, self._told_tokens = now, tokens
        self._reporter.tell(
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

    def _look_after(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not self._scales_loss):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            value = loss if what == "loss" else grad_norm
            remedy = "Lower training.learning_rate or raise training.warmup."
            self._reporter.health(
                "nan_loss", f"The {what} is {value} at step {step}.", remedy, step=step, error=True
            )
            kept = self.progress.checkpoint_step
            good = f"the checkpoint of step {kept} is good" if kept >= 0 else "there is no checkpoint yet"
            raise UserError(
                "The loss is not a number",
                what=f"At step {step} the {what} was {value}.",
                why=f"Nothing learnt after that would be of use; {good}.",
                fix="Lower training.learning_rate and start again, or train in another compute dtype.",
            )
        for finding in self._watch.step(step, loss, grad_norm):
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step)

    def _back_to_training(self, spent_s: float) -> None:
        """What was spent between steps is not counted as training."""
        self._told_at += spent_s
        if spent_s and not self._trainer.control.should_training_stop:
            self._reporter.phase("training")

    @property
    def _scales_loss(self) -> bool:
        # Under fp16 a step whose scaled gradients overflow is skipped and the scale lowered: that is routine.
        return bool(self._trainer.args.fp16)

    def _is_due(self, setting: str, step: int, epoch_ends: bool) -> bool:
        every: int = getattr(self._setting.recipe.training, setting)
        return epoch_ends if not every else step % every == 0 or step == self._trainer.state.max_steps

    def _validate(self, step: int) -> bool:
        setting = self._setting
        mine = validate(
            self._trainer.model,
            setting.validation,
            self._validation[setting.among.rank :: setting.among.count],
            kept_apart=setting.kept_apart,
            pad_id=setting.pad_id,
            multiple=setting.device.row_multiple,
            device=setting.device.torch_device,
            progress=lambda done, of: self._reporter.progress("evaluating", done, of),
            short_answers_end=self._short_answers_end,
        )
        total, trained, exact, asked = setting.among.summed(mine)
        loss = total / (trained or 1)
        progress = self.progress
        # The loss before training is no candidate: its adapter has learnt nothing.
        best = step > 0 and math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        if best:
            progress.best_loss, progress.best_step, progress.last_losses = loss, step, []
        elif step > 0:
            progress.last_losses.append(loss)
        self._reporter.tell(
            Evaluated(
                at=time.time(),
                step=step,
                loss=loss if math.isfinite(loss) else None,
                best=best,
                accuracy=exact / asked if asked else None,
            )
        )
        self._reporter.log(f"validation loss {loss:.4f} at step {step}{' (best)' if best else ''}")
        return best

    def _sample(self, step: int) -> None:
        setting = self._setting
        prompts = setting.recipe.training.sample_prompts
        model: Any = self._trainer.model
        for prompt, answer in answers(
            model, setting.tokenizer, prompts, setting.device.torch_device, setting.thinking
        ):
            self._reporter.tell(Sampled(at=time.time(), step=step, prompt=prompt, answer=answer))

    def _stop_early(self) -> None:
        patience = self._setting.recipe.training.early_stopping
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
