"""Adapters for tiny models, made on the spot with plain peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_WITH_ADAPTER = "tests.chat.adapters:make_model_with_adapter"
"""A job for :func:`qlora_tui.worker.run_job`, in tests that need no torch themselves."""


def make_model_with_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Write a tiny model with these fields of ``LlamaConfig`` and an adapter on it."""
    from tests.training.tiny_model import make_tiny_model

    make_adapter(make_tiny_model(folder / "model", **config), folder / "adapter")


def make_adapter(model: Path, folder: Path, seed: int = 1, strength: float = 0.3, **config: Any) -> Path:
    """Write a LoRA adapter of rank 4 on all linear modules that really changes the model; returns it.

    ``config`` overrides fields of ``LoraConfig``.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    tuned = get_peft_model(base, LoraConfig(**settings | config))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=strength)
    tuned.save_pretrained(str(folder))
    return folder
