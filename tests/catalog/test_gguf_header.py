"""GGUF headers: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.gguf import GgufHeader, read_gguf, to_hf_config
from qlora_tui.errors import UserError
from tests.catalog.models import TINY_PARAMS, gguf_bytes, make_gguf


def test_a_header_gives_the_architecture(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "tiny.gguf")
    header = read_gguf(file)
    assert header.architecture == "llama"
    assert header.quantization == "Q4_1"
    assert header.lengths["tokenizer.ggml.tokens"] == 64
    architecture = parse_architecture(to_hf_config(header, file))
    assert architecture.total_params == TINY_PARAMS
    assert architecture.head_dim == 8
    assert architecture.dtype == "Q4_1"


def test_a_head_that_is_not_stored_is_tied(tmp_path: Path) -> None:
    file = tmp_path / "tied.gguf"
    make_gguf(file)
    untied = read_gguf(file)
    del untied.tensors["output.weight"]
    assert to_hf_config(untied, file)["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general__architecture": "mamba"}, "'mamba'"),
        ({"general__architecture": "clip"}, "'clip'"),
        ({"general__architecture": None}, "None"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__attention__head_count_kv": [1, 2]}, "differs between layers"),
    ],
)
def test_what_cannot_be_trained_from_gguf_is_refused(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    file = make_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(UserError) as caught:
        to_hf_config(read_gguf(file), file)
    assert named in caught.value.what
    assert str(file) in caught.value.what


_SIZES = {"block_count": 2, "embedding_length": 512, "feed_forward_length": 32, "attention.head_count": 2}
_WIDTHS = {"attention.key_length": 256, "attention.value_length": 256}
_USUAL: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": 256, "rope.freq_base": 500_000.0, "rope.scaling.type": "none"},
    "qwen2": {"rope.scaling.finetuned": False, "attention.layer_norm_rms_epsilon": 1e-6},
    "qwen3": {"attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 128},
    "phi3": {"rope.dimension_count": 256, "attention.sliding_window": 4096},
    "gemma2": _WIDTHS
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 512},
    "gemma3": _WIDTHS | {"rope.freq_base_swa": 10_000.0, "attention.sliding_window": 512},
    "starcoder2": {"attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 999_999.4},
}
"""Keys of files that are converted whole, by architecture."""


def header_of(architecture: str, keys: dict[str, Any], tensors: tuple[str, ...] = ()) -> GgufHeader:
    of_all = _SIZES | {"context_length": 4096, "attention.head_count_kv": 1} | _USUAL[architecture] | keys
    values = {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in of_all.items()}
    names = ("token_embd.weight", "blk.0.attn_norm.weight", *tensors)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (512, 64))
    return GgufHeader(values, {}, shapes)


@pytest.mark.parametrize("architecture", _USUAL)
def test_a_file_of_which_nothing_is_lost_is_accepted(architecture: str, tmp_path: Path) -> None:
    header = header_of(architecture, {"attention.clamp_kqv": 0.0, "expert_count": 0})
    assert to_hf_config(header, tmp_path)["hidden_size"] == 512


@pytest.mark.parametrize(
    ("architecture", "keys", "tensors", "named"),
    [
        ("llama", {"rope.scaling.type": "linear"}, (), "llama.rope.scaling.type of linear"),
        ("llama", {}, ("rope_freqs.weight",), "the tensor rope_freqs.weight"),
        ("llama", {"rope.dimension_count": 128, **_WIDTHS}, (), "llama.attention.key_length of 256"),
        ("llama", {"attention.temperature_scale": 0.1}, (), "llama.attention.temperature_scale (0.1)"),
        ("qwen2", {"attention.causal": False}, (), "qwen2.attention.causal of"),
        ("qwen2", {"rope.scaling.type": "yarn"}, (), "qwen2.rope.scaling.type of yarn"),
        ("qwen3", {"attention.key_length": 64}, (), "qwen3.attention.key_length of 64 (only 128)"),
        ("phi3", {"attention.sliding_window": 2047}, (), "phi3.attention.sliding_window of 2047"),
        ("phi3", {"rope.dimension_count": 192}, (), "phi3.rope.dimension_count of 192"),
        ("phi3", {}, ("rope_factors_long.weight",), "rope_factors_long.weight"),
        ("gemma2", {"block_count": 46, "attention.head_count": 4}, (), "scale of its attention (1/√128"),
        ("gemma2", {"final_logit_softcapping": 20.0}, (), "final_logit_softcapping of 20 (only 30)"),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, (), "type of linear"),
        ("gemma3", {"block_count": 62, "attention.head_count": 3}, (), "1/√170"),
        ("gemma3", {"attention.key_length": 128, "attention.value_length": 128}, (), "1/√128"),
        ("gemma3", {"attention.sliding_window_pattern": 4}, (), "sliding_window_pattern of 4 (only 6)"),
        ("gemma3", {"mm.tokens_per_image": 256}, (), "gemma3.mm.tokens_per_image"),
        ("starcoder2", {"logit_scale": 0.5}, (), "starcoder2.logit_scale (0.5)"),
        ("llama", {}, ("blk.0.attn_sinks.weight",), "the tensor blk.0.attn_sinks.weight"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(
    architecture: str, keys: dict[str, Any], tensors: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    header = header_of(architecture, keys, tensors)
    with pytest.raises(UserError) as caught:
        to_hf_config(header, tmp_path)
    assert named in caught.value.what and "would be lost" in caught.value.what


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "half.gguf", llama__block_count=None)
    with pytest.raises(UserError, match="num_hidden_layers is missing"):
        parse_architecture(to_hf_config(read_gguf(file), file))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(60), b"GGUF\x01\0\0\0" + bytes(60)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "no.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_gguf(file)
    assert str(file) in caught.value.what


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


WHOLE = gguf_bytes(
    {"general.architecture": "llama", "a": ["one", "two"], "b": [1, 2], "c": 1.5, "d": True}, {"t": (2, 3)}
)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(WHOLE) - 1), at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_damage_is_a_problem_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, byte: int
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.gguf"
    file.write_bytes(WHOLE[:cut])
    with pytest.raises(UserError):
        read_gguf(file)
    file.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        read_gguf(file)
    except UserError as problem:
        assert problem.fix
