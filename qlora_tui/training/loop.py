"""The training loop of a run: every step, and the work between steps.

Between two steps nothing is half done, so a run is reported, evaluated, saved, changed and ended there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from qlora_tui.data.step_plan import PlannedStep
from qlora_tui.errors import UserError, disk_problem
from qlora_tui.formatting import uncapitalize
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.control import Kind
from qlora_tui.runs.events import (
    ALL_STEPS_DONE,
    CheckpointSaved,
    Evaluated,
    LayersKept,
    RequestReceived,
    SampleGenerated,
    Step,
)
from qlora_tui.training import checkpoints, model
from qlora_tui.training.adapter import trained_weights_digest
from qlora_tui.training.answers import generate_samples
from qlora_tui.training.batches import Steps, computed_tokens, longest_micro_batch
from qlora_tui.training.checkpoints import CheckpointState
from qlora_tui.training.control_requests import StepAbandoned, StopRequested
from qlora_tui.training.evaluation import Evaluator
from qlora_tui.training.failures import is_full_disk
from qlora_tui.training.forgetting import BaseDivergence
from qlora_tui.training.health import (
    Finding,
    ForgettingMonitor,
    OverflowMonitor,
    StepMonitor,
    ValidationMonitor,
    check_general_answers,
    find_non_finite,
    too_few_steps,
)
from qlora_tui.training.memory_meter import largest
from qlora_tui.training.preferences import PreferenceObjective, RewardSums
from qlora_tui.training.run import Run
from qlora_tui.training.trainer import StepResult, Trainer

_STEP_REQUESTS: tuple[Kind, ...] = ("evaluate", "sample", "checkpoint")
Outcome = Literal["finished", "stopped", "paused"]
_EPOCH_DONE = "finished at the end of the epoch, as requested"


@dataclass
class RunProgress:
    """The state that changes from step to step and is saved in addition to the trainer's state."""

    best_step: int | None = None
    best_score: float | None = None
    """Lowest score so far: validation loss plus the weighted divergence from the base, at the best step."""
    loss_before_training: float | None = None
    """Validation loss at step 0; None if it was not measured."""
    scores_since_best: list[float] = field(default_factory=list)
    """Scores of the evaluations since the best, for early stopping."""
    evaluated_step: int = -1
    """Step of the last evaluation; -1 before the first."""
    evaluation_due: bool = False
    """Whether a stop interrupted the evaluation at ``evaluated_step``."""
    checkpoint_step: int = -1
    """Step of the last checkpoint; -1 before the first."""
    initial_weights: str = ""
    """Digest of the trained weights before the first step; empty if an earlier version started the run."""
    ends_with_epoch: bool = False
    """Whether the user has asked the run to finish at the end of the epoch."""

    @classmethod
    def restored_from(cls, state: CheckpointState) -> RunProgress:
        """Return the progress stored in a checkpoint."""
        return cls(
            best_step=state.best_step,
            best_score=state.best_score,
            loss_before_training=state.loss_before_training,
            scores_since_best=list(state.scores_since_best),
            initial_weights=state.initial_weights,
            evaluated_step=state.step,
            evaluation_due=state.evaluation_due,
            checkpoint_step=state.step,
            ends_with_epoch=state.ends_with_epoch,
        )

    def add_score(self, step: int, score: float, loss: float) -> bool:
        """Record an evaluation: its validation loss at step 0, its score at later steps.

        Returns:
            Whether the score is the best so far; False at step 0.
        """
        if step <= 0:
            # The adapter has learned nothing yet, so this is not a candidate but only a value to compare
            # with.
            self.loss_before_training = loss
            return False
        best = math.isfinite(score) and (self.best_score is None or score < self.best_score)
        if best:
            self.best_score, self.best_step, self.scores_since_best = score, step, []
        else:
            self.scores_since_best.append(score)
        return best


class Loop:
    """Trains a run that ``setup`` has loaded; :meth:`train` is called once."""

    def __init__(self, run: Run) -> None:
        self.outcome: Outcome = "finished"
        self.reason = ALL_STEPS_DONE
        self.progress = RunProgress()
        self.trainer = Trainer(
            run.model,
            run.recipe.training,
            run.device,
            len(run.step_plan.steps),
            PreferenceObjective.of(run.recipe, run.starting_adapter),
        )
        self.overflow_monitor = OverflowMonitor()
        self._run = run
        self._reporter = run.reporter
        self._total_steps = len(run.step_plan.steps)
        pause_at = run.directory.pause_at
        self._pause_step = 0 if pause_at is None else math.ceil(pause_at * self._total_steps)
        """Step after which the run pauses by itself; 0 for none."""
        self._steps = self._planned_steps()
        self._is_over = False
        self._tokens_before = 0
        """Tokens trained on in earlier attempts."""
        self._evaluator = Evaluator(run)
        self._base_divergence = BaseDivergence(run)
        self._monitor = StepMonitor()
        self._validation_monitor = ValidationMonitor()
        self._forgetting_monitor = ForgettingMonitor()
        self._started_at = 0.0
        self._overhead_s = 0.0
        """Seconds of evaluating, sampling, saving and resting, which do not count as training time."""
        self._emitted_at = 0.0
        self._emitted_tokens = 0
        self._unreported: tuple[StepResult, RewardSums] | None = None
        """The last step, if ``log_every`` skipped its report."""

    def train(self) -> None:
        """Train until all steps are complete, the run is asked to end, or it ends early for another reason.

        Raises:
            StopRequested: the run was asked to end before it trained, or before its first step was complete.
            UserError: training diverged.
        """
        is_abandoned = False
        try:
            self._begin()
            while self.trainer.step < self._total_steps and not self._is_over:
                result = self.trainer.train_step(self._steps[self.trainer.step], self._after_micro_batch)
                self._end_step(result, self._take_rewards())
        except StepAbandoned:
            # Save after this block, when the exception no longer holds the activations of the step.
            is_abandoned = True
        if is_abandoned:
            self._abandon_step()

    def time_steps(self, count: int, after_step: Callable[[int, int], None]) -> tuple[int, float]:
        """Train the first steps after the memory probe, without saving, evaluating or reporting.

        Args:
            count: number of steps to train; reduced to the number of steps in the run if that is smaller.
            after_step: called with the number of finished steps and the number of steps to train.

        Returns:
            The number of trained steps, and their total time in seconds.
        """
        self._probe_memory()
        self._take_rewards()
        count = min(count, self._total_steps)
        started_at = time.perf_counter()
        for number in range(count):
            self.trainer.train_step(self._steps[number])
            after_step(number + 1, count)
        return count, time.perf_counter() - started_at

    def training_seconds(self) -> float:
        """Seconds since this attempt began to train, excluding evaluating, sampling, saving and resting."""
        return time.perf_counter() - self._started_at - self._overhead_s

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that this attempt trained on, over all processes and without padding."""
        return self.trainer.tokens - self._tokens_before

    def _planned_steps(self) -> Steps:
        run = self._run
        return Steps(
            run.step_plan,
            run.samples,
            run.shape,
            micro_batch=run.recipe.training.micro_batch_size,
            compares=self.trainer.objective is not None,
            pairs=run.recipe.trains_pairs,
            rank=run.dist.rank,
            world_size=run.dist.world_size,
        )

    def _begin(self) -> None:
        """Load the newest checkpoint if there is one, and probe memory.

        Then evaluate if the run is new, or if a stop interrupted the evaluation at the checkpoint's step.
        """
        checkpoint, trainer = self._run.checkpoint, self.trainer
        if checkpoint is None:
            self.progress.initial_weights = trained_weights_digest(trainer.model)
        else:
            trainer.load(checkpoint.folder)
            trainer.step = checkpoint.step
            trainer.tokens = self._tokens_before = checkpoint.state.tokens
            self.progress = RunProgress.restored_from(checkpoint.state)
            if self.progress.ends_with_epoch:
                # Show the request on the screens, because it was made in an earlier attempt.
                self._reporter.emit(RequestReceived(request="finish_epoch"))
                planned = self._run.step_plan.steps[trainer.step - 1]
                if planned.ends_epoch and trainer.step < self._total_steps:
                    self._is_over, self.reason = True, _EPOCH_DONE
            if trainer.step == self._pause_step:
                # The earlier process was killed between writing the checkpoint and recording its pause.
                self._is_over, self.outcome = True, "paused"
        self._probe_memory()
        # The probe's batch is not a step.
        self._take_rewards()
        if self.progress.evaluated_step < 0:
            self._evaluate_and_sample(last=False)
        elif self.progress.evaluation_due:
            self._evaluate_and_sample(last=trainer.step == self._total_steps)
        if not trainer.step:
            self._report_finding(too_few_steps(self._total_steps, self._run.recipe.training.max_steps))
        self._reporter.phase("training")
        self._emitted_at, self._emitted_tokens = time.perf_counter(), trainer.tokens
        self._started_at = time.perf_counter()
        self._overhead_s = 0.0
        if checkpoint is not None and trainer.step < self._total_steps:
            # Last, so that nothing draws random numbers between the restore and the step.
            trainer.load_random_numbers(checkpoint.folder)

    def _probe_memory(self) -> None:
        """Exempt layers from checkpointing as memory allows, and run a step on the longest micro-batch.

        A run that does not fit thus fails at once. Raises StopRequested.
        """
        run, size = self._run, self._run.recipe.training.micro_batch_size
        run.requests.raise_if_stop_requested()
        run.reporter.phase("probing", "memory, with one step on the longest batch")
        sequences = longest_micro_batch(run.step_plan, run.samples, size, padding_free=run.base.padding_free)
        tokens = computed_tokens(sequences, run.samples, padding_free=run.base.padding_free)
        run.meter.set_longest_batch(len(sequences), tokens, samples=sum(map(len, sequences)))
        self._keep_layers()
        self.trainer.try_step(self._steps.collate(sequences), fresh=run.checkpoint is None)
        run.reporter.emit(largest(run.dist.all_gather(run.meter.measure("probe"))))
        run.requests.raise_if_stop_requested()

    def _keep_layers(self) -> None:
        """Exempt layers from checkpointing as memory allows, if ``gradient_checkpointing`` is ``auto``."""
        run = self._run
        plan = run.meter.plan_kept_layers(
            run.max_kept_layers, lambda free_bytes: min(run.dist.all_gather(free_bytes))
        )
        if plan is None:
            return
        if not run.meter.is_modelled:
            replaced = ", ".join(run.base.replaced)
            run.reporter.health(
                "not_estimated",
                "The memory estimate does not account for code that this run uses "
                f"({replaced or run.base.attention}).",
                "Every layer is recomputed in the backward pass. gradient_checkpointing = off keeps all "
                "activations.",
            )
        if model.apply_kept_layers(run.base.model, plan.kept_layers):
            run.reporter.emit(
                LayersKept(
                    kept_layers=plan.kept_layers,
                    layers=plan.total_layers,
                    available_bytes=plan.available_bytes,
                    estimated_bytes=plan.estimate.process_bytes,
                )
            )

    def _after_micro_batch(self, done: int, total: int) -> None:
        self._reporter.update(micro_batch=done, micro_batches=total)
        with self._leaving_out_rests():
            self._run.between_batches()

    @contextmanager
    def _leaving_out_rests(self) -> Iterator[None]:
        """Exclude rests in this context from the training time."""
        rested_before_s = self._run.rest.seconds
        try:
            yield
        finally:
            rested_s = self._run.rest.seconds - rested_before_s
            self._overhead_s += rested_s
            self._emitted_at += rested_s

    def _end_step(self, result: StepResult, rewards: RewardSums) -> None:
        """Report a step, carry out requests, and evaluate, save or stop if it is due."""
        emitted = self._report_step(result, rewards, force=self.trainer.step == self._total_steps)
        self._unreported = None if emitted else (result, rewards)
        self._check_health(result)
        with self._leaving_out_rests():
            self._run.rest.take(self._reporter, self._run.requests)
        overhead_before_s = self._overhead_s
        self._act_between_steps(self._run.step_plan.steps[self.trainer.step - 1])
        spent_s = self._overhead_s - overhead_before_s
        # The speed of the next step is measured from the end of this work.
        self._emitted_at += spent_s
        if spent_s and not self._is_over:
            self._reporter.phase("training")
        if self._is_over and not emitted:
            # The last step of the attempt is reported regardless of log_every.
            self._report_step(result, rewards, force=True)

    def _take_rewards(self) -> RewardSums:
        """Return the rewards of all processes since the last call; empty sums without a preference method."""
        objective = self.trainer.objective
        if objective is None:
            return RewardSums()
        return RewardSums(*self._run.dist.all_reduce_sum(objective.take_sums()))

    def _act_between_steps(self, planned: PlannedStep) -> None:
        """Carry out requests, and evaluate, save and stop if it is due."""
        requests, step = self._run.requests, self.trainer.step
        requests.poll()
        rate = requests.take("set_learning_rate")
        if rate is not None and rate.value is not None and 0 < rate.value <= 1:
            self.trainer.set_learning_rate(rate.value)
        stop_kind = requests.stop_kind()
        self._take_finish_request()
        is_last = step == self._total_steps
        ends = is_last or (planned.ends_epoch and self.progress.ends_with_epoch)
        requested = {kind for kind in _STEP_REQUESTS if requests.take(kind)}
        if step == self._pause_step and not ends:
            stop_kind = stop_kind or "pause"
            requested.add("evaluate")
        training = self._run.recipe.training
        if self._is_due(training.eval_every, planned.ends_epoch or ends) or "evaluate" in requested:
            improved = self._evaluate_and_sample(last=ends)
            if reason := self._early_stop_reason():
                self.reason = reason
                self._is_over = True
            if improved and not ends:
                self._save()
        elif "sample" in requested:
            self._sample()
        if (
            self._is_due(training.checkpoint_every, planned.ends_epoch)
            or "checkpoint" in requested
            or ends
            or self._is_over
            or stop_kind
        ):
            self._save(force=bool(stop_kind))
        if stop_kind:
            self.outcome = "paused" if stop_kind == "pause" else "stopped"
        elif ends and not is_last:
            self.reason = _EPOCH_DONE
        if stop_kind or ends:
            self._is_over = True

    def _take_finish_request(self) -> None:
        if self._run.requests.take("finish_epoch"):
            self.progress.ends_with_epoch = True
            # A checkpoint already written at this step does not contain the request.
            self.progress.checkpoint_step = -1

    def _is_due(self, every: int, epoch_ends: bool) -> bool:
        """Return whether an action is due.

        It is due every ``every`` steps and after the last step. If ``every`` is 0, it is due at the end of
        each epoch instead.
        """
        step = self.trainer.step
        return epoch_ends if not every else step % every == 0 or step == self._total_steps

    def _abandon_step(self) -> None:
        """After StepAbandoned, save the run as it was after its last complete step, and stop.

        Raises:
            StopRequested: no step is complete, so there is nothing to save.
            OSError: the checkpoint cannot be written.
        """
        self.trainer.undo_unfinished_step()
        kind = self._run.requests.stop_kind() or "stop"
        if not self.trainer.step:
            raise StopRequested(kind)
        if self._unreported is not None:
            self._report_step(*self._unreported, force=True)
        self._take_finish_request()
        self._save(force=True)
        self.outcome = "paused" if kind == "pause" else "stopped"

    def _report_step(self, result: StepResult, rewards: RewardSums, *, force: bool) -> bool:
        """Report the step if ``log_every`` divides it, if its numbers are not finite, or with ``force``.

        Returns:
            Whether the step was reported.
        """
        loss, grad_norm, learning_rate = result
        step = self.trainer.step
        self._reporter.update(step=step, loss=_finite(loss), micro_batch=0)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if step % self._run.recipe.training.log_every and not force and is_finite:
            return False
        now, tokens = time.perf_counter(), self.trainer.tokens
        tokens_per_s = (tokens - self._emitted_tokens) / max(now - self._emitted_at, 1e-9)
        self._emitted_at, self._emitted_tokens = now, tokens
        self._reporter.emit(
            Step(
                step=step,
                epoch=self._run.step_plan.steps[step - 1].epoch,
                loss=_finite(loss),
                learning_rate=learning_rate,
                grad_norm=_finite(grad_norm),
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

    def _check_health(self, result: StepResult) -> None:
        """Report problems in a step. Raises UserError if training cannot recover."""
        step = self.trainer.step
        finding = find_non_finite(
            step, result.loss, result.grad_norm, norm_may_overflow=self.trainer.uses_fp16
        )
        if finding is not None:
            saved_step = self.progress.checkpoint_step
            hint = (
                f"the checkpoint at step {saved_step} was saved before it"
                if saved_step >= 0
                else "there is no checkpoint yet"
            )
            self._fail("Training diverged", finding, f"Training cannot recover from this; {hint}.")
        finding = self.overflow_monitor.check(step, is_skipped=self.trainer.skipped_step)
        if finding is not None:
            why = "Such a step is skipped, so the adapter learns nothing."
            self._fail("The gradients overflow float16", finding, why)
        for finding in self._monitor.check(step, result.loss, result.grad_norm):
            self._report_finding(finding)

    def _fail(self, title: str, finding: Finding, why: str) -> None:
        self._report_finding(finding, error=True)
        raise UserError(title, what=finding.evidence, why=why, fix=finding.remedy)

    def _report_finding(self, finding: Finding | None, *, error: bool = False) -> None:
        if finding is not None:
            step = self.trainer.step
            self._reporter.health(finding.kind, finding.evidence, finding.remedy, step=step, error=error)

    def _evaluate_and_sample(self, *, last: bool) -> bool:
        """Evaluate and sample; return whether the score of :meth:`RunProgress.add_score` is the best so far.

        ``last`` is true at the end of the run. With it, or if the run stops early, the model's answers to
        general prompts are also compared with those of the base, unless the recipe has 0 general prompts.
        """
        started_at = time.perf_counter()
        self.progress.evaluated_step = self.trainer.step
        has_data = self._evaluator.has_validation_data
        if not has_data and not self._run.recipe.training.sample_prompts:
            return False
        self.progress.evaluation_due = True
        self._run.requests.raise_if_stop_now()
        self._reporter.phase("evaluating")
        best = has_data and self._evaluate(last=last)
        self._sample()
        self.progress.evaluation_due = False
        self._overhead_s += time.perf_counter() - started_at
        return best

    def _evaluate(self, *, last: bool) -> bool:
        training, step = self._run.recipe.training, self.trainer.step
        loss, accuracy, rewards = self._evaluator.evaluate()
        forgetting, turn_ends = self._base_divergence.measure() if training.general_prompts else (None, None)
        score = loss + training.forgetting_weight * (forgetting or 0.0)
        best = self.progress.add_score(step, score, loss)
        general = None
        if training.general_prompts and step and (last or self._early_stop_reason()):
            general = self._base_divergence.count_answers()
        self._reporter.emit(
            Evaluated(
                step=step,
                loss=_finite(loss),
                best=best,
                before_training=self.progress.loss_before_training if step else None,
                accuracy=accuracy,
                reward_accuracy=rewards.accuracy,
                reward_margin=rewards.margin,
                forgetting=None if forgetting is None else _finite(forgetting),
                score=_finite(score) if training.forgetting_weight else None,
                general_turn_ends=turn_ends,
                general_answers=general,
            )
        )
        self._reporter.log(
            f"validation loss {loss:.4f}{_reward_words(rewards)} at step {step}{' (best)' if best else ''}"
        )
        self._report_finding(self._validation_monitor.check(step, loss, self.progress.loss_before_training))
        if forgetting is not None:
            self._report_finding(self._forgetting_monitor.check(step, forgetting, turn_ends))
        if general is not None:
            self._report_finding(check_general_answers(general))
        return best

    def _sample(self) -> None:
        run, step = self._run, self.trainer.step
        prompts = run.recipe.training.sample_prompts
        samples = generate_samples(run.model, run.tokenizer, prompts, run.device.torch_device, run.thinking)
        for prompt, answer in samples:
            run.reporter.emit(SampleGenerated(step=step, prompt=prompt, answer=answer))
            run.requests.poll_if_alone()
            if run.requests.ends_now:
                break

    def _early_stop_reason(self) -> str | None:
        patience = self._run.recipe.training.early_stopping
        if not patience or len(self.progress.scores_since_best) < patience:
            return None
        weighted = " with forgetting" if self._run.recipe.training.forgetting_weight else ""
        return f"the validation loss{weighted} did not improve in {patience} evaluations"

    def _save(self, *, force: bool = False) -> None:
        """Write a checkpoint unless this step already has one, and delete old ones.

        A full or failing disk loses only the checkpoint, not the run. Raises OSError with ``force``.
        """
        run, progress, step = self._run, self.progress, self.trainer.step
        if progress.checkpoint_step == step:
            return
        started_at = time.perf_counter()
        run.reporter.phase("saving", f"checkpoint at step {step}")
        state = CheckpointState(
            step=step,
            tokens=self.trainer.tokens,
            data_hash=run.data.data_hash,
            padding_free=run.base.padding_free,
            recipe=dump(run.recipe),
            base_hash=run.base_hash,
            best_step=progress.best_step,
            best_score=progress.best_score,
            loss_before_training=progress.loss_before_training,
            initial_weights=progress.initial_weights,
            scores_since_best=tuple(progress.scores_since_best),
            evaluation_due=progress.evaluation_due,
            ends_with_epoch=progress.ends_with_epoch,
        )
        try:
            folder = checkpoints.write(run.directory, state, self.trainer.save, run.dist)
        except OSError as error:
            if force:
                raise
            self._report_unsaved(error)
        else:
            progress.checkpoint_step = step
            relative = str(folder.relative_to(run.directory.path))
            run.reporter.emit(CheckpointSaved(step=step, folder=relative))
            if run.dist.is_main_process:
                # A checkpoint that cannot be deleted now is deleted after the next one.
                with suppress(OSError):
                    keep = run.recipe.training.keep_checkpoints
                    checkpoints.prune(run.directory, keep, progress.best_step)
        self._overhead_s += time.perf_counter() - started_at

    def _report_unsaved(self, error: OSError) -> None:
        step = self.trainer.step
        problem = disk_problem(error, self._run.directory.checkpoints_dir)
        reason = uncapitalize(problem.title) if problem else str(error)
        self._reporter.log(f"checkpoint at step {step}: {error}")
        self._reporter.health(
            "disk_full" if is_full_disk(error) else "checkpoint_unwritten",
            f"The checkpoint at step {step} could not be written: {reason}.",
            "Training continues, and earlier checkpoints are kept. "
            + (f"{problem.why} {problem.fix}".strip() if problem else "Details are in the log."),
            step=step,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reward_words(rewards: RewardSums) -> str:
    if rewards.accuracy is None:
        return ""
    margin = "" if rewards.margin is None else f"  margin {rewards.margin:.4f}"
    return f"  right {rewards.accuracy:.0%}{margin}"
