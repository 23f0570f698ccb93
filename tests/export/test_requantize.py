"""Which tensors of a base are rounded as in training."""

from __future__ import annotations

import pytest

from qlora_tui.adapters.merged_weights import requantizer
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.described import describe
from qlora_tui.catalog.gguf_file_types import estimated_bytes, rows_without_k_blocks
from qlora_tui.recipe.schema import Quantization

pytestmark = pytest.mark.slow

GEMMA = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 512, "intermediate_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 1000,
    },
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 16, "vision_use_head": False,
    },
}  # fmt: skip


@pytest.fixture
def gemma() -> Architecture:
    return describe(GEMMA)


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        ("language_model.model.layers.0.self_attn.q_proj.weight", True),
        ("model.language_model.layers.1.mlp.down_proj.weight", True),
        ("model.language_model.embed_tokens.weight", False),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", False),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_only_matrices_of_the_text_model_are_rounded(gemma: Architecture, name: str, rounds: bool) -> None:
    rounding = requantizer(gemma, Quantization(method="nf4"))
    assert rounding is not None and rounding.quantizes(name) == rounds


def test_the_size_of_a_gguf_file_leaves_out_the_tower(gemma: Architecture) -> None:
    text = 2 * (gemma.total_params - gemma.vision_params)
    assert gemma.vision_params > 0 and estimated_bytes(gemma, "BF16") == text


def test_rows_that_do_not_fit_k_blocks_are_known(gemma: Architecture) -> None:
    assert rows_without_k_blocks(gemma) == (1000,)
