"""Adapters on 4-bit experts in other programs: plain peft, the chat, and a merged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.catalog.config_parser import load_config, parse_architecture
from qlora_tui.chat.adapter_deltas import read_deltas
from qlora_tui.chat.adapters import AdapterSet
from qlora_tui.chat.base_weights import assign_deltas
from qlora_tui.chat.chat_types import BASE
from qlora_tui.chat.logits_check import library_code
from qlora_tui.export.requantize import reader_of, requantizer
from qlora_tui.recipe.schema import Quantization
from qlora_tui.training.adapter import save_adapter
from qlora_tui.training.experts.expert_lora import fuse_experts
from tests.training.families import build
from tests.training.test_experts import BOTH, adapted, assert_close, dequantized, load
from tests.training.trained_weights import CLAIMED

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 60)[None]


@dataclass
class Trained:
    """A base, and an adapter that was trained on it in 4 bits."""

    base: Path
    adapter: Path
    logits: Tensor
    base_logits: Tensor


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "granitemoe", "gpt_oss"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, **CLAIMED[request.param]).save_pretrained(folder / "base")
    packed = load(folder / "base")
    base_logits = logits_of(packed)
    model = adapted(packed, "q_proj", *BOTH)
    save_adapter(model, folder / "adapter")
    return Trained(folder / "base", folder / "adapter", logits_of(model.eval()), base_logits)


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return logits


def test_plain_peft_gives_the_same_logits(trained: Trained) -> None:
    from peft import PeftModel

    plain = dequantized(trained.base, load(trained.base))
    model: Any = PeftModel.from_pretrained(plain, str(trained.adapter))
    assert_close(trained.logits, logits_of(model))


def test_the_chat_switches_between_base_and_adapter(trained: Trained) -> None:
    model = load(trained.base)
    fuse_experts(model)
    adapters = AdapterSet(model, {"one": str(trained.adapter)})
    adapters.ensure_loaded("one")
    for name, expected in (("one", trained.logits), (BASE, trained.base_logits)):
        adapters.activate(name)
        assert_close(logits_of(model), expected)
        with library_code(model), adapters.through_peft("one"):
            assert_close(logits_of(model), trained.logits)


def test_merged_weights_are_those_of_the_training(trained: Trained) -> None:
    """Each tensor is rounded as in training, then changed by its part of the adapter."""
    from safetensors.torch import load_file, save_file

    file = trained.base / "model.safetensors"
    (placed,) = assign_deltas(read_deltas(trained.adapter), [file], trained.adapter).values()
    architecture = parse_architecture(load_config(trained.base / "config.json"))
    rounding = requantizer(architecture, Quantization())
    assert rounding is not None
    weights, read = load_file(file), reader_of([file])
    merged = {name: rounding(name, weight, read) for name, weight in weights.items()}
    for name, update in placed.items():
        merged[name] = update.apply_to(merged[name])
    before = file.read_bytes()
    try:
        save_file(merged, file, {"format": "pt"})
        assert_close(logits_of(load(trained.base, method="none")), trained.logits)
    finally:
        file.write_bytes(before)
