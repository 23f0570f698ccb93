"""A config cannot choose which code runs: keys that could are refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import adapter_without_code, named_kernels, without_code
from qlora_tui.errors import UserError
from tests.catalog.models import TINY, make_model

CODE: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"},
    "custom_generate": "evil/generate",
    "trust_remote_code": True,
    "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"},
    "use_kernels": True,
    "configuration_files": ["config.4.0.0.json"],
    "transformers_weights": "other.safetensors",
    "_name_or_path": "evil/model",
    "base_model_name_or_path": "evil/base",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "flash_attention_2",
    "attn_implementation": "flash_attention_2",
    "experts_implementation": "deepgemm",
}


@pytest.mark.parametrize("key", CODE)
def test_a_key_that_chooses_code_is_left_out_and_named(key: str) -> None:
    clean, dropped = without_code({**TINY, key: CODE[key]})
    assert clean == TINY
    assert dropped == [key]


def test_nested_configs_are_cleaned_too() -> None:
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 8, **CODE}}
    clean, dropped = without_code(config)
    assert clean == {"model_type": "gemma3", "text_config": {"hidden_size": 8}}
    assert "text_config.auto_map" in dropped


def test_of_quantization_only_bitsandbytes_settings_remain() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "modules_to_not_convert": ["x"]}
    clean, dropped = without_code(
        {"quantization_config": stored, "text_config": {"quantization_config": stored}}
    )
    assert clean["quantization_config"] == {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert clean["text_config"] == {}
    assert dropped == ["quantization_config.modules_to_not_convert", "text_config.quantization_config"]


@pytest.mark.parametrize(
    "config",
    [
        {"_attn_implementation": "evil-org/kernel"},
        {"_attn_implementation_internal": "paged|evil-org/kernel@main:run"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil-org/kernel"}},
        {"text_config": {"experts_implementation": "evil-org/kernel"}},
    ],
)
def test_a_model_that_names_kernels_is_refused_with_the_key(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model", {**TINY, **config})
    assert named_kernels(config)
    with pytest.raises(UserError, match="evil-org/kernel") as refused:
        resolve_model(str(folder))
    assert "config.json" in refused.value.what
    assert refused.value.fix


def test_usual_models_pass_unchanged() -> None:
    for file in (Path(__file__).parents[1] / "configs").glob("*.json"):
        config = json.loads(file.read_text())
        assert named_kernels(config) is None
        clean, dropped = without_code(config)
        missing = {key for key in config if key not in clean}
        assert missing <= {
            "auto_map",
            "_name_or_path",
            "name_or_path",
            "attn_implementation",
            "_attn_implementation",
        }
        assert len(dropped) >= len([key for key in missing if config[key] is not None])


def test_of_an_adapter_only_what_decides_its_values_remains() -> None:
    plain = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "init_lora_weights": True}
    usual: dict[str, Any] = {
        "base_model_name_or_path": "a/b",
        "megatron_core": "megatron.core",
        "auto_mapping": None,
        "loftq_config": {},
    }
    assert adapter_without_code(plain | usual, "here") == (plain, [])
    evil = {"megatron_core": "evil", "megatron_config": {"a": 1}, "corda_config": {"cache_file": "x.pt"}}
    clean, dropped = adapter_without_code(plain | evil, "here")
    assert clean == plain
    assert dropped == list(evil)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", name) for name in ("olora", "pissa", "pissa_niter_1000000", "corda")),
        *(("init_lora_weights", name) for name in ("loftq", "lora_ga", "mica", "of tomorrow")),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("setting_of_tomorrow", 1),
    ],
)
def test_an_adapter_that_changes_the_base_or_is_unknown_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        adapter_without_code({"peft_type": "LORA", key: value}, "here")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_an_initialization_of_the_adapter_alone_is_not_repeated(value: Any) -> None:
    clean, dropped = adapter_without_code({"init_lora_weights": value, "eva_config": {"rho": 2.0}}, "here")
    assert clean["init_lora_weights"] in (True, None) and dropped == ["eva_config"]


def test_keys_that_choose_code_are_found_in_lists_too() -> None:
    config = {"towers": [{"auto_map": {"AutoModel": "evil"}, "size": 1}, [{"trust_remote_code": True}], 2]}
    assert without_code(config) == (
        {"towers": [{"size": 1}, [{}], 2]},
        ["towers.0.auto_map", "towers.1.0.trust_remote_code"],
    )
