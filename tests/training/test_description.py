"""The architecture that transformers' own class shows, against the tables of the catalog."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.training.description import describe
from tests.catalog.configs import config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "EleutherAI/gpt-neox-20b",
        "LiquidAI/LFM2-350M",
        "Qwen/Qwen1.5-MoE-A2.7B",
        "Qwen/Qwen3.5-35B-A3B",
        "deepseek-ai/DeepSeek-V2-Lite",
        "facebook/opt-1.3b",
        "google/gemma-3-4b-it",
        "google/gemma-4-26B-A4B",
        "openai-community/gpt2",
        "openai/gpt-oss-20b",
        "tiiuae/falcon-7b",
    ],
)
def test_a_description_is_what_the_table_says(name: str) -> None:
    assert _unordered(describe(config(name))) == _unordered(parse_architecture(config(name)))


def _unordered(architecture: Any) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.structs.asdict(architecture)
    return values | {key: set(values[key]) for key in ("modules", "embeddings", "parameters")}
