"""The architecture of a model, as transformers builds and quantizes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bench.model_types.tiny_config import settings_of
from qlora_tui.training.description import describe
from qlora_tui.training.model_class import build_on_meta
from tests.catalog.configs import config, named_shapes
from tests.support.every_model import taken, walks_over_models

pytestmark = pytest.mark.slow

PUBLISHED = [
    "HuggingFaceTB/SmolLM2-135M",
    "EleutherAI/pythia-1.4b",
    "LiquidAI/LFM2-350M",
    "Qwen/Qwen1.5-MoE-A2.7B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3.5-35B-A3B",
    "bigscience/bloom-560m",
    "deepseek-ai/DeepSeek-V2-Lite",
    "facebook/opt-1.3b",
    "google/gemma-2-2b",
    "google/gemma-3-4b-it",
    "google/gemma-4-26B-A4B",
    "ibm-research/PowerLM-3b",
    "microsoft/Phi-4-mini-instruct",
    "microsoft/phi-2",
    "mistralai/Mixtral-8x7B-v0.1",
    "openai-community/gpt2",
    "openai/gpt-oss-20b",
    "stabilityai/stablelm-2-1_6b",
    "tiiuae/falcon-7b",
    "zai-org/glm-4-9b-chat-hf",
]
UNLIKE = (
    "EleutherAI/pythia-1.4b",  # biases, a fused projection
    "LiquidAI/LFM2-350M",  # convolutions
    "Qwen/Qwen3.5-35B-A3B",  # linear attention, experts
    "deepseek-ai/DeepSeek-V2-Lite",  # low-rank projections, shared experts
    "facebook/opt-1.3b",  # projections of the embedding
    "google/gemma-3-4b-it",  # a tower of images
    "google/gemma-4-26B-A4B",  # modules that transformers does not quantize
    "mistralai/Mixtral-8x7B-v0.1",  # experts
    "openai-community/gpt2",  # transposed matrices
    "openai/gpt-oss-20b",  # experts with biases
)
"""Those that ``make test`` takes."""


@pytest.mark.parametrize(
    ("model_type", "kinds", "bypassed"),
    [
        ("mamba", {"dt_proj"}, {"dt_proj"}),
        (
            "gemma3n_text",
            {"prediction_coefs", "correction_coefs"},
            set(),
        ),  # limits their values, and calls them
        ("jamba", set(), {"dt_proj"}),  # calls it only in a quantized model
        ("zamba2", set(), set()),  # layers share their weights
        ("rwkv", set(), set()),  # no longer scales them
    ],
)
def test_weights_that_the_code_reads_itself_stay_in_16_bits(
    model_type: str, kinds: set[str], bypassed: set[str]
) -> None:
    values = AutoConfig.for_model(model_type, **settings_of(model_type)).to_dict()
    modules = describe(values).modules
    assert {module.kind for module in modules if not module.adaptable} - {"out_proj"} == bypassed
    read = [module for module in modules if module.read_directly]
    assert {module.kind for module in read} == kinds
    assert not any(module.quantizable for module in read)


LAYERS = 8
"""More than the period of any pattern of layers."""


def shortened(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with the first layers only, in each of its parts."""
    cut: dict[str, Any] = {
        key: shortened(value) if isinstance(value, dict) else value for key, value in values.items()
    }
    for key in {"num_hidden_layers", "n_layer", "depth"} & cut.keys():
        cut[key] = min(cut[key], LAYERS)
    if cut.get("layer_types"):
        cut["layer_types"] = cut["layer_types"][:LAYERS]
    return cut


@walks_over_models
@pytest.mark.parametrize("model", taken(PUBLISHED, UNLIKE))
def test_a_published_model_is_named_and_quantized_as_loaded(model: str) -> None:
    """The model transformers builds, and the modules its bitsandbytes integration replaces."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    values = shortened(config(model))
    architecture = describe(values)
    built = build_on_meta(values, dtype=torch.float32)
    assert named_shapes(architecture) == {
        name: tuple(value.shape) for name, value in built.named_parameters()
    }

    settings: Callable[..., BitsAndBytesConfig] = BitsAndBytesConfig
    not_converted = Bnb4BitHfQuantizer.get_modules_to_not_convert(
        built, None, list(built._keep_in_fp32_modules or ())
    )
    quantized = replace_with_bnb_linear(built, not_converted, settings(load_in_4bit=True))
    replaced = {name for name, module in quantized.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert {module.name for module in architecture.modules if module.quantizable} == replaced
