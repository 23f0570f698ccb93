"""What happens between two steps: report, check, evaluate, save, and carry out requests.

Between steps nothing is half done, so this is where a run is inspected and where it ends.
"""

from __future__ import annotations

import math
import time
from typing import Any, Literal, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_tui.errors import UserError
from qlora_tui.runs.control import Kind
from qlora_tui.runs.events import ALL_STEPS_DONE, Evaluated, SampleGenerated, Step
from qlora_tui.training.batches import PlannedStep
from qlora_tui.training.checkpoint_saver import CheckpointSaver, RunProgress
from qlora_tui.training.control_requests import StopRequested
from qlora_tui.training.evaluation import Evaluator
from qlora_tui.training.final_adapter import trained_weights_digest
from qlora_tui.training.forgetting.base_divergence import BaseDivergence
from qlora_tui.training.health import (
    ForgettingMonitor,
    OverflowMonitor,
    StepMonitor,
    ValidationMonitor,
    check_general_answers,
    find_non_finite,
    too_few_steps,
)
from qlora_tui.training.memory_probe import probe_longest_batch
from qlora_tui.training.preference.objective import RewardSums
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.trainer import RunTrainer

_STEP_REQUESTS: tuple[Kind, ...] = ("evaluate", "sample", "checkpoint")
AttemptOutcome = Literal["finished", "stopped", "paused"]


class StepResult(NamedTuple):
    """One optimizer step, as transformers logs it."""

    step: int
    """1 for the first of the run."""
    epoch: float
    loss: float
    """Mean over the tokens in the loss, by weight, over all processes."""
    learning_rate: float
    """The learning rate of this step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    rewards: RewardSums = RewardSums()
    """Of a preference method, over all processes; otherwise of nothing."""


class RunCallback(TrainerCallback):
    """Reports, evaluates and saves a run, and ends it where that is requested.

    ``on_log`` is used instead of ``on_step_end``, because transformers passes loss and gradient norm only
    there. It logs every step (``logging_steps=1``), right after ``on_step_end``.
    """

    def __init__(self, prepared: PreparedRun, trainer: RunTrainer) -> None:
        self.outcome: AttemptOutcome = "finished"
        self.reason = ALL_STEPS_DONE
        self.progress = RunProgress()
        self._prepared = prepared
        self._trainer = trainer
        self._reporter = prepared.reporter
        self._requests = prepared.requests
        self._evaluator = Evaluator(prepared, trainer.model)
        self._saver = CheckpointSaver(prepared, trainer)
        self._monitor = StepMonitor()
        self.overflow_monitor = OverflowMonitor()
        self._validation_monitor = ValidationMonitor()
        self._base_divergence = BaseDivergence(prepared, trainer.model)
        self._forgetting_monitor = ForgettingMonitor()
        self._total_steps = len(prepared.step_plan.steps)
        self._started_at = 0.0
        self._overhead_s = 0.0
        """Seconds spent on evaluating, sampling and saving: no training time."""
        self._emitted_at = 0.0
        self._emitted_tokens = 0
        self._unreported: StepResult | None = None
        """The last step, where it was not reported because of ``log_every``."""
        if prepared.checkpoint is not None:
            # transformers restores its own part.
            self.progress = RunProgress.restored_from(prepared.checkpoint.state)
            trainer.tokens = prepared.checkpoint.state.tokens

    def training_seconds(self) -> float:
        """Seconds since the first step, without evaluating, sampling and saving."""
        return time.perf_counter() - self._started_at - self._overhead_s

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, with optimizer and scheduler restored: probe memory, then evaluate."""
        if self._prepared.checkpoint is None:
            self.progress.initial_weights = trained_weights_digest(self._trainer.model)
        probe_longest_batch(self._prepared, self._trainer)
        # The probe's batch is no step.
        self._take_rewards()
        if self.progress.evaluated_step < 0:
            self._evaluate_and_sample(0, last=False)
        elif self.progress.evaluation_due:
            self._evaluate_and_sample(state.global_step, last=state.global_step == self._total_steps)
        few = too_few_steps(self._total_steps, self._prepared.recipe.training.max_steps)
        if few is not None and not state.global_step:
            self._reporter.health(few.kind, few.evidence, few.remedy)
        self._reporter.phase("training")
        self._emitted_at, self._emitted_tokens = time.perf_counter(), self._trainer.tokens
        self._started_at = time.perf_counter()
        self._overhead_s = 0.0
        self._trainer.after_micro_batch = self._after_micro_batch

    def _after_micro_batch(self, done: int, total: int) -> None:
        self._reporter.update(micro_batch=done, micro_batches=total)
        self._requests.raise_if_stop_now()

    def abandon_step(self) -> None:
        """Save the run as it was after its last complete step, after StepAbandoned, and stop it.

        Raises:
            StopRequested: no step is complete, so there is nothing to save.
            OSError: the checkpoint cannot be written.
        """
        self._trainer.undo_unfinished_step()
        if not self._trainer.state.global_step:
            raise StopRequested("stop")
        if self._unreported is not None:
            self._emit_step(self._unreported, force=True)
        self._save(self._trainer.state.global_step, force=True)
        self.outcome = "stopped"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report an optimizer step, carry out requests, and evaluate, save or stop where that is due."""
        if logs is None or "loss" not in logs:
            # The summary at the end of training.
            return
        step = state.global_step
        planned = self._prepared.step_plan.steps[step - 1]
        result = StepResult(
            step,
            planned.epoch,
            logs["loss"],
            logs["learning_rate"],
            float(logs.get("grad_norm", 0.0)),
            self._take_rewards(),
        )
        emitted = self._emit_step(result, force=step == self._total_steps)
        self._unreported = None if emitted else result
        self._check_health(result, norm_may_overflow=args.fp16)
        overhead_before_s = self._overhead_s
        self._act_between_steps(step, planned, control)
        spent_s = self._overhead_s - overhead_before_s
        # The speed of the next step counts from the end of what was done here.
        self._emitted_at += spent_s
        if spent_s and not control.should_training_stop:
            self._reporter.phase("training")
        if control.should_training_stop and not emitted:
            # The last step of the attempt is reported whatever log_every is.
            self._emit_step(result, force=True)

    def _take_rewards(self) -> RewardSums:
        objective = self._trainer.objective
        if objective is None:
            return RewardSums()
        return RewardSums(*self._prepared.dist.all_reduce_sum(objective.take_sums()))

    def _act_between_steps(self, step: int, planned: PlannedStep, control: TrainerControl) -> None:
        """Carry out requests, and evaluate, save and stop where that is due."""
        self._requests.poll()
        self._change_learning_rate()
        stop_kind = self._requests.stop_kind()
        if self._requests.take("finish_epoch"):
            self.progress.ends_with_epoch = True
        is_last = step == self._total_steps
        ends = is_last or (planned.ends_epoch and self.progress.ends_with_epoch)
        requested = {kind for kind in _STEP_REQUESTS if self._requests.take(kind)}
        if self._is_due("eval_every", step, planned.ends_epoch or ends) or "evaluate" in requested:
            improved = self._evaluate_and_sample(step, last=ends)
            if reason := self._early_stop_reason():
                self.reason = reason
                control.should_training_stop = True
            if improved and not ends:
                self._save(step)
        elif "sample" in requested:
            self._sample(step)
        if (
            self._is_due("checkpoint_every", step, planned.ends_epoch)
            or "checkpoint" in requested
            or ends
            or control.should_training_stop
            or stop_kind
        ):
            self._save(step, force=bool(stop_kind))
        if stop_kind:
            self.outcome = "paused" if stop_kind == "pause" else "stopped"
        elif ends and not is_last:
            self.reason = "finished at the end of the epoch, as requested"
        if stop_kind or ends:
            control.should_training_stop = True

    def _emit_step(self, result: StepResult, *, force: bool) -> bool:
        """Emit every ``log_every``-th step and non-finite ones, or with ``force`` any; True where emitted."""
        step, epoch, loss, learning_rate, grad_norm, rewards = result
        self._reporter.update(step=step, loss=loss if math.isfinite(loss) else None, micro_batch=0)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if step % self._prepared.recipe.training.log_every and not force and is_finite:
            return False
        now, tokens = time.perf_counter(), self._trainer.tokens
        tokens_per_s = (tokens - self._emitted_tokens) / max(now - self._emitted_at, 1e-9)
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
                tokens_per_s=tokens_per_s,
                reward_accuracy=rewards.accuracy,
                reward_margin=rewards.margin,
            )
        )
        self._reporter.log(
            f"step {step}/{self._total_steps}  loss {loss:.4f}{_reward_words(rewards)}"
            f"  lr {learning_rate:.2e}  grad {grad_norm:.3f}  {tokens_per_s:.0f} tok/s"
        )
        return True

    def _check_health(self, result: StepResult, *, norm_may_overflow: bool) -> None:
        step, _, loss, _, grad_norm, _ = result
        finding = find_non_finite(step, loss, grad_norm, norm_may_overflow=norm_may_overflow)
        if finding is not None:
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step, error=True)
            saved_step = self.progress.checkpoint_step
            hint = (
                f"the checkpoint at step {saved_step} is good"
                if saved_step >= 0
                else "there is no checkpoint yet"
            )
            raise UserError(
                "Training diverged",
                what=finding.evidence,
                why=f"Training cannot recover from this; {hint}.",
                fix=finding.remedy,
            )
        skipped = self._trainer.accelerator.optimizer_step_was_skipped
        finding = self.overflow_monitor.check(step, is_skipped=skipped)
        if finding is not None:
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step, error=True)
            raise UserError(
                "The gradients overflow float16",
                what=finding.evidence,
                why="Such a step is skipped, so the adapter learns nothing.",
                fix=finding.remedy,
            )
        for finding in self._monitor.check(step, loss, grad_norm):
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step)

    def _change_learning_rate(self) -> None:
        request = self._requests.take("set_learning_rate")
        if request is not None and request.value is not None and 0 < request.value <= 1:
            self._trainer.set_learning_rate(request.value)

    def _is_due(self, interval_name: str, step: int, epoch_ends: bool) -> bool:
        every: int = getattr(self._prepared.recipe.training, interval_name)
        return epoch_ends if not every else step % every == 0 or step == self._total_steps

    def _evaluate_and_sample(self, step: int, *, last: bool) -> bool:
        """Evaluate and sample; True where the validation loss is the best so far.

        With ``last``, at the end of the run, general answers are counted too.
        """
        started_at = time.perf_counter()
        self.progress.evaluated_step = step
        if not self._evaluator.has_validation_data and not self._prepared.recipe.training.sample_prompts:
            return False
        self.progress.evaluation_due = True
        self._reporter.phase("evaluating")
        best = self._evaluator.has_validation_data and self._evaluate(step, last=last)
        self._sample(step)
        self.progress.evaluation_due = False
        self._overhead_s += time.perf_counter() - started_at
        return best

    def _evaluate(self, step: int, *, last: bool) -> bool:
        training = self._prepared.recipe.training
        loss, accuracy, rewards = self._evaluator.evaluate()
        forgetting, turn_ends = self._base_divergence.measure() if training.general_prompts else (None, None)
        score = loss + training.forgetting_weight * (forgetting or 0.0)
        best = self.progress.add_score(step, score, loss)
        general = None
        if training.general_prompts and step and (last or self._early_stop_reason()):
            general = self._base_divergence.count_answers()
        self._reporter.emit(
            Evaluated(
                at=time.time(),
                step=step,
                loss=loss if math.isfinite(loss) else None,
                best=best,
                before_training=self.progress.loss_before_training if step else None,
                accuracy=accuracy,
                reward_accuracy=rewards.accuracy,
                reward_margin=rewards.margin,
                forgetting=forgetting if forgetting is not None and math.isfinite(forgetting) else None,
                score=score if training.forgetting_weight and math.isfinite(score) else None,
                general_turn_ends=turn_ends,
                general_answers=general,
            )
        )
        self._reporter.log(
            f"validation loss {loss:.4f}{_reward_words(rewards)} at step {step}{' (best)' if best else ''}"
        )
        findings = [self._validation_monitor.check(step, loss, self.progress.loss_before_training)]
        if forgetting is not None:
            findings.append(self._forgetting_monitor.check(step, forgetting, turn_ends))
        if general is not None:
            findings.append(check_general_answers(general))
        for finding in filter(None, findings):
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step)
        return best

    def _sample(self, step: int) -> None:
        for prompt, answer in self._evaluator.sample():
            self._reporter.emit(SampleGenerated(at=time.time(), step=step, prompt=prompt, answer=answer))

    def _early_stop_reason(self) -> str | None:
        patience = self._prepared.recipe.training.early_stopping
        if not patience or len(self.progress.scores_since_best) < patience:
            return None
        weighted = " with forgetting" if self._prepared.recipe.training.forgetting_weight else ""
        return f"the validation loss{weighted} did not improve in {patience} evaluations"

    def _save(self, step: int, *, force: bool = False) -> None:
        """Write a checkpoint, once per step. Raises OSError with ``force``, where it cannot be written."""
        if self.progress.checkpoint_step == step:
            return
        started_at = time.perf_counter()
        self._saver.save(step, self.progress, force=force)
        self._overhead_s += time.perf_counter() - started_at


def _reward_words(rewards: RewardSums) -> str:
    if rewards.accuracy is None:
        return ""
    margin = "" if rewards.margin is None else f"  margin {rewards.margin:.4f}"
    return f"  right {rewards.accuracy:.0%}{margin}"
