"""What LoRA touches: exactly the modules that the recipe's targets name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.chat.adapters import AdapterSet
from qlora_tui.memory import trainer_execution
from qlora_tui.memory.execution import Device
from qlora_tui.memory.layers import build_layout
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import match_modules
from tests.catalog.configs import config as config_of

pytestmark = pytest.mark.slow

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _deepseek(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype", "dtype")}
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(**values)).eval()


@pytest.mark.parametrize(
    "targets",
    [("all-linear",), ("up_proj", "q_proj"), ("model.layers.1.mlp.shared_experts.down_proj",)],
)
def test_shared_experts_are_adapted_and_routed_ones_are_not(targets: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    from qlora_tui.training.adapter import add_lora, load_adapter, save_adapter, trained_parameters

    config = config_of("deepseek-ai/DeepSeek-V2-Lite") | TINY
    architecture, lora = parse_architecture(config), Lora(rank=4, target_modules=targets)
    model = add_lora(_deepseek(config), lora, architecture)
    touched = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert touched == {module.name for module in match_modules(targets, architecture.modules)}
    layout = build_layout(Recipe(lora=lora), architecture, trainer_execution(Recipe(), Device()))
    assert trained_parameters(model) == layout.adapter_parameters

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    ids = torch.arange(12)[None]
    base = _deepseek(config)
    adapters = AdapterSet(base, {"adapter": str(tmp_path)})
    before = base(ids).logits
    adapters.ensure_loaded("adapter")
    adapters.activate("adapter")
    with torch.no_grad():
        # The chat adds in another order, and with such factors the layers after it make more of that.
        torch.testing.assert_close(base(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(base(ids).logits, before)
