"""One optimizer step, and the state that a resume needs: weights, optimizer, schedule and random numbers.

accelerate wraps model and optimizer: it scales the loss under fp16, and averages gradients over processes.
:mod:`.loop` determines the steps, and the work between them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import set_seed
from transformers.trainer_pt_utils import safe_globals

from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.adapter import load_adapter, save_adapter
from qlora_tui.training.batches import StepData, on_device
from qlora_tui.training.checkpoints import UnloadableCheckpoint, save_with_torch
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.embeddings import EmbeddingNoise, trained_matrices
from qlora_tui.training.failures import true_disk_errors
from qlora_tui.training.host import release_free_memory, release_gpu_memory
from qlora_tui.training.optimizers import change_rate, create_optimizer, create_schedule, wait_for_gpu
from qlora_tui.training.preferences import PreferenceObjective


class StepResult(NamedTuple):
    """The results of one optimizer step."""

    loss: float
    """Weighted mean over the tokens in the loss, over all processes."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """The learning rate of this step."""


class Trainer:
    """Computes optimizer steps of a model.

    Args:
        model: a ``PeftModel``.
        steps: number of optimizer steps of the whole run.
        objective: objective of a preference method; batches must be collated for it. None for cross-entropy.
    """

    def __init__(
        self,
        model: Any,
        training: Training,
        device: ComputeDevice,
        steps: int,
        objective: PreferenceObjective | None = None,
    ) -> None:
        set_seed(training.seed)
        release_gpu_memory()
        self.model = model
        self.objective = objective
        self.step = 0
        """Number of finished optimizer steps, over all attempts."""
        self.tokens = 0
        """Number of tokens trained on so far, over all attempts and processes and without padding."""
        self.uses_fp16 = device.kind == "cuda" and device.dtype == torch.float16
        self._training = training
        self._steps = steps
        self._device = device.torch_device
        self._noise = EmbeddingNoise(model, training.neftune_alpha)
        self._step_start: RandomNumberState | None = None
        """Random state at the start of the current step."""
        self._accelerator = Accelerator(
            mixed_precision="fp16" if self.uses_fp16 else "no",
            cpu=device.kind == "cpu",
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    find_unused_parameters=False,
                    # Gradients share memory with DDP's buckets.
                    gradient_as_bucket_view=True,
                )
            ],
        )
        self.wrapped, self.optimizer = self._accelerator.prepare(model, create_optimizer(model, training))
        """The model as called in a step; with several processes, DDP's wrapper."""
        self.schedule = create_schedule(self.optimizer, training, steps)
        self.wrapped.zero_grad()

    @property
    def skipped_step(self) -> bool:
        """Whether fp16 skipped the last step because its gradients overflowed."""
        return bool(self._accelerator.optimizer_step_was_skipped)

    def train_step(
        self, data: StepData, after_micro_batch: Callable[[int, int], None] = lambda done, total: None
    ) -> StepResult:
        """Run one optimizer step.

        Args:
            after_micro_batch: called after each micro-batch except the last, with the number of finished
                micro-batches and the total number.
        """
        loss = self.accumulate_gradients(data, after_micro_batch)
        limit = self._training.max_grad_norm or float("inf")
        grad_norm = self._accelerator.clip_grad_norm_(self.wrapped.parameters(), limit)
        self.optimizer.step()
        learning_rate = self.schedule.get_last_lr()[0]
        if not self.skipped_step:
            self.schedule.step()
        self.wrapped.zero_grad()
        self.step += 1
        mean_loss = self._accelerator.gather(loss.reshape(1)).mean()
        return StepResult(float(mean_loss), float(grad_norm), float(learning_rate))

    def accumulate_gradients(
        self, data: StepData, after_micro_batch: Callable[[int, int], None]
    ) -> torch.Tensor:
        """Run forward and backward over all micro-batches of a step; return the weighted mean loss."""
        batches = data["micro_batches"]
        # DDP averages gradients over processes, but the divisor counts all processes, so the gradients must
        # be summed.
        share = self._accelerator.num_processes / (data["loss_weight_sum"] or 1)
        self._step_start = RandomNumberState.capture(self._device)
        self.wrapped.train()
        if self.objective is not None and self.objective.needs_divergence:
            self._estimate_divergence(self.objective, data["mismatched"])
        total = torch.zeros((), device=self._device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self.wrapped):
                loss = self.summed_loss(batch, data.get("token_share", 1.0)) * share
                self._accelerator.backward(loss)
            total += loss.detach()
            if not last:
                after_micro_batch(number, len(batches))
        self.tokens += data["tokens"]
        self._step_start = None
        self._release_before_step()
        return total

    def summed_loss(self, batch: dict[str, Any], token_share: float = 1.0) -> torch.Tensor:
        """Return the summed losses of a micro-batch, which the caller divides by the step's loss weights.

        Args:
            token_share: weight of one token in ORPO's cross-entropy, relative to the weight of a pair.
        """
        tensors = on_device(batch, self._device)
        if self.objective is not None:
            return self.objective.summed_loss(self.wrapped, self.model, tensors, token_share)
        with self._noise.scaled_for(tensors):
            # The forward is that of loss.use_loss. With 1 it returns the sum; the caller divides by loss
            # weights.
            loss: torch.Tensor = self.wrapped(**tensors, num_items_in_batch=1).loss
        return loss

    def _estimate_divergence(self, objective: PreferenceObjective, mismatched: list[dict[str, Any]]) -> None:
        """Estimate KTO's reference point from the mismatched samples of a step, over all processes."""
        parts = [objective.divergence(self.model, on_device(batch, self._device)) for batch in mismatched]
        sums = torch.tensor([[total, count] for total, count in parts] or [[0.0, 0.0]]).sum(0)
        total, count = self._accelerator.reduce(sums.to(self._device), "sum").tolist()
        objective.set_divergence(total / count if count else 0.0)

    def _release_before_step(self) -> None:
        """On a CPU, return free memory to the system before a trained embedding is updated.

        glibc keeps the pages that the backward has freed. The update needs several times the size of the
        embedding's matrix, which glibc would allocate in addition to these pages.
        """
        if self._device.type == "cpu" and trained_matrices(self.model):
            release_free_memory()

    def try_step(self, batch: dict[str, Any], *, fresh: bool) -> None:
        """Run a step of one micro-batch to measure its memory, then restore weights and random numbers.

        Args:
            batch: A batch on the CPU.
            fresh: True if the run is not resumed. The optimizer then also updates the weights, without loss
                scaling. This allocates the optimizer's states, which every step of a run except the first
                finds allocated. The states are then reset, but stay allocated. A resumed run already has
                them.
        """
        items = max(1, int((batch["labels"][:, 1:] >= 0).sum()))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().to("cpu", copy=True) for p in trained] if fresh else []
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            self.wrapped.train()
            torch.autograd.backward(self.summed_loss(batch) / items)
            if fresh:
                bare = getattr(self.optimizer, "optimizer", self.optimizer)
                self._release_before_step()
                bare.step()
                _reset_states(bare)
        self.wrapped.zero_grad()
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=False):
                parameter.copy_(value)

    def undo_unfinished_step(self) -> None:
        """Discard the gradients of an unfinished step, and restore the random state from before the step."""
        if self._step_start is not None:
            self._step_start.restore(self._device)
            self._step_start = None
        self.model.zero_grad(set_to_none=True)

    def set_learning_rate(self, value: float) -> None:
        """Change the learning rate of the remaining steps (:func:`.optimizers.change_rate`)."""
        change_rate(self.schedule, value, self._training, step=self.step, steps=self._steps)

    def save(self, folder: Path) -> None:
        """Write the files that :meth:`load` and :meth:`load_random_numbers` read. Raises OSError.

        Each process writes its random state. The main process writes everything else.
        """
        with true_disk_errors():
            wait_for_gpu()
            if self._accelerator.is_main_process:
                save_adapter(self.model, folder)
                save_with_torch(self.optimizer.state_dict(), folder / "optimizer.pt")
                save_with_torch(self.schedule.state_dict(), folder / "scheduler.pt")
                if self._accelerator.scaler is not None:
                    save_with_torch(self._accelerator.scaler.state_dict(), folder / "scaler.pt")
            save_with_torch(
                RandomNumberState.capture(self._device)._asdict(), folder / self._random_numbers_file
            )

    def load(self, folder: Path) -> None:
        """Restore weights, optimizer, schedule and loss scale. Raises UnloadableCheckpoint."""
        with _loading(folder):
            load_adapter(self.model, folder)
            # Load into host memory, unless several processes would each load a copy there.
            is_shared = self._accelerator.num_processes > 1
            where = self._device if is_shared and self._device.type != "cpu" else "cpu"
            self.optimizer.load_state_dict(
                torch.load(folder / "optimizer.pt", map_location=where, weights_only=True)
            )
            self.schedule.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
            if self._accelerator.scaler is not None and (folder / "scaler.pt").is_file():
                self._accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))

    def load_random_numbers(self, folder: Path) -> None:
        """Restore the random state of a checkpoint. Raises UnloadableCheckpoint."""
        with _loading(folder):
            file = folder / self._random_numbers_file
            # A checkpoint of another number of processes has no random state for this process.
            if file.is_file():
                with safe_globals():  # type: ignore[no-untyped-call]  # transformers'
                    state = torch.load(file, weights_only=True)
                RandomNumberState.read(state, self._device).restore(self._device)

    @property
    def _random_numbers_file(self) -> str:
        rank = self._accelerator.process_index
        return "rng_state.pth" if self._accelerator.num_processes == 1 else f"rng_state_{rank}.pth"


class RandomNumberState(NamedTuple):
    """The random state of a process at one moment."""

    python: tuple[Any, ...]
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None = None
    """Random state of the training device; None on the CPU."""

    @classmethod
    def capture(cls, device: torch.device) -> RandomNumberState:
        """Capture the current state, without waiting for the device."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    @classmethod
    def read(cls, state: dict[str, Any], device: torch.device) -> RandomNumberState:
        """Read the state in a checkpoint."""
        return cls(state["python"], state["numpy"], state["cpu"], state.get("cuda"))

    def restore(self, device: torch.device) -> None:
        """Restore the random state, so that the same numbers are drawn again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Raise UnloadableCheckpoint for every error in loading a checkpoint except out of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnloadableCheckpoint(folder, error) from error


def _reset_states(optimizer: Any) -> None:
    """Set the states of an optimizer to their initial values; they stay allocated."""
    on_host = []
    for state in optimizer.state.values():
        for name, value in state.items():
            # bitsandbytes' code tables are constant.
            if torch.is_tensor(value) and not name.startswith("qmap"):
                if value.device.type == "cpu":
                    on_host.append(value)
                else:
                    value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)
    wait_for_gpu()
    for value in on_host:
        value.zero_()
