"""GGUF files of tiny random models of every type, computed by llama.cpp, by transformers, and read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from bench.model_types.tiny_config import settings_of
from bench.support.gguf_copies import float32_copy
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_architectures import ARCHITECTURES
from qlora_tui.errors import UserError
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.gguf_file import content, writer
from qlora_tui.export.gguf_file.content import text_config
from qlora_tui.export.llama_cpp.bindings import LlamaCpp
from qlora_tui.gguf_format.conventions import CONVENTIONS, convention_of
from qlora_tui.training.gguf_weights import convert
from tests.export.export_sources import make_source
from tests.export.gguf_files import (
    base_content,
    divergence,
    divergences,
    llama_logits,
    logits_at_all,
    logits_of,
    made,
    read_back,
    token_ids,
    write_base,
)
from tests.export.tiny_models import EXPERTS, GEMMA, LONG, MODELS, QUICK, SIZES, UNLIKE, make_model
from tests.support.every_model import EVERY_MODEL, walks_over_models

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

ROUNDING = 1e-4
"""Largest KL divergence that the rounding of activations to float16 causes, where it moves no token to
another expert."""
EXACT = 3e-5
"""Largest one of a file whose tensors are all float32."""
LENGTH = 150
"""Tokens: beyond the windows and the original contexts of these models."""
ROUTES_ALIKE = {"expert_group_count", "expert_group_used_count"}
"""Constants that change the answers of a few tokens only."""
OUTER_TYPES = {
    "glm_ocr",
    "qwen2_vl",
    "exaone4_5",
    "glm4v_moe",
    "qwen3_omni_moe",
    "granite4_vision",
    "granite_docling",
}
"""Types that are computed as another one is."""

NOT_READ = {"bamba": "rope.dimension_count is 8, but only 16 is supported"}
"""Types whose files are those of another type with something that its class does not compute."""


@pytest.fixture
def only_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "tensor_type", lambda name, shape, file_type: GGMLQuantizationType.F32)


def each_model() -> Iterator[Any]:
    for number, (model_type, settings) in enumerate(MODELS if EVERY_MODEL else UNLIKE):
        yield pytest.param(model_type, settings, id=f"{number}-{model_type}")


@walks_over_models
@pytest.mark.parametrize("model_type, settings", each_model())
def test_each_type_is_computed_alike_by_llama_cpp_and_when_read_back(
    tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    model, packed = made(tmp_path, model_type, **settings)
    ids = token_ids(LENGTH)
    file = float32_copy(packed, tmp_path / "model.gguf")
    logits = llama_logits(file, ids)
    # A token near the border between two experts may get another one, and so differ itself; likewise an
    # activation near the border below which Gemma 3n sets it to 0.
    routed = any(part in "".join(read_gguf(file).tensors) for part in ("_exps.", "altup_"))
    differences = divergences(model, logits, ids)
    assert (differences.median() if routed else differences.max()) < EXACT
    packed = write_base(tmp_path / "model", tmp_path / "packed.gguf")
    assert divergences(model, llama_logits(packed, ids), ids).median() < ROUNDING
    if read_gguf(file).architecture not in ARCHITECTURES or model_type in NOT_READ:
        with pytest.raises(UserError, match=NOT_READ.get(model_type, "cannot be trained from GGUF")):
            convert(file, tmp_path / "back")
        return
    back = read_back(tmp_path / "back", file)
    if type(back) is type(model) and model_type != "falcon_h1":  # whose weights hold its factors
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, back.state_dict()[name]), name
    differences = divergences(back, logits, ids)
    assert (differences.median() if routed else differences.max()) < EXACT


@pytest.mark.usefixtures("only_float32")
@pytest.mark.parametrize("model_type", QUICK)
def test_no_rule_and_no_constant_is_superfluous(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is left out, or wrong, in the first model of the type that has it."""
    noticed: set[object] = set()
    for number, settings in enumerate(settings for name, settings in MODELS if name == model_type):
        folder = tmp_path / str(number)
        model = make_model(folder / "model", model_type, **settings)
        convention = convention_of(text_config(folder / "model"))
        written = base_content(folder / "model").hyperparameters
        for rule in set(convention.rewrites) - noticed:
            if any(rule.names(name) for name in model.state_dict()):
                noticed.add(rule)
                without = replace(convention, rewrites=tuple(set(convention.rewrites) - {rule}))
                with monkeypatch.context() as patch:
                    patch.setattr(content, "convention_of", lambda config, without=without: without)
                    assert is_noticed(model, folder), rule.pattern
        for key in (convention.reads & written.values.keys()) - ROUTES_ALIKE - noticed:
            noticed.add(key)
            value = written.values[key]
            assert isinstance(value, int | float)
            wrong = not value if isinstance(value, bool) else value * 2 or 3.0
            changed = replace(written, values=written.values | {key: wrong})
            with monkeypatch.context() as patch:
                patch.setattr(content, "hyperparameters", lambda *given, changed=changed: changed)
                assert is_noticed(model, folder), key


def test_published_experts_of_qwen3_vl_have_their_inputs_first(tmp_path: Path) -> None:
    settings = next(settings for name, settings in MODELS if name == "qwen3_vl_moe")
    narrow = settings | {"text_config": settings["text_config"] | {"moe_intermediate_size": 48}}
    model = make_model(tmp_path / "model", "qwen3_vl_moe", **narrow)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    published = {name: values.mT.contiguous() for name, values in tensors.items() if ".experts." in name}
    save_file(tensors | published, weights)
    assert file_divergences(model, tmp_path).median() < ROUNDING


def test_the_whole_model_says_whether_its_head_is_tied(tmp_path: Path) -> None:
    settings = next(settings for name, settings in MODELS if name == "qwen3_vl")
    text = settings["text_config"] | {"tie_word_embeddings": True}
    model = make_model(tmp_path / "model", "qwen3_vl", **settings | {"text_config": text})
    assert not model.config.tie_word_embeddings
    assert file_divergences(model, tmp_path).max() < ROUNDING


def file_divergences(model: Any, folder: Path) -> torch.Tensor:
    """KL divergence of the file of a folder's model from that model, at each position."""
    ids = token_ids(96)
    file = write_base(folder / "model", folder / "model.gguf")
    return divergences(model, logits_of(file, ids), ids)


def is_noticed(model: Any, folder: Path) -> bool:
    """Whether the file of a folder's model cannot be written or loaded, or answers otherwise."""
    try:
        return not file_divergences(model, folder).max() < ROUNDING
    except UserError:
        return True


def test_every_claimed_type_is_computed_by_some_model() -> None:
    configs = [
        AutoConfig.for_model(model_type, **{**SIZES, **settings}).get_text_config()
        for model_type, settings in MODELS
    ]
    assert {id(convention_of(config)) for config in configs} == set(map(id, CONVENTIONS))
    assert {convention_of(config).architecture for config in configs} >= ARCHITECTURES.keys()
    types = {config.model_type.removesuffix("_text") for config in configs}
    assert {name for each in CONVENTIONS for name in each.types} - types == OUTER_TYPES


@pytest.mark.parametrize(
    "model_type, settings, why",
    [
        ("inkling_text", settings_of("inkling_text"), "no architecture of llama.cpp is known"),
        ("mpt", {}, "cannot write"),
        ("phimoe", {}, "sparse mixer"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 20}, "scaled by 20"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "without rotary embedding"),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is gelu, not silu"),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": False}, "its norm_topk_prob is False, not True"),
        (
            "qwen3_moe",
            EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]},
            "its mlp_only_layers is [0]",
        ),
        (
            "qwen3_moe",
            EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2},
            "its decoder_sparse_step is 2",
        ),
        ("olmoe", EXPERTS | {"clip_qkv": 8.0}, "clip_qkv is 8.0, not None"),
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


@pytest.mark.parametrize(
    "model_type", ["qwen3_5_text", "gpt_oss", "lfm2", "granitemoehybrid", "falcon_h1", "ministral3"]
)
def test_a_file_with_an_adapter_answers_as_the_adapter(tmp_path: Path, model_type: str) -> None:
    settings = next(settings for each, settings in MODELS if each == model_type)
    adapter = {"target_modules": ["q_proj", "v_proj"]}
    source = make_source(tmp_path, model_type=model_type, adapter=adapter, **settings)
    (file,) = export_gguf(source, "adapter", tmp_path / "out.gguf", ["F16"]).files
    assert file.proof is not None and file.proof.effect_is_measurable
    assert file.proof.divergence < file.proof.effect / 50
