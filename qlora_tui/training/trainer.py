"""transformers' ``Trainer``, which is given whole optimizer steps instead of batches.

One item of its data loader is a whole optimizer step, already split into micro-batches, and the run is one
long epoch. So transformers counts in steps, and its own code handles resuming, clipping, mixed precision,
optimizers, schedules and several processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from qlora_tui.recipe.schema import Recipe, Training
from qlora_tui.training.batches import on_device
from qlora_tui.training.checkpoints import UnloadableCheckpoint
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.disk_errors import true_disk_errors
from qlora_tui.training.embedding_noise import EmbeddingNoise
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.heap import release_free_memory
from qlora_tui.training.lr_schedule import SCHEDULES, create_schedule, schedule_arguments
from qlora_tui.training.optimizers import (
    OPTIMIZERS,
    create_optimizer,
    optimizer_class_and_options,
    wait_for_gpu,
)
from qlora_tui.training.preference.objective import PreferenceObjective
from qlora_tui.training.random_numbers import RandomNumberState
from qlora_tui.training.step_dataset import StepData, StepDataset
from qlora_tui.training.trained_embeddings import trained_matrices


class RunArguments(TrainingArguments):
    """``TrainingArguments`` of a process that uses one GPU, though it may see several."""

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process; for several ``Trainer`` would use ``DataParallel``."""
        visible: int = super().n_gpu
        return min(visible, 1)


def training_arguments(recipe: Recipe, device: ComputeDevice, steps: int, folder: Path) -> TrainingArguments:
    """The recipe as ``TrainingArguments``; evaluation and checkpoints are done by ``RunCallback``."""
    training = recipe.training
    return RunArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULES[training.lr_scheduler],
        lr_scheduler_kwargs=schedule_arguments(training, steps),
        warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
        optim=OPTIMIZERS[training.optimizer],
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,  # a norm that is NaN ends the run: health.find_non_finite
        seed=training.seed,
        fp16=device.kind == "cuda" and device.dtype == torch.float16,
        use_cpu=device.kind == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


class RunTrainer(Trainer):
    """Trains the planned steps of a run.

    Args:
        training: the settings that ``TrainingArguments`` has no place for: optimizer, LoRA+, NEFTune.
        objective: that of a preference method, whose batches ``steps`` has; None for cross-entropy.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        steps: StepDataset,
        training: Training,
        objective: PreferenceObjective | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=steps)
        self.objective: PreferenceObjective | None = objective
        self.remove_callback(PrinterCallback)
        self.steps = steps
        self.tokens = 0
        """Real tokens trained on so far, over all attempts and processes."""
        self.after_micro_batch: Callable[[int, int], None] = lambda done, total: None
        """Called with the micro-batches done and in all, except after the last of a step."""
        self._training = training
        self._noise = EmbeddingNoise(model, training.neftune_alpha)
        self._step_start: RandomNumberState | None = None
        """Random numbers at the start of the step in progress."""

    def get_train_dataloader(self) -> DataLoader[StepData]:
        """The steps in order. A separate generator, so that it draws none of the run's random numbers."""
        return DataLoader(
            self.steps, batch_size=1, shuffle=False, collate_fn=_first, generator=torch.Generator()
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer of :mod:`.optimizers`, or transformers' own."""
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.model, self.args, self._training)
        return super().create_optimizer(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Return what transformers creates an optimizer from."""
        return optimizer_class_and_options(args, model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Create the schedule of :mod:`.lr_schedule`."""
        scheduled: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = create_schedule(scheduled, self.args, num_training_steps)
        return self.lr_scheduler

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward over all micro-batches of a step; returns the weighted mean loss."""
        batches = inputs["micro_batches"]
        weight_sum = inputs["loss_weight_sum"] or 1
        # DDP averages gradients over processes, but ``weight_sum`` is that of all: they must be summed.
        share = self.accelerator.num_processes / weight_sum
        self._step_start = RandomNumberState.capture(self.args.device)
        model.train()
        if self.objective is not None and self.objective.needs_divergence:
            self._estimate_divergence(self.objective, inputs["mismatched"])
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self.summed_loss(model, batch, inputs.get("token_share", 1.0)) * share
                self.accelerator.backward(loss)
            total += loss.detach()
            if not last:
                self.after_micro_batch(number, len(batches))
        self.tokens += inputs["tokens"]
        self._step_start = None
        self.release_before_step()
        return total

    def release_before_step(self) -> None:
        """On a CPU, return what the backward has freed to the system before a trained embedding is updated.

        The update takes several times its matrix, and glibc would take that beside its free pages.
        """
        if self.args.device.type == "cpu" and trained_matrices(self.model):  # type: ignore[arg-type]  # it is set
            release_free_memory()

    def summed_loss(self, model: Any, batch: dict[str, Any], token_share: float = 1.0) -> torch.Tensor:
        """Sum of the losses of a micro-batch, to be divided by the loss weights of its step.

        Args:
            token_share: what a token of ORPO's cross-entropy counts beside a pair.
        """
        tensors = on_device(batch, self.args.device)
        if self.objective is not None:
            return self.objective.summed_loss(model, self.model, tensors, token_share)
        with self._noise.scaled_for(tensors):
            # 1: the model returns the summed loss; the caller divides it by the step's loss weights.
            loss: torch.Tensor = model(**tensors, num_items_in_batch=1).loss
        return loss

    def _estimate_divergence(self, objective: PreferenceObjective, mismatched: list[dict[str, Any]]) -> None:
        """Estimate KTO's reference point from all answers of a step, over all processes."""
        parts = [objective.divergence(self.model, on_device(batch, self.args.device)) for batch in mismatched]
        sums = torch.tensor([[total, count] for total, count in parts] or [[0.0, 0.0]]).sum(0)
        total, count = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        objective.set_divergence(total / count if count else 0.0)

    def undo_unfinished_step(self) -> None:
        """Restore what the step in progress has changed: gradients and random numbers."""
        if self._step_start is not None:
            self._step_start.restore(self.args.device)
            self._step_start = None
        self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]  # it is set

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass logs to the callbacks without keeping them.

        transformers would append each to ``state.log_history``, which every checkpoint would hold again.
        """
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def set_learning_rate(self, value: float) -> None:
        """Change the learning rate of the steps to come, and let it decay as it would have.

        ``value`` is the rate of the next step; during warm-up, and with restarts, which return to the peak,
        it is the peak. With LoRA+ it is the rate of A's matrices, and B's keep their ratio to it.
        """
        scheduler: Any = self.lr_scheduler
        share = scheduler.get_last_lr()[0] / scheduler.base_lrs[0]
        if share <= 0:
            return
        warming_up = self.state.global_step < self.args.get_warmup_steps(self.state.max_steps)
        restarts = self.args.lr_scheduler_type == SCHEDULES["cosine_with_restarts"]
        peak = value if warming_up or restarts else value / share
        factor = peak / scheduler.base_lrs[0]
        scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]
        scheduler._last_lr = [base * share for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def save_checkpoint_files(self, folder: Path) -> None:
        """Write adapter, optimizer, schedule, random numbers and counters. Raises OSError."""
        with true_disk_errors():
            if self.args.should_save:
                save_adapter(self.model, folder)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            wait_for_gpu()
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _loading(resume_from_checkpoint):
            load_adapter(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _loading(checkpoint: str | None) -> Iterator[None]:
    """Raise UnloadableCheckpoint for every error in loading a checkpoint except out of memory."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or is_out_of_memory(error):
            raise
        raise UnloadableCheckpoint(Path(checkpoint), error) from error


def save_adapter(model: Any, folder: Path) -> None:
    """Save weights and configuration of the adapter in peft's format, and nothing else."""
    # peft would also write a model card, from a template that it compiles for each checkpoint.
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(model: Any, folder: Path) -> None:
    """Replace the adapter weights of the model by saved ones."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def _first(items: list[StepData]) -> StepData:
    return items[0]
