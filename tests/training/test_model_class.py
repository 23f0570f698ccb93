"""Which class of transformers a config selects."""

from __future__ import annotations

import pytest
import torch

from qlora_tui.errors import UserError
from qlora_tui.training.checks.base import require_causal
from qlora_tui.training.model_class import auto_class, build_on_meta, read_config
from tests.catalog.configs import config
from tests.training.families import build

pytestmark = pytest.mark.slow

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}


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
    "values",
    [{"model_type": "lama"}, {}, {"model_type": "vit"}, {"model_type": "llama", "hidden_size": "wide"}],
)
def test_what_cannot_be_built_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        build_on_meta(values)


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
    with pytest.raises(UserError, match="does not compute text alone"):
        require_causal(model, torch.device("cpu"))
