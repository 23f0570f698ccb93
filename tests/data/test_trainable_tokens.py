"""Tokens are found in a tokenizer's vocabulary without the tokenizers library."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.inspection import inspect
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.trainable_tokens import check_tokens, token_ids, untrained_tokens
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source
from tests.data.families import CHATML, STRIPS, tokenizer_json

VOCAB = {"<s>": 0, 'say "hi"': 1, "Ġthe": 2, "é": 3, "a:b": 4}
PAIRS = [["<s>", 0.0], ["▁the", -3.5], ['a["b', -4.0]]


def write(folder: Path, vocab: Any, *, ascii_only: bool = True, indent: int | None = None) -> Path:
    tokenizer = {"added_tokens": [{"id": 9, "content": "<|im_end|>"}], "model": {"type": "x", "vocab": vocab}}
    text = json.dumps(tokenizer, ensure_ascii=ascii_only, indent=indent)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_every_token_of_a_table_is_found(tmp_path: Path, ascii_only: bool, indent: int | None) -> None:
    check_tokens([*VOCAB, "<|im_end|>"], write(tmp_path, VOCAB, ascii_only=ascii_only, indent=indent))


def test_every_token_of_a_list_of_pairs_is_found(tmp_path: Path) -> None:
    check_tokens(["<s>", "▁the", 'a["b'], write(tmp_path, PAIRS))


@pytest.mark.parametrize("vocab", [VOCAB, PAIRS])
@pytest.mark.parametrize("token", ["the", "hi", "b", "0", "", ","])
def test_part_of_a_token_is_no_token(tmp_path: Path, vocab: Any, token: str) -> None:
    with pytest.raises(UserError, match="not a token"):
        check_tokens([token], write(tmp_path, vocab))


def test_a_damaged_tokenizer_is_left_to_the_loader(tmp_path: Path) -> None:
    check_tokens(["x"], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    check_tokens(["x"], tmp_path)


WIDTH = 8


def model(
    folder: Path, rows: dict[str, list[float]], dtype: str = "F32", template: str = CHATML
) -> ChatTokenizer:
    """A folder with a tokenizer and an embedding in which ``rows`` are set by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer.from_folder(folder)
    chance = random.Random(0)
    size = tokenizer.backend.get_vocab_size()
    table = [[chance.gauss(0, 1) for _ in range(WIDTH)] for _ in range(size)]
    for token, row in rows.items():
        table[tokenizer.added_tokens[token]] = row
    flat = [value for row in table for value in row]
    if dtype == "BF16":
        data = b"".join(struct.pack("<f", value)[2:] for value in flat)
    else:
        data = struct.pack(f"<{len(flat)}{'e' if dtype == 'F16' else 'f'}", *flat)
    header = {
        "model.embed_tokens.weight": {"dtype": dtype, "shape": [size, WIDTH], "data_offsets": [0, len(data)]}
    }
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return tokenizer


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_untrained_tokens_are_reported_if_the_template_writes_them(tmp_path: Path, dtype: str) -> None:
    faint = {"<|im_end|>": [1e-4] * WIDTH, "<|eot_id|>": [0.0] * WIDTH}
    tokenizer = model(tmp_path, faint, dtype)
    assert untrained_tokens(tmp_path, tokenizer) == ["<|im_end|>"]


def test_tokens_that_all_have_the_same_row_are_named(tmp_path: Path) -> None:
    same = [0.5] * WIDTH
    tokens = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>")
    tokenizer = model(tmp_path, dict.fromkeys(tokens, same), template=STRIPS)
    assert untrained_tokens(tmp_path, tokenizer) == ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]


def test_trained_tokens_are_not_named(tmp_path: Path) -> None:
    assert untrained_tokens(tmp_path, model(tmp_path, {})) == []


def test_the_report_offers_to_train_or_avoid_untrained_tokens(tmp_path: Path) -> None:
    tokenizer = model(tmp_path / "model", {"<|im_end|>": [0.0] * WIDTH})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    problem = inspect(Source(path=str(rows)), tokenizer).problems[0]
    assert (problem.kind, problem.example) == ("untrained-tokens", "<|im_end|>")
    assert problem.tokens == ("<|im_end|>",)
    assert 'lora.trainable_tokens = ["<|im_end|>"]' in problem.fix and "alpaca" in problem.fix


def test_tokens_are_looked_up_by_name_and_unknown_ones_rejected(tmp_path: Path) -> None:
    tokenizer = model(tmp_path, {})
    end = tokenizer.added_tokens["<|im_end|>"]
    assert token_ids(("<|im_end|>", "<|im_end|>"), tokenizer) == [end]
    with pytest.raises(UserError, match="'<end>', which is not a token"):
        token_ids(("<|im_end|>", "<end>"), tokenizer)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9) + b"{}"]
)
def test_an_embedding_that_cannot_be_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    tokenizer = model(tmp_path, {"<|im_end|>": [0.0] * WIDTH})
    (tmp_path / "model.safetensors").write_bytes(content)
    assert untrained_tokens(tmp_path, tokenizer) == []
