"""Which class of transformers a config selects."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from qlora_tui.errors import UserError
from qlora_tui.training.checks.base import prepare_for_text, require_causal
from qlora_tui.training.model_class import auto_class, build_on_meta, read_config
from tests.catalog.configs import config
from tests.training.families import build

pytestmark = pytest.mark.slow

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}


def llama3(**rope: object) -> dict[str, object]:
    values = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    values |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"model_type": "llama", "rope_parameters": values | rope}


def test_a_causal_language_model_is_preferred() -> None:
    assert auto_class(read_config(config("Qwen/Qwen3.5-35B-A3B"))).__name__ == "AutoModelForCausalLM"


def test_a_composite_without_one_is_built_whole() -> None:
    values = {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION},
        "auto_map": {"AutoModelForCausalLM": "owner/code--model.Model"},
    }
    model = build_on_meta(values)
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "lama"}, "does not know"),
        ({}, "does not know"),
        ({"model_type": "vit"}, "generates text"),
        ({"model_type": "diffusion_gemma"}, "does not generate token by token"),
        ({"model_type": "blip-2"}, "needs pixel_values"),
        ({"model_type": "shieldgemma2"}, "does not read the weights"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size is .wide., expected int"),
        ({"model_type": "llama", "num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"model_type": "llama", "hidden_act": "x"}, "hidden_act is 'x'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "warp"}}, "rope_type is 'warp'"),
        ({"model_type": "llava", "text_config": {"model_type": "lama"}}, "subconfig: lama.$"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"model_type": "dots1"}, "n_routed_experts = null"),
        ({"model_type": "llama", "attention_dropout": [1]}, r"is \[1\], expected int, float or null\.$"),
        ({"model_type": "llama", "mlp_bias": ["x"] * 900}, r"is \['x', .{,120}…, expected bool\.$"),
        (
            {"model_type": "qwen2", "layer_types": {"x": "y" * 900}},
            "layer_types is .{,120}…, expected list or",
        ),
        (llama3(low_freq_factor=0), "^(?!.*null).*rope_parameters = {"),
        ({"model_type": "qwen2", "rope_theta": ["x"]}, "^(?!.*null).*rope_parameters = {"),
        (llama3(low_freq_factor=[1]), "validate_rope: '<='"),
        ({"model_type": "gpt_neox", "rotary_pct": "0.25"}, "partial_rotary_factor.: .0.25"),
        ({"model_type": "gpt_neox", "num_attention_heads": 33}, r"update them\.$"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_field(values: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_on_meta(values)
    assert re.search(reason, refusal.value.what)
    assert "Error" not in refusal.value.what


def test_a_composite_is_built_whole_where_its_text_class_does_not_find_the_weights() -> None:
    values = {
        "model_type": "emu3",
        "vocabulary_map": {"<image>": 380},
        "text_config": {**TEXT, "vocab_size": 384, "pad_token_id": 1},
    }
    assert type(build_on_meta(values)).__name__ == "Emu3ForConditionalGeneration"


@pytest.mark.slow
def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    tokens = torch.device("cpu")
    require_causal(build("llama"), tokens)
    encoder = build("bert", is_decoder=False)
    with pytest.raises(UserError, match="does not generate text"):
        require_causal(encoder, tokens)


@pytest.mark.slow
def test_a_model_that_needs_images_is_refused() -> None:
    model = build("llama")
    model.forward = lambda input_ids, pixel_values, **kwargs: None
    with pytest.raises(UserError, match="cannot run on text alone"):
        require_causal(model, torch.device("cpu"))


@pytest.mark.slow
def test_a_model_that_asks_for_types_of_tokens_in_training_gets_those_of_text() -> None:
    model, tokens = build("llama"), torch.tensor([[1, 2, 3]])
    forward = model.model.forward

    def needy(mm_token_type_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        if mm_token_type_ids is None and model.training:
            raise ValueError("types")
        return forward(**inputs)

    model.model.forward = needy
    state = torch.random.get_rng_state()
    prepare_for_text(model, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.train()(input_ids=tokens, use_cache=False).logits.shape[1] == 3


@pytest.mark.slow
def test_a_model_that_changes_its_embeddings_in_place_trains() -> None:
    model, tokens = build("llama"), torch.tensor([[1, 2, 3]])
    model.lm_head.requires_grad_(True)
    model.enable_input_require_grads()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0].mul_(2), *args[1:]))
    prepare_for_text(model, torch.device("cpu"))
    model.train()(input_ids=tokens, use_cache=False).logits.sum().backward()


@pytest.mark.slow
def test_a_model_that_trains_on_no_text_is_refused() -> None:
    model = build("llama")
    forward = model.model.forward

    def fixed(**inputs: Any) -> Any:
        if model.training:
            raise ValueError("4096 tokens only")
        return forward(**inputs)

    model.model.forward = fixed
    with pytest.raises(UserError, match="4096 tokens only"):
        prepare_for_text(model, torch.device("cpu"))
