"""Adapters that cannot be trained further with a recipe, by their config and the header of their weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.adapters import WEIGHTS, adapter_differences, require_fit
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora
from tests.catalog.models import make_adapter_files, make_model

NAMES = ("self_attn.q_proj", "self_attn.v_proj")
LORA = Lora(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))


@pytest.fixture
def architecture(tmp_path: Path) -> Architecture:
    return load_architecture(str(make_model(tmp_path / "model")))


def test_an_adapter_of_the_recipe_fits(tmp_path: Path, architecture: Architecture) -> None:
    require_fit(make_adapter_files(tmp_path / "adapter"), LORA, architecture)
    # Experts are compared when the adapter is loaded.
    require_fit(make_adapter_files(tmp_path / "adapter", (*NAMES, "mlp.experts")), LORA, architecture)


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (NAMES[:1], {}, "the recipe adapts 2 modules that the adapter does not"),
        ((*NAMES, "self_attn.k_proj"), {}, "the adapter has 2 modules that the recipe does not adapt"),
        (NAMES, {"peft_type": "IA3"}, "it is a IA3 adapter, not LoRA"),
        (NAMES, {"use_dora": True}, "DoRA is off in the recipe"),
        (NAMES, {"alpha_pattern": {"1.self_attn.q_proj": 2}}, "4 and 2 in the adapter"),
    ],
)
def test_what_differs_from_the_recipe_is_refused(
    tmp_path: Path, architecture: Architecture, names: tuple[str, ...], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match="does not match the recipe") as refused:
        require_fit(make_adapter_files(tmp_path / "adapter", names, **settings), LORA, architecture)
    assert words in refused.value.what


def test_missing_and_damaged_weights_are_refused(tmp_path: Path, architecture: Architecture) -> None:
    folder = make_adapter_files(tmp_path / "adapter")
    for entry in (b'{"base_model.model.a.lora_A.weight": {"shape": []}}', b"{"):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(entry)) + entry)
        with pytest.raises(UserError, match="The adapter is damaged"):
            adapter_differences(folder, LORA, architecture)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="No safetensors weights"):
        adapter_differences(folder, LORA, architecture)
