"""Runs a step on the longest micro-batch before training, so that a run that does not fit fails at once.

Everything it changes is restored: adapter, optimizer, gradients and random numbers.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from qlora_tui.runs.events import LayersKept
from qlora_tui.training import model_loading
from qlora_tui.training.batches import PackedSamples, StepPlan, computed_tokens, micro_batches
from qlora_tui.training.optimizers import reset_states
from qlora_tui.training.prepared_run import PreparedRun
from qlora_tui.training.tokenized_dataset import TokenizedDataset
from qlora_tui.training.trainer import RunTrainer


def probe_longest_batch(prepared: PreparedRun, trainer: RunTrainer) -> None:
    """Exempt layers from checkpointing as memory allows, probe, and report the memory that it took.

    Raises:
        StopRequested: a stop or pause was requested meanwhile.
    """
    samples, padding_free = prepared.samples, prepared.base.padding_free
    prepared.requests.raise_if_stop_requested()
    prepared.reporter.phase("probing", "memory, with one step on the longest batch")
    sequences = longest_micro_batch(
        prepared.step_plan, samples, prepared.recipe.training.micro_batch_size, padding_free=padding_free
    )
    prepared.meter.set_longest_batch(
        len(sequences),
        computed_tokens(sequences, samples, padding_free=padding_free),
        samples=sum(map(len, sequences)),
    )
    _apply_kept_layers(prepared)
    probe_memory(trainer, sequences, fresh=prepared.checkpoint is None)
    prepared.reporter.emit(prepared.meter.measure("probe"))
    prepared.requests.raise_if_stop_requested()


def _apply_kept_layers(prepared: PreparedRun) -> None:
    """Exempt layers from checkpointing as memory allows, if ``gradient_checkpointing`` is ``auto``."""
    plan = prepared.meter.plan_kept_layers(prepared.max_kept_layers)
    if plan is not None and not prepared.meter.is_modelled:
        replaced = ", ".join(prepared.base.replaced)
        prepared.reporter.health(
            "not_estimated",
            f"The memory estimate has no model of this run's code ({replaced or prepared.base.attention}).",
            "Every layer is recomputed in the backward pass. gradient_checkpointing = off would keep all.",
        )
    if plan is None or not model_loading.apply_kept_layers(prepared.base.model, plan.kept_layers):
        return
    prepared.reporter.emit(
        LayersKept(
            at=time.time(),
            kept_layers=plan.kept_layers,
            layers=plan.total_layers,
            available_bytes=plan.available_bytes,
            estimated_bytes=plan.estimate.process_bytes,
        )
    )


def longest_micro_batch(
    step_plan: StepPlan, samples: TokenizedDataset, size: int, *, padding_free: bool
) -> list[PackedSamples]:
    """The sequences of the micro-batch with most computed tokens, padding included."""
    longest: list[PackedSamples] = []
    most = 0
    for step in step_plan.steps:
        for sequences in micro_batches(step.sequences, size):
            tokens = computed_tokens(sequences, samples, padding_free=padding_free)
            if tokens > most:
                most, longest = tokens, list(sequences)
    return longest


def probe_memory(trainer: RunTrainer, sequences: list[PackedSamples], *, fresh: bool) -> None:
    """Run forward and backward, and with ``fresh`` the optimizer step; a resumed run has optimizer states."""
    model: Any = trainer.model_wrapped
    batch = trainer.steps.collate(sequences)
    items = max(1, int((batch["labels"][:, 1:] >= 0).sum()))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]  # it is set
    before = [p.detach().to("cpu", copy=True) for p in trained] if fresh else []
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        loss = trainer.summed_loss(model, batch) / items
        torch.autograd.backward(loss)
        if fresh:
            _step(trainer)
    model.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=False):
            parameter.copy_(value)


def _step(trainer: RunTrainer) -> None:
    """Step the bare optimizer, without loss scaling, and reset its states to their initial values.

    The states stay allocated, as they are in every step but the first.
    """
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    trainer.release_before_step()
    optimizer.step()
    reset_states(optimizer)
