"""GGUF headers: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_config import to_hf_config
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


def test_a_vector_of_the_rotary_embedding_and_short_arrays_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(
        gguf_bytes({"a": [True, False], "b": ["x"]}, {"t": (2, 3)}, {"rope_freqs.weight": [1, 8.5]})
    )
    header = read_gguf(file)
    assert header.values == {"a": (True, False)} and header.lengths == {"a": 2, "b": 1}
    assert header.rope_factors == {"rope_freqs.weight": (1.0, 8.5)}


def test_the_vocabulary_is_read_on_request_only(tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "x.gguf")
    assert "tokenizer.ggml.tokens" not in read_gguf(file).values
    assert read_gguf(file, vocabulary=True).values["tokenizer.ggml.tokens"][1] == "token 1"


WHOLE = gguf_bytes(
    {"general.architecture": "llama", "a": ["one", "two"], "b": [1, 2], "c": 1.5, "d": True},
    {"t": (2, 3)},
    {"rope_freqs.weight": [1.0] * 8},
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
