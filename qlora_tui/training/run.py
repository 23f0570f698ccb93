"""One attempt at a run: its inputs, and everything that :mod:`.setup` has loaded for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.dataset import PreparedDataset
from qlora_tui.data.dataset_report import prompt_thinking
from qlora_tui.data.step_plan import StepPlan, TokenizedDataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.directory import RunDir
from qlora_tui.training.adapter import StartingAdapter
from qlora_tui.training.batches import RowShape
from qlora_tui.training.checkpoints import Checkpoint
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.model import PreparedBase
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.rest import Rest


@dataclass(kw_only=True, eq=False, repr=False)
class Run:
    """Everything that training, validation and saving read. ``setup`` sets the fields that are not passed to
    the constructor.
    """

    directory: RunDir
    recipe: Recipe
    """The settings that this attempt trains with.

    They are the run's recipe with the changes of the retry plan, and with the settings that ``setup`` chooses
    to fit the free memory.
    """
    checkpoint: Checkpoint | None
    """The checkpoint from which the attempt resumes; None at the beginning of a run."""
    reporter: Reporter
    requests: ControlRequests
    dist: DistributedContext
    max_kept_layers: int | None = None
    """Maximum number of layers that may keep their activations, lowered after running out of memory."""
    has_run_out: bool = False
    """Whether an earlier attempt ran out of memory."""
    keeps_files: bool = True
    """Whether files are written to ``directory``. If False, the folder need not exist."""

    rest: Rest = field(default_factory=Rest, init=False)
    """Makes the run wait while its GPU is too hot or takes too much power."""
    device: ComputeDevice = field(init=False)
    files: ModelFiles = field(init=False)
    """Files that the model was loaded from."""
    base_hash: str = field(init=False)
    """Identity of the model's weight files, which a resume compares."""
    meter: MemoryMeter = field(init=False)
    tokenizer: ChatTokenizer = field(init=False)
    data: PreparedDataset = field(init=False)
    """Tokenized training and validation samples."""
    base: PreparedBase = field(init=False)
    """The frozen base model, with the loss and attention that were verified on it."""
    samples: TokenizedDataset = field(init=False)
    """The training samples of ``data``, with the base's answers if some are replayed."""
    step_plan: StepPlan = field(init=False)
    """The sequences of every optimizer step of the run."""
    model: Any = field(init=False)
    """The base model with its adapter (``peft.PeftModel``)."""
    starting_adapter: StartingAdapter | None = field(init=False)
    """The adapter that the run started from, if it is the reference of a preference method; else None."""

    def between_batches(self) -> None:
        """Rest if the GPU requires it, and raise StepAbandoned if the run must end at once."""
        self.rest.take(self.reporter, self.requests)
        self.requests.raise_if_stop_now()

    @property
    def shape(self) -> RowShape:
        """How samples are laid out in the model's inputs."""
        return RowShape(
            packed=self.base.padding_free,
            # The value does not matter if the tokenizer has no such token.
            pad_id=self.tokenizer.pad_id or 0,
            multiple=self.device.row_multiple,
            max_length=self.recipe.data.max_length,
        )

    @property
    def thinking(self) -> Thinking:
        """Thinking setting of the chat template for sample prompts."""
        return prompt_thinking(self.recipe.data.thinking, self.data.notes)
