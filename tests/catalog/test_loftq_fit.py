"""Models whose adapters cannot start with LoftQ, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.loftq_fit import require_loftq_base
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora

CONFIGS = Path(__file__).parents[1] / "configs"
MIXTURE = parse_architecture(json.loads((CONFIGS / "Qwen__Qwen3-30B-A3B.json").read_text()))
LOFTQ = Lora(init_weights="loftq")


def test_a_base_without_16_bit_linear_weights_is_refused() -> None:
    transposed = tuple(replace(module, conv1d=True) for module in MIXTURE.modules)
    for lora, architecture, why in (
        (LOFTQ, replace(MIXTURE, quantized_as="mxfp4"), r"stored quantized \(mxfp4\)"),
        (LOFTQ, replace(MIXTURE, modules=transposed), "stores its weights transposed"),
        (replace(LOFTQ, target_modules=("experts.down_proj",)), MIXTURE, "names experts"),
    ):
        with pytest.raises(UserError, match=why):
            require_loftq_base(lora, architecture)
        require_loftq_base(replace(lora, init_weights="random"), architecture)
    require_loftq_base(LOFTQ, MIXTURE)
