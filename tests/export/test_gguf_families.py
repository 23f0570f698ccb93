"""GGUF files of tiny random models of every family, computed by llama.cpp and by transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file import families
from qlora_tui.export.gguf_file.families import FAMILIES
from qlora_tui.export.llama_cpp.bindings import LlamaCpp
from qlora_tui.training.selftest import write_tokenizer
from tests.export.gguf_files import divergence, logits_at_all, logits_of, write_base
from tests.training.tiny_model import CHAT_TEMPLATE

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

TEXT = "the quick brown fox jumps over the lazy dog; a wise old owl sat in an oak and said little"
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ("mistral", {"head_dim": 32}),
    ("smollm3", {"num_hidden_layers": 5}),
    ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3,
                 "residual_multiplier": 0.5}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("gemma2", GEMMA | {"num_hidden_layers": 3}),
    ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    ("gemma3_text", GEMMA | {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }, "num_hidden_layers": 7}),
    ("phi3", {}),
    ("phi3", {"rope_parameters": LONG}),
    ("olmo2", {}),
    ("glm4", {"head_dim": 16}),
    ("mixtral", {"num_local_experts": 8}),
    ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    ("qwen3_moe", EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
]  # fmt: skip


def make_model(folder: Path, model_type: str, **settings: Any) -> Any:
    """Write a random model with weights and norms far from their initial values; returns it in float32."""
    write_tokenizer(folder, [TEXT], CHAT_TEMPLATE, vocab_size=384)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager"
    )
    randomize(model).save_pretrained(folder)
    return model


def randomize(model: Any) -> Any:
    """Give a model weights and norms far from their initial values; returns it in float32."""
    model = model.float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            elif weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.2)
            # Values that float16 holds exactly.
            weight.copy_(weight.half().float())
    return model


def token_ids(count: int) -> list[int]:
    return random.Random(0).choices(range(2, 384), k=count)


@pytest.mark.parametrize("model_type, settings", MODELS)
def test_llama_cpp_computes_each_family_as_transformers(
    tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", model_type, **settings)
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    ids = token_ids(96)
    assert divergence(model, logits_of(file, ids), ids) < 1e-4


def test_every_claimed_family_is_computed_here() -> None:
    assert {model_type for model_type, _ in MODELS} == FAMILIES.keys()


def test_wrong_row_order_changes_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", "llama")
    monkeypatch.setattr(families, "permute_for_interleaved_rope", lambda values, heads: values)
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    ids = token_ids(96)
    assert divergence(model, logits_of(file, ids), ids) > 0.1


@pytest.mark.parametrize(
    "model_type, settings, why",
    [
        ("cohere", {}, "the model's type is cohere"),
        ("gemma3_text", GEMMA | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "sixth"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 20}, "scaled by 20"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "without rotary embedding"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": False}, "the weights of a token's experts"),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]}, "have no experts"),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2}, "have no experts"),
        ("mixtral", {"num_local_experts": 8, "clip_qkv": 8.0}, "it clips queries"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], why: str
) -> None:
    make_model(tmp_path / "model", model_type, **settings)
    with pytest.raises(UserError) as refused:
        write_base(tmp_path / "model", tmp_path / "model.gguf")
    assert why.lower() in str(refused.value).lower()
    assert "export merge" in refused.value.fix


def test_a_window_that_llama_cpp_lacks_limits_the_context(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mistral", sliding_window=32)
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    ids = token_ids(32)
    assert divergence(model, logits_of(file, ids), ids) < 1e-4
    assert GGUFReader(file).fields["llama.context_length"].contents() == 32


def test_longrope_limits_the_context_to_the_short_factors(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "phi3", rope_parameters=LONG)
    file = write_base(tmp_path / "model", tmp_path / "model.gguf")
    context = GGUFReader(file).fields["phi3.context_length"].contents()
    assert context == LONG["original_max_position_embeddings"]
    ids = token_ids(96)
    with LlamaCpp().open(str(file), context=context, exact=True) as llama:
        assert divergence(model, logits_at_all(llama, ids), ids) < 1e-4
    with LlamaCpp().open(str(file), context=2 * context, exact=True) as llama:
        assert divergence(model, logits_at_all(llama, ids), ids) > 0.01
