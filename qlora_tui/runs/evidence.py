"""Evidence behind suggested settings: publications and earlier runs."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.recipe.schema import Recipe


@dataclass(frozen=True)
class Reference:
    """A publication as the source of a figure."""

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
    """Result of an earlier run on the same data files with the same model."""

    name: str
    recipe: Recipe
    data_hash: str
    """Hash of tokens, masks and split. Losses are comparable only if it is equal."""
    best_loss: float
    """Lowest validation loss since training began."""
    best_epoch: float
    """Epochs trained when this loss was measured."""
    last_epoch: float
    """Epochs trained when the loss was last measured."""
