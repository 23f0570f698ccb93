"""Reading config.json: counts of published models, and every way a config can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.outline import read_outline
from qlora_tui.errors import UserError
from tests.catalog.configs import CONFIGS, architecture, config, counted
from tests.support.every_model import EVERY_MODEL, walks_over_models

COUNTED = counted()
_SMALLEST_LAST = sorted(COUNTED, key=lambda name: -int(COUNTED[name]["total_params"]))
ONE_OF_EACH = {(config(name)["model_type"], COUNTED[name]["lm_head_tied"]): name for name in _SMALLEST_LAST}
"""The smallest model of each type, with a tied head and without."""
UNLIKE = (
    "HuggingFaceTB/SmolLM2-135M",  # a tied head
    "Qwen/Qwen2-7B",  # a head of its own, biases
    "deepseek-ai/DeepSeek-V2-Lite",  # low-rank projections, shared experts
    "google/gemma-3-4b-it",  # a tower of images
    "microsoft/phi-2",  # a bias of the head
    "mistralai/Mixtral-8x7B-v0.1",  # fused experts
    "openai-community/gpt2",  # no linear class
    "zai-org/glm-4-9b-chat-hf",  # fused projections
)


@pytest.mark.slow
@walks_over_models
@pytest.mark.parametrize("model", ONE_OF_EACH.values() if EVERY_MODEL else UNLIKE)
def test_parameters_equal_those_transformers_counts(model: str) -> None:
    found = architecture(model)
    row = {key: int(value) for key, value in COUNTED[model].items() if value.isdigit()}
    assert found.total_params == row["total_params"]
    conv1d = sum(module.weight_params for module in found.modules if module.conv1d)
    assert conv1d == row["conv1d_params"]
    assert found.linear_params - conv1d == row["linear_params"]
    biases = found.linear_bias_params + found.head.bias_params
    assert biases == row["linear_bias_params"]
    assert sum(not module.conv1d for module in found.modules) == row["n_linear_modules"]
    assert found.head.weight_params == row["lm_head_params"]
    assert found.tied_head == (COUNTED[model]["lm_head_tied"] == "y")
    fused = [p for p in found.parameters if p.role == "expert" and len(p.shape) == 3]
    assert sum(parameter.params for parameter in fused) == row["fused_expert_params"]
    vision = [module for module in found.modules if module.part == "vision"]
    assert sum(module.weight_params for module in vision) == row["vision_linear_params"]


def test_modules_carry_the_models_own_names_and_kinds() -> None:
    architecture = parse_architecture(config("HuggingFaceTB/SmolLM2-135M"))
    first = architecture.modules[0]
    assert first.name == "model.layers.0.self_attn.q_proj"
    assert (first.kind, first.part, first.layer) == ("q_proj", "attention", 0)
    assert (first.in_features, first.out_features, first.bias) == (576, 576, False)
    assert architecture.kinds() == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert architecture.gated
    assert architecture.activation == "silu"
    assert architecture.dtype == "bfloat16"


def test_fused_experts_stay_out_of_the_linear_modules() -> None:
    architecture = parse_architecture(config("mistralai/Mixtral-8x7B-v0.1"))
    assert architecture.expert_params / architecture.total_params > 0.96
    assert architecture.kinds() == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert architecture.intermediate_size is None
    assert architecture.experts is not None
    assert (architecture.experts.count, architecture.experts.per_token) == (8, 2)
    assert architecture.experts.intermediate_size == 14336


def test_a_first_dense_layer_is_not_a_mixture() -> None:
    architecture = parse_architecture(config("deepseek-ai/DeepSeek-V2-Lite"))
    dense = [module.layer for module in architecture.modules if module.part == "mlp"]
    assert dense == [0, 0, 0]
    shared = {module.layer for module in architecture.modules if module.part == "shared_expert"}
    assert shared == set(range(1, 27))


@pytest.mark.slow
def test_only_falcons_own_linear_class_stays_in_16_bits() -> None:
    assert not any(module.quantizable for module in architecture("tiiuae/falcon-7b").modules)
    assert all(module.quantizable for module in architecture("openai-community/gpt2").modules)


@pytest.mark.slow
def test_a_vision_tower_is_told_from_the_language_model() -> None:
    found = architecture("google/gemma-3-4b-it")
    text = next(module for module in found.modules if module.part != "vision")
    assert text.name == "model.language_model.layers.0.self_attn.q_proj"
    vision = next(module for module in found.modules if module.part == "vision")
    assert vision.name == "model.vision_tower.encoder.layers.0.self_attn.k_proj"
    assert found.tied_head


@pytest.mark.slow
def test_what_happens_to_logits_after_the_head() -> None:
    assert architecture("google/gemma-2-9b").final_logit_softcapping == 30.0
    assert architecture("google/gemma-3-1b-it").final_logit_softcapping is None
    assert architecture("CohereLabs/c4ai-command-r-v01").logit_scale == 0.0625
    assert architecture("ibm-research/PowerLM-3b").logit_scale == pytest.approx(1 / 9)
    assert architecture("Qwen/Qwen3-8B").logit_scale is None


def test_a_checkpoint_stored_quantized_says_so() -> None:
    assert parse_architecture(config("openai/gpt-oss-20b")).quantized_as == "mxfp4"


def test_a_multimodal_config_may_leave_sizes_to_its_class() -> None:
    spelled_out = config("google/gemma-3-4b-it")
    shorter = json.loads(json.dumps(spelled_out))
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        del shorter["text_config"][key]
    assert parse_architecture(shorter).total_params == parse_architecture(spelled_out).total_params


def test_a_size_may_be_a_word_that_the_class_knows() -> None:
    assert parse_architecture({"model_type": "bamba", "mamba_d_head": "auto"}).is_outline
    with pytest.raises(UserError, match="mamba_d_head is 'some'"):
        parse_architecture({"model_type": "bamba", "mamba_d_head": "some"})


def test_a_folder_or_a_file_will_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes((CONFIGS / "Qwen__Qwen3-0.6B.json").read_bytes())
    assert (
        parse_architecture(tmp_path)
        == parse_architecture(file)
        == parse_architecture(config("Qwen/Qwen3-0.6B"))
    )


def _llama(**changes: Any) -> dict[str, Any]:
    values = {**config("meta-llama/Llama-2-7b-hf"), **changes}
    return {key: value for key, value in values.items() if value != "drop"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": -32}, "num_attention_heads is -32"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"num_attention_heads": 10**6, "head_dim": 128}, "num_attention_heads is 1000000"),
        ({"model_type": "drop"}, "model_type is missing"),
        ({"model_type": 7}, "model_type is 7"),
        ({"model_type": "lama"}, "model_type is 'lama'"),
        ({"quantization_config": ["gptq"]}, "quantization_config is ['gptq']"),
        ({"quantization_config": {"quant_method": 4}}, "quantization_config is {'quant_method': 4}"),
    ],
)
def test_a_wrong_config_is_rejected_naming_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_architecture(_llama(**changes))
    assert named in caught.value.what
    assert caught.value.fix


def test_an_unknown_type_gets_the_nearest_known_name_and_an_upgrade() -> None:
    with pytest.raises(UserError) as caught:
        parse_architecture(_llama(model_type="lama"))
    assert "'llama'" in caught.value.fix and "install" in caught.value.fix


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("vit", "no class that generates text"),
        ("bart", "an encoder next to"),
        ("bert", "attend to later ones"),
    ],
)
def test_a_type_that_does_not_continue_text_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(UserError, match="does not generate text") as caught:
        parse_architecture(_llama(model_type=model_type))
    assert reason in caught.value.what


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        parse_architecture(file)
    assert str(file) in caught.value.what


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        parse_architecture(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B", "google/gemma-3-27b-it", "Qwen/Qwen3.5-35B-A3B", "openai/gpt-oss-20b"]
)
def test_an_outline_is_close_to_the_whole(name: str) -> None:
    outline, exact = read_outline(config(name)), architecture(name)
    assert outline.is_outline and not exact.is_outline
    assert outline.total_params == pytest.approx(exact.total_params, rel=0.02)
    assert outline.linear_params == pytest.approx(exact.linear_params, rel=0.05)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-3, 9), max_size=4), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
WELL_FORMED = [
    config(name) for name in ("Qwen/Qwen3.5-35B-A3B", "google/gemma-4-26B-A4B", "LiquidAI/LFM2-350M")
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_junk_in_any_field_is_refused_or_harmless(data: st.DataObject) -> None:
    values = json.loads(json.dumps(data.draw(st.sampled_from(WELL_FORMED))))
    nested = [part for part in (values, *values.values()) if isinstance(part, dict)]
    part = data.draw(st.sampled_from(nested))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JUNK)
    try:
        assert parse_architecture(values).total_params > 0
    except UserError as problem:
        assert problem.what
