"""What suggested settings rest on: publications, and earlier runs."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.recipe.schema import Recipe


@dataclass(frozen=True)
class Reference:
    """A publication that a figure comes from."""

    name: str
    url: str


QLORA = Reference("QLoRA paper", "https://arxiv.org/abs/2305.14314")
WITHOUT_REGRET = Reference("LoRA Without Regret", "https://thinkingmachines.ai/blog/lora/")
TRL = Reference("TRL's guide", "https://huggingface.co/docs/trl/lora_without_regret")
CAPACITY = Reference("Physics of Language Models 3.3", "https://arxiv.org/abs/2404.05405")
LIMA = Reference("LIMA paper", "https://arxiv.org/abs/2305.11206")
UNSLOTH = Reference(
    "Unsloth's guide",
    "https://unsloth.ai/docs/get-started/fine-tuning-llms-guide/lora-hyperparameters-guide",
)
LION = Reference("Lion paper", "https://arxiv.org/abs/2302.06675")


@dataclass(frozen=True)
class PastRun:
    """The result of an earlier run on the same data files with the same model."""

    name: str
    recipe: Recipe
    data_hash: str
    """Equal only for the same tokens, masks and split: losses of other data are not comparable."""
    best_loss: float
    """Lowest validation loss after training began."""
    best_epoch: float
    """Epochs trained when it was measured."""
    last_epoch: float
    """Epochs trained when the loss was last measured."""
