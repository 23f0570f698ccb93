"""From GGUF metadata to a config: published models come out as published, and what would be lost is refused.

Facts about published models are those of their config.json on the Hub, keys those of their GGUF files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.gguf import GgufHeader, read_gguf
from qlora_tui.catalog.gguf_architectures import ARCHITECTURES
from qlora_tui.catalog.gguf_config import llama3_factor, to_hf_config
from qlora_tui.catalog.gguf_metadata import shortest
from qlora_tui.catalog.gguf_tokenizers import PRE_TOKENIZERS
from qlora_tui.errors import UserError
from tests.catalog.models import gguf_bytes, make_gguf

EMBEDDING: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, 512)}
HEAD = {"output.weight": (64, 512)}


def sizes(layers: int, width: int, heads: int, kv_heads: int, context: int, **keys: Any) -> dict[str, Any]:
    return {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "context_length": context,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | {key.replace("__", "."): value for key, value in keys.items()}


def head_size(size: int) -> dict[str, Any]:
    return {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}


def config_of(
    folder: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    vectors: Mapping[str, list[float]] = MappingProxyType({}),
    **general: Any,
) -> dict[str, Any]:
    values = {"general.architecture": architecture, "tokenizer.ggml.model": "gpt2"}
    values |= {"tokenizer.ggml.pre": "gpt-2"} | {key.replace("__", "."): v for key, v in general.items()}
    values |= {f"{architecture}.{key}": value for key, value in keys.items()}
    file = folder / "model.gguf"
    file.write_bytes(gguf_bytes(values, EMBEDDING | dict(tensors), vectors))
    return to_hf_config(read_gguf(file), file)


def default(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


def llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def llama3_factors(factor: float, size: int) -> list[float]:
    """Llama 3.1's own loop over frequencies, whose results are stored."""
    factors = []
    for pair in range(size // 2):
        wavelength = 2 * math.pi * 500_000.0 ** (2 * pair / size)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def gemma3_rope(full: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": {"rope_theta": 1e6} | full, "sliding_attention": default(10000.0)}


class Published(NamedTuple):
    """A published model: what its GGUF file says, and what its config.json has."""

    name: str
    architecture: str
    keys: dict[str, Any]
    expected: dict[str, Any]
    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    vectors: Mapping[str, list[float]] = MappingProxyType({})


LINEAR8 = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
FULL = "full_attention"
WHOLE = default(1e4) | {"partial_rotary_factor": 1.0}
LONG, SHORT = [1.08, 1.1, 2.5], [1.0, 1.02, 1.03]
PUBLISHED = [
    Published("Llama 2 7B", "llama", sizes(32, 4096, 32, 32, 4096, rope__dimension_count=128),
              {"model_type": "llama", "head_dim": 128, "num_key_value_heads": 32, "attention_bias": False,
               "mlp_bias": False, "tie_word_embeddings": False, "rope_parameters": default(1e4)}, HEAD),
    Published("Llama 3.1 8B", "llama",
              sizes(32, 4096, 32, 8, 131072, rope__dimension_count=128, rope__freq_base=5e5),
              {"rope_parameters": llama3(8.0), "max_position_embeddings": 131072, "head_dim": 128},
              HEAD, {"rope_freqs.weight": llama3_factors(8.0, 128)}),
    Published("Llama 3.2 1B", "llama", sizes(16, 2048, 32, 8, 131072, rope__freq_base=5e5) | head_size(64),
              {"rope_parameters": llama3(32.0), "tie_word_embeddings": True},
              vectors={"rope_freqs.weight": llama3_factors(32.0, 64)}),
    Published("Mistral Nemo", "llama", sizes(40, 5120, 32, 8, 131072, rope__freq_base=1e6) | head_size(128),
              {"head_dim": 128, "rope_parameters": default(1e6)}, HEAD),
    Published("Mixtral 8x7B", "llama",
              sizes(32, 4096, 32, 8, 32768, rope__freq_base=1e6, expert_count=8, expert_used_count=2),
              {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
               "intermediate_size": 16384}, HEAD),
    Published("Qwen2.5 with YaRN", "qwen2",
              sizes(28, 3584, 28, 4, 131072, rope__freq_base=1e6) | {
                  "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                  "rope.scaling.original_context_length": 32768},
              {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 32.0,
                                   "beta_slow": 1.0, "original_max_position_embeddings": 32768}}, HEAD),
    Published("Qwen3 4B", "qwen3", sizes(36, 2560, 32, 8, 40960, rope__freq_base=1e6) | head_size(128),
              {"head_dim": 128, "attention_bias": False, "rms_norm_eps": 1e-6}),
    Published("Qwen3 30B A3B", "qwen3moe",
              sizes(48, 2048, 32, 4, 40960, rope__freq_base=1e6, expert_count=128, expert_used_count=8,
                    expert_feed_forward_length=768) | head_size(128),
              {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
               "moe_intermediate_size": 768, "norm_topk_prob": True}, HEAD),
    Published("Qwen1.5 MoE", "qwen2moe",
              sizes(24, 2048, 16, 16, 8192, rope__freq_base=1e6, expert_count=60, expert_used_count=4,
                    expert_feed_forward_length=1408, expert_shared_feed_forward_length=5632),
              {"model_type": "qwen2_moe", "norm_topk_prob": False, "moe_intermediate_size": 1408,
               "shared_expert_intermediate_size": 5632}, HEAD),
    Published("Phi-3 mini 4k", "phi3", sizes(32, 3072, 32, 32, 4096, rope__dimension_count=96,
                                             attention__sliding_window=2047),
              {"sliding_window": 2047, "rope_parameters": WHOLE}, HEAD),
    Published("Phi-3.5 mini", "phi3",
              sizes(32, 3072, 32, 32, 131072, rope__dimension_count=96, attention__sliding_window=262144) | {
                  "rope.scaling.original_context_length": 4096,
                  "rope.scaling.attn_factor": math.sqrt(1 + math.log(32) / math.log(4096))},
              {"sliding_window": 262144, "original_max_position_embeddings": 4096,
               "rope_parameters": WHOLE | {"rope_type": "longrope", "long_factor": LONG,
                                                  "short_factor": SHORT,
                                                  "original_max_position_embeddings": 4096}},
              HEAD, {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}),
    Published("Phi-4 mini, rotated part", "phi3",
              sizes(32, 3072, 24, 8, 131072, rope__dimension_count=96, attention__sliding_window=262144),
              {"rope_parameters": default(1e4) | {"partial_rotary_factor": 0.75}}),
    Published("Gemma 2 2B", "gemma2",
              sizes(26, 2304, 8, 4, 8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                    attention__sliding_window=4096) | head_size(256),
              {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "sliding_window": 4096,
               "layer_types": ["sliding_attention", "full_attention"] * 13}),
    Published("Gemma 2 27B", "gemma2",
              sizes(46, 4608, 32, 16, 8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                    attention__sliding_window=4096) | head_size(128),
              {"query_pre_attn_scalar": 144, "head_dim": 128}),
    Published("Gemma 3 1B", "gemma3",
              sizes(26, 1152, 4, 1, 32768, rope__freq_base=1e6, attention__sliding_window=512)
              | head_size(256),
              {"model_type": "gemma3_text", "query_pre_attn_scalar": 256, "sliding_window": 512,
               "layer_types": [FULL if layer % 6 == 5 else "sliding_attention" for layer in range(26)],
               "rope_parameters": gemma3_rope(default(1e6))}),
    Published("Gemma 3 4B", "gemma3",
              sizes(34, 2560, 8, 4, 131072, attention__sliding_window=1024) | head_size(256) | LINEAR8,
              {"rope_parameters": gemma3_rope({"rope_type": "linear", "factor": 8.0})}),
    Published("Gemma 3 27B", "gemma3",
              sizes(62, 5376, 32, 16, 131072, attention__sliding_window=1024) | head_size(128) | LINEAR8,
              {"query_pre_attn_scalar": 168, "head_dim": 128}),
    Published("Granite 3.3 8B", "granite",
              sizes(40, 4096, 32, 8, 131072, rope__freq_base=1e7) | {
                  "attention.scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22,
                  "logit_scale": 16.0},
              {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
               "logits_scaling": 16.0}),
    Published("SmolLM3 3B", "smollm3", sizes(36, 2048, 16, 4, 65536, rope__freq_base=5e6),
              {"no_rope_layers": [1, 1, 1, 0] * 9}),
    Published("OLMo 2 7B", "olmo2", sizes(32, 4096, 32, 32, 4096, rope__freq_base=5e5),
              {"model_type": "olmo2"}, HEAD),
    Published("Olmo 3 7B", "olmo2",
              sizes(32, 4096, 32, 32, 65536, rope__freq_base=5e5, attention__sliding_window=4096) | {
                  "attention.sliding_window_pattern": [True, True, True, False] * 8,
                  "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
                  "rope.scaling.original_context_length": 8192},
              {"model_type": "olmo3", "sliding_window": 4096,
               "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8}, HEAD),
    Published("GLM 4 9B", "glm4",
              sizes(40, 4096, 32, 2, 32768) | head_size(128) | {"rope.dimension_count": 64},
              {"attention_bias": True, "rope_parameters": default(1e4) | {"partial_rotary_factor": 0.5}},
              HEAD | {"blk.0.attn_q.bias": (4096,)}),
    Published("StarCoder2 3B", "starcoder2",
              {key: value for key, value in sizes(30, 3072, 24, 2, 16384, rope__freq_base=999999.4375).items()
               if "rms" not in key} | {"attention.layer_norm_epsilon": 1e-5},
              {"norm_epsilon": 1e-5, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
              {"blk.0.attn_q.bias": (3072,)}),
]  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.name)
def test_a_published_model_is_read_as_published(model: Published, tmp_path: Path) -> None:
    config = config_of(tmp_path, model.architecture, model.keys, model.tensors, model.vectors)
    assert {key: config.get(key) for key in model.expected} == model.expected


SMALL = sizes(2, 512, 2, 1, 4096)


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("llama", {"rope.scaling.type": "dynamic"}, "rope.scaling.type 'dynamic'"),
        ("llama", {"rope.scaling.type": "longrope"}, "rope_factors_long.weight"),
        ("llama", {"attention.temperature_scale": 0.1}, "llama.attention.temperature_scale (0.1)"),
        ("llama", {"attention.sliding_window": 2047}, "llama.attention.sliding_window is 2,047"),
        ("llama", head_size(256) | {"rope.dimension_count": 128}, "llama.rope.dimension_count is 128"),
        ("llama", {"attention.value_length": 64}, "llama.attention.value_length is 64"),
        ("llama", {"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ("llama", {"attention.head_count_kv": [1, 2]}, "differs between layers"),
        ("llama", {"rope.dimension_sections": [8, 8, 8, 0]}, "llama.rope.dimension_sections (4 values)"),
        ("llama", {"expert_count": 8, "expert_gating_func": 2}, "llama.expert_gating_func is 2"),
        ("qwen2", {"attention.causal": False}, "qwen2.attention.causal is False"),
        ("qwen2", {"rope.scaling.attn_factor": 1.5}, "qwen2.rope.scaling.attn_factor is 1.5"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                   "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ("qwen3moe", {"expert_count": 8, "expert_weights_norm": False}, "expert_weights_norm is False"),
        ("qwen3moe", {"expert_count": 8, "expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ("phi3", {"rope.dimension_count": 191}, "phi3.rope.dimension_count is 191"),
        ("gemma3", {"mm.tokens_per_image": 256}, "gemma3.mm.tokens_per_image"),
        ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]}, "pattern"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping (50)"),
        ("starcoder2", {"attention.layer_norm_rms_epsilon": 0.5}, "layer_norm_rms_epsilon (0.5)"),
        ("mamba", {}, "'mamba'"),
        ("clip", {}, "'clip'"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_name(
    architecture: str, keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, architecture, SMALL | keys)
    assert named in caught.value.what and str(tmp_path) in caught.value.what
    assert "safetensors" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", -1),
        ("block_count", 1 << 30),
        ("block_count", "two"),
        ("block_count", 2.0),
        ("attention.head_count", True),
        ("embedding_length", ["a", "b"]),
        ("rope.freq_base", math.nan),
        ("rope.freq_base", -1.0),
        ("rope.freq_base", "high"),
        ("rope.scaling.factor", math.inf),
        ("rope.scaling.type", 3),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("rope.scaling.factor", [1, 2]),
    ],
)
def test_a_value_that_is_none_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, "llama", SMALL | {key: value})
    assert f"llama.{key}" in caught.value.what


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count"])
def test_a_missing_size_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"llama.{key}"):
        config_of(tmp_path, "llama", {name: value for name, value in SMALL.items() if name != key})


@pytest.mark.parametrize(
    "factors",
    [
        [1.0] * 63 + [math.nan],
        [1.0] * 63 + [0.5],
        [1.0] * 62 + [8.0],
        [1.0] * 20 + [7.0, 3.0] + [8.0] * 42,
        [*llama3_factors(8.0, 128)[:40], 4.0, *llama3_factors(8.0, 128)[41:]],
    ],
)
def test_other_factors_than_llama_3s_are_refused(factors: list[float], tmp_path: Path) -> None:
    keys = sizes(2, 512, 4, 1, 131072, rope__freq_base=5e5) | head_size(128)
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        config_of(tmp_path, "llama", keys, vectors={"rope_freqs.weight": factors})


@pytest.mark.parametrize("high", [3.0, 4.0, 16.0])
@pytest.mark.parametrize("original", [512, 4096, 32768])
def test_llama_3s_parameters_follow_from_its_factors(high: float, original: int, tmp_path: Path) -> None:
    factors = [llama3_factor(2 * math.pi * 5e5 ** (i / 64), 16.0, 1.0, high, original) for i in range(64)]
    keys = sizes(2, 512, 4, 1, 131072, rope__freq_base=5e5) | head_size(128)
    rope = config_of(tmp_path, "llama", keys, vectors={"rope_freqs.weight": factors})["rope_parameters"]
    assert rope["factor"] == 16.0
    assert rope["high_freq_factor"] / rope["low_freq_factor"] == pytest.approx(high, rel=1e-3)
    assert rope["original_max_position_embeddings"] == pytest.approx(original, rel=1e-3)


def test_defaults_and_zeros_are_nothing_to_lose(tmp_path: Path) -> None:
    keys = {
        "attention.clamp_kqv": 0.0,
        "expert_count": 0,
        "attention.causal": True,
        "tensor_data_layout": "x",
    }
    assert config_of(tmp_path, "llama", SMALL | keys)["hidden_size"] == 512


@pytest.mark.parametrize(
    ("general", "named"),
    [
        ({"tokenizer__ggml__pre": "unheard-of"}, "'unheard-of'"),
        ({"tokenizer__ggml__pre": ""}, "tokenizer.ggml.pre ''"),
        ({"tokenizer__ggml__model": "t5"}, "'t5'"),
        ({"tokenizer__ggml__model": "no_vocab"}, "'no_vocab'"),
        ({"split__count": 3}, "split.count is 3"),
        ({"tokenizer__ggml__precompiled_charsmap": "x"}, "precompiled_charsmap"),
        ({"xielu__alpha_n": [1, 2]}, "xielu.alpha_n"),
        ({"general__type": "adapter"}, "'adapter'"),
    ],
)
def test_another_kind_of_file_or_tokenizer_is_refused(general: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, "llama", SMALL, **general)
    assert named in caught.value.what


ODD = [
    0,
    1,
    -1,
    7,
    1 << 40,
    2.5,
    1e300,
    math.nan,
    math.inf,
    True,
    "x",
    "",
    (),
    (1, 2),
    (2.5,),
    (0, 0, 1),
    (True,),
]


def _suffixes() -> list[str]:
    """Return the keys of an architecture that the gguf package names."""
    from gguf import Keys  # numpy

    return sorted(
        value.removeprefix("{arch}.")
        for group in (Keys.LLM, Keys.Attention, Keys.Rope, Keys.SSM, Keys.ShortConv)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.")
    )


@settings(max_examples=400, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    changes=st.dictionaries(
        st.deferred(lambda: st.sampled_from(_suffixes())), st.sampled_from(ODD), max_size=6
    ),
    factors=st.sampled_from(
        [{}, {"rope_freqs.weight": (1.0,) * 8}, {"rope_factors_long.weight": (math.nan,)}]
    ),
)
def test_any_metadata_is_read_or_refused(
    architecture: str, changes: dict[str, Any], factors: dict[str, tuple[float, ...]]
) -> None:
    values = {"general.architecture": architecture, "tokenizer.ggml.model": "llama"}
    values |= {f"{architecture}.{key}": value for key, value in {**SMALL, **changes}.items()}
    tensors: dict[str, tuple[int, ...]] = {name: (len(vector),) for name, vector in factors.items()}
    try:
        json.dumps(
            to_hf_config(GgufHeader(values, {}, EMBEDDING | tensors, rope_factors=factors), Path("x.gguf"))
        )
    except UserError as refused:
        assert "x.gguf" in refused.what


def test_every_splitter_has_rules() -> None:
    assert all(splitter.rules for splitter in PRE_TOKENIZERS.values())


def test_numbers_of_float32_are_written_with_their_own_digits() -> None:
    assert shortest(9.999999974752427e-07) == 1e-6
    assert shortest(0.2199999988079071) == 0.22
    assert shortest(1.1183207035064697) == 1.1183207


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "tiny.gguf")
    assert to_hf_config(read_gguf(file), file)["dtype"] == "Q4_1"
