"""A base read from a GGUF file computes what llama.cpp computes from it, and splits text the same way."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bench.support.gguf_copies import float32_copy
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_tokenizers import PRE_TOKENIZERS
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.vocabulary import read_vocabulary
from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError
from qlora_tui.gguf_format import inverse
from qlora_tui.training.gguf_tokenizer import GgufTokenizer
from qlora_tui.training.gguf_weights import convert
from tests.export.gguf_files import (
    divergence,
    llama_logits,
    made,
    read_back,
    token_ids,
    write_base,
)
from tests.export.published_tokenizers import KINDS, TEXTS
from tests.export.test_gguf_tokenizers import PREFIX_ON_FIRST, STRANGE, write_model
from tests.export.tiny_models import GEMMA, LONG, YARN

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
LENGTH = 150
"""Beyond the windows and the original contexts of these models."""


def changed(packed: Path, **changes: Any) -> Path:
    """Write a copy with float32 weights and other metadata (dots written as double underscores)."""
    metadata = {key.replace("__", "."): value for key, value in changes.items()}
    return float32_copy(packed, packed.with_name("model.gguf"), metadata)


def test_the_long_factors_are_read_too(tmp_path: Path) -> None:
    _, packed = made(tmp_path, "phi3", rope_parameters=LONG)
    file = changed(packed, phi3__context_length=512)
    model = read_back(tmp_path / "back", file)
    ids = token_ids(LONG["original_max_position_embeddings"] + 40)
    assert divergence(model, llama_logits(file, ids), ids) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "settings", "change"),
    [
        ("llama", {"rope_parameters": LINEAR}, {"llama__rope__scaling__factor": 7.0}),
        ("llama", {"rope_parameters": YARN}, {"llama__rope__scaling__original_context_length": 32}),
        ("llama", {}, {"llama__rope__freq_base": 11000.0}),
        ("llama", {}, {"llama__attention__layer_norm_rms_epsilon": 0.05}),
        ("gemma2", GEMMA, {"gemma2__attention__sliding_window": 40}),
        ("gemma2", GEMMA, {"gemma2__final_logit_softcapping": 4.0}),
        ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, {"gemma3__rope__freq_base_swa": 20000.0}),
        ("granite", {}, {"granite__residual_scale": 0.9}),
    ],
)
def test_a_changed_constant_changes_both_alike(
    tmp_path: Path, model_type: str, settings: dict[str, Any], change: dict[str, Any]
) -> None:
    original, packed = made(tmp_path, model_type, **settings)
    file = changed(packed, **change)
    ids = token_ids(LENGTH)
    logits = llama_logits(file, ids)
    assert divergence(original, logits, ids) > 1e-3
    assert divergence(read_back(tmp_path / "back", file), logits, ids) < 1e-5


@pytest.mark.parametrize("tensor", ["blk.0.attn_sinks.weight", "blk.2.attn_norm.weight", "made_up.weight"])
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, tensor: str) -> None:
    _, packed = made(tmp_path, "llama")
    file = float32_copy(packed, tmp_path / "model.gguf", vectors={tensor: [0.0] * 32})
    with pytest.raises(UserError) as refused:
        convert(file, tmp_path / "back")
    assert tensor in refused.value.what
    assert not (tmp_path / "back").exists()


def test_wrong_row_order_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = made(tmp_path, "llama")
    monkeypatch.setattr(inverse.Origin, "restore", lambda self, stored, original: original.copy_(stored))
    ids = token_ids(LENGTH)
    model = read_back(tmp_path / "back", packed)
    assert divergence(model, llama_logits(packed, ids), ids) > 0.1


@cache
def merged_across_borders() -> dict[str, Any]:
    """Train a vocabulary whose merges cross every border at which a splitter may cut."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*STRANGE, *TEXTS], trainer)
    content: dict[str, Any] = json.loads(backend.to_str())["model"]
    return content


def write_vocabulary(file: Path, pre: str) -> Path:
    """Write a tiny Llama with that vocabulary."""
    content = merged_across_borders()
    tokens = [*sorted(content["vocab"], key=content["vocab"].__getitem__), "<|im_start|>", "<|im_end|>"]
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 2)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (32,)} | {f"blk.0.ffn_{part}": (32, 32) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def different_texts(file: Path, tokenizer: ChatTokenizer, texts: list[str]) -> list[str]:
    with LlamaCpp().open(str(file), context=8) as llama:
        return [text for text in texts if llama.tokenize(text) != tokenizer.encode(text)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_splitter_splits_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    file = write_vocabulary(tmp_path / "model.gguf", pre)
    tokenizer = GgufTokenizer(read_gguf(file, vocabulary=True))
    tokenizer.write(tmp_path, 64)
    read = ChatTokenizer.from_folder(tmp_path)
    try:
        assert not different_texts(file, read, [*STRANGE, *TEXTS])
    except LlamaCppError:
        pytest.skip(f"this llama.cpp does not know {pre}")
    with LlamaCpp().open(str(file), context=8) as llama:
        begins = llama.tokenize("a", add_special=True)[0] == llama.tokenize("<|im_start|>")[0]
    assert read.begins_with_bos == begins


def test_a_vocabulary_of_gemma_4_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "gemma")
    packed = write_base(tmp_path / "model", tmp_path / "packed.gguf")
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    joined = [" ".join(pair) for pair in merges]
    file = changed(packed, tokenizer__ggml__merges=joined, tokenizer__ggml__model="gemma4")
    GgufTokenizer(read_gguf(file, vocabulary=True)).write(tmp_path, 64)
    assert not different_texts(file, ChatTokenizer.from_folder(tmp_path), [*STRANGE, *TEXTS])


def test_another_splitter_is_noticed(tmp_path: Path) -> None:
    file = write_vocabulary(tmp_path / "model.gguf", "qwen2")
    for pre in ("llama-bpe", "gpt-2", "smollm", "tekken", "default"):
        write_vocabulary(tmp_path / "other.gguf", pre)
        GgufTokenizer(read_gguf(tmp_path / "other.gguf", vocabulary=True)).write(tmp_path, 64)
        assert different_texts(file, ChatTokenizer.from_folder(tmp_path), STRANGE), pre


@pytest.mark.parametrize("name", KINDS)
def test_a_published_vocabulary_is_read_as_llama_cpp_reads_it(tmp_path: Path, name: str) -> None:
    written = write_model(tmp_path / "model", name)
    file = write_base(tmp_path / "model", tmp_path / "phi-3.gguf")
    convert(file, tmp_path / "back")
    read = ChatTokenizer.from_folder(tmp_path / "back")
    added = [token for token in written.added_tokens if token.strip(" \n\t▁")][:6]
    texts = [*STRANGE, *TEXTS, *(f"{token}{text}" for token in added for text in STRANGE[:18])]
    assert not different_texts(file, read, texts)
    assert read.template.text == written.template.text
    begins = read_gguf(file).values["tokenizer.ggml.add_bos_token"]
    assert (read.eos_id, read.begins_with_bos) == (written.eos_id, begins)
    # The original differs only where it has a rule that llama.cpp lacks: see the notes of an export.
    known = read_vocabulary(written, 2000).differences
    for text in texts if name != PREFIX_ON_FIRST else ():
        assert read.encode(text) == written.encode(text) or any(each.applies_to(text) for each in known)
