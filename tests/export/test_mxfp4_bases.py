"""Bases with experts in MXFP4 are merged as the 16-bit model that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tui.adapters.merged_weights import merged_weights
from qlora_tui.adapters.weight_files import read_tensor, stored_tensors, write_unpacked_config
from qlora_tui.recipe.schema import Model, Recipe
from tests.chat.adapters import make_adapter
from tests.training.test_experts import save_both

pytestmark = pytest.mark.slow
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("adapter", [{}, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}])
def test_a_merge_into_mxfp4_is_one_into_its_16_bit_weights(tmp_path: Path, adapter: dict[str, Any]) -> None:
    packed, plain = save_both(tmp_path)
    trained = make_adapter(plain, tmp_path / "adapter", **adapter)
    merged = {}
    for base in (packed, plain):
        weights = merged_weights(Recipe(model=Model(id=str(base))), trained)
        (file,) = weights.updates
        target = tmp_path / f"{base.name}.safetensors"
        weights.write(file, target)
        merged[base] = load_file(target)
        assert weights.bytes == sum(tensor.nbytes for tensor in merged[base].values())
    assert merged[packed].keys() == merged[plain].keys()
    for name, tensor in merged[plain].items():
        assert torch.equal(tensor, merged[packed][name]), name


def test_blocks_and_scales_may_be_in_two_files(tmp_path: Path) -> None:
    packed, plain = save_both(tmp_path)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    parts = {f"model-0000{number}-of-00002.safetensors": {} for number in (1, 2)}  # type: dict[str, Any]
    for name, tensor in tensors.items():
        parts[f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors"][name] = tensor
    for part, content in parts.items():
        save_file(content, packed / part, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: part for part, content in parts.items() for name in content},
    }
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_file(plain / "model.safetensors")
    files = [packed / part for part in parts]
    read = {name: read_tensor(file, name) for file in files for name in stored_tensors(file)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())
    (tmp_path / "out").mkdir()
    write_unpacked_config(packed, tmp_path / "out", files)
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["weight_map"].keys() == expected.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
