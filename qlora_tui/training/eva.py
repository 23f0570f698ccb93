"""EVA: starts A's matrices as the main directions of each module's inputs (arXiv 2410.07170).

The directions are those of peft (``tuners/lora/eva.py``), at the rank of the recipe for every module: peft's
own redistribution of ranks would change the adapter after its memory was estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.training.adapter import targets_by_name
from qlora_tui.training.base_model import PreparedBase
from qlora_tui.training.batches import StepPlan, collate, micro_batches, on_device
from qlora_tui.training.chunked_loss import IGNORED, loss_positions
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.prepared_run import AttemptContext
from qlora_tui.training.tokenized_dataset import TokenizedDataset

MAX_PASSES = 1000
"""Forward passes after which the directions of some module count as not settling."""
_EVA_STEPS = 100
"""Steps whose data EVA looks at, again and again until the directions settle."""
_MAX_HASHED = 64
"""Trained tokens of the first pass, in which peft compares the inputs of modules as Python numbers."""


class NotConvergedError(Exception):
    """The directions of some module still change after :data:`MAX_PASSES`."""


def run_directions(
    context: AttemptContext,
    files: ModelFiles,
    device: ComputeDevice,
    base: PreparedBase,
    tokenizer: ChatTokenizer,
    samples: TokenizedDataset,
    step_plan: StepPlan,
) -> dict[str, Tensor]:
    """Return what the A matrices of a run start as; empty without EVA, and where a checkpoint has them.

    Raises UserError, and StopRequested where a stop or pause was requested meanwhile.
    """
    recipe, reporter = context.recipe, context.reporter
    if recipe.lora.init_weights != "eva" or context.checkpoint is not None:
        return {}
    reporter.phase("loading", "the main directions of the inputs of each module (EVA)")
    names = targets_by_name(base.model, recipe.lora, files.architecture)
    batches = [
        collate(
            sequences,
            samples,
            padding_free=base.padding_free,
            pad_id=tokenizer.pad_id or 0,
            multiple=device.row_multiple,
        )
        for step in step_plan.steps[:_EVA_STEPS]
        for sequences in micro_batches(step.sequences, recipe.training.micro_batch_size)
    ]

    def report_pass(number: int) -> None:
        reporter.progress("loading", number, MAX_PASSES)
        if context.dist.world_size == 1:
            context.requests.raise_if_stop_requested()

    linear = [name for name, module in names.items() if module.part != "expert"]
    return main_directions(base.model, linear, recipe.lora.rank, batches, device.torch_device, report_pass)


def main_directions(
    model: Any,
    names: Sequence[str],
    rank: int,
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    on_pass: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return (rank, inputs) for each module: the right singular vectors of its inputs at trained tokens.

    Args:
        model: the base, without an adapter.
        names: full names of the linear modules.
        batches: micro-batches, of :func:`qlora_tui.training.batches.collate`; they are repeated as needed.
        on_pass: called with the number of each forward pass.

    Raises:
        UserError: no batch has as many trained tokens as ``rank``, or the directions do not settle.
    """
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    usable = [batch for batch in batches if int((batch["labels"] >= 0).sum()) >= rank]
    if not usable:
        raise _unusable(f"no micro-batch has {rank} trained tokens, as many as the rank")
    passes = 0

    def forward(model: Any, batch: dict[str, Any]) -> None:
        nonlocal passes
        passes += 1
        if passes > MAX_PASSES:
            raise NotConvergedError
        on_pass(passes)
        # 1: the loss is not used, but without labels the model would compute all logits.
        model(**batch, num_items_in_batch=1)

    config = LoraConfig(
        r=rank,
        target_modules=list(names),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    try:
        directions: dict[str, Tensor] = get_eva_state_dict(
            model,
            _Batches(usable, device),
            config,
            forward,
            # Each process of a run computes the same.
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except NotConvergedError:
        raise _unusable(f"the main directions of some module did not settle in {MAX_PASSES} passes") from None
    return directions


def set_main_directions(model: Any, directions: dict[str, Tensor]) -> None:
    """Set A of each module of a new adapter to its directions; B stays 0, so the model does not change."""
    for name, module in model.base_model.model.named_modules():
        if name in directions:
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(directions[name])


class _Batches:
    """Batches on the device for peft, which takes the first one twice: to compare inputs, it is cut short."""

    def __init__(self, batches: Sequence[dict[str, Any]], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self._is_first = True

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            first, self._is_first = self._is_first, False
            yield on_device(_with_fewer_labels(batch) if first else batch, self._device)


def _with_fewer_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its first :data:`_MAX_HASHED` labels only."""
    labels = batch["labels"]
    number = (labels >= 0).flatten().cumsum(0).view_as(labels)
    fewer = labels.masked_fill(number > _MAX_HASHED, IGNORED)
    return batch | {"labels": fewer, "loss_positions": loss_positions(fewer)}


def _unusable(why: str) -> UserError:
    return UserError(
        "EVA cannot start this adapter",
        what=f'lora.init_weights is "eva", and {why}.',
        fix='Lower Rank (lora.rank), or set lora.init_weights = "random".',
    )
