"""Tokens are found in a tokenizer's vocabulary without the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.token_lookup import check_tokens
from qlora_tui.errors import UserError

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
