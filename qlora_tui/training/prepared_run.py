"""What the parts of the trainer pass to each other: an attempt's inputs, and the run once it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.dataset import PreparedDataset
from qlora_tui.data.thinking_facts import prompt_thinking
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.directory import RunDir
from qlora_tui.training.base_model import PreparedBase
from qlora_tui.training.batches import StepPlan
from qlora_tui.training.checkpoints import Checkpoint
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.preference.starting_adapter import StartingAdapter
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.tokenized_dataset import TokenizedDataset


@dataclass(frozen=True, kw_only=True)
class AttemptContext:
    """The inputs of one attempt at a run, and its connections to the outside."""

    run: RunDir
    recipe: Recipe
    """As this attempt trains it, with the retry plan applied."""
    checkpoint: Checkpoint | None
    """Where the attempt resumes; None at the beginning of a run."""
    reporter: Reporter
    requests: ControlRequests
    dist: DistributedContext
    max_kept_layers: int | None = None
    """The most layers that may keep their activations; a retry after running out of memory lowers it."""
    has_run_out: bool = False
    """Whether an earlier attempt ran out of memory."""


@dataclass(frozen=True, kw_only=True)
class PreparedRun(AttemptContext):
    """An attempt with model and data loaded and verified: all that training, validation and saving read."""

    device: ComputeDevice
    files: ModelFiles
    """Where the model came from."""
    base_hash: str
    """Identity of its weight files, which a resume compares."""
    tokenizer: ChatTokenizer
    data: PreparedDataset
    """Tokenized training and validation samples."""
    samples: TokenizedDataset
    """The training samples of ``data``, with the base's answers where some are replayed."""
    base: PreparedBase
    """The frozen base model, with the loss and attention that were verified on it."""
    model: Any
    """The base model with its adapter (``peft.PeftModel``)."""
    step_plan: StepPlan
    """The sequences of every optimizer step of the run."""
    meter: MemoryMeter
    starting_adapter: StartingAdapter | None = None
    """The adapter that the run started from, where it compares its answers with that one's."""

    @property
    def pad_id(self) -> int:
        """The token that fills sequences; its value does not matter where the tokenizer has none."""
        return self.tokenizer.pad_id or 0

    @property
    def thinking(self) -> Thinking:
        """The thinking switch of the chat template for sample prompts."""
        return prompt_thinking(self.recipe.data.thinking, self.data.notes)
