"""Tokenizers by third parties that take unbounded memory or time are rejected with an explanation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tokenizer_guard import LONGEST_TOKEN, MAX_BYTES, check_tokenizer
from qlora_tui.errors import UserError
from tests.data.families import tokenizer_json


def replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def normalizers(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


BOMB = [replace("e", "e" * 1000)] * 3
EXPANDS = "more than 16 characters of one"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": (normalizers(*BOMB), EXPANDS),
    "normalizer in words": (normalizers(*[replace("e", "ee")] * 30), EXPANDS),
    "nested normalizer": (normalizers(*normalizers(*BOMB).values()), EXPANDS),
    "replacement by a pattern": (
        normalizers({"type": "Replace", "pattern": {"Regex": ""}, "content": "e" * 100}),
        EXPANDS,
    ),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": BOMB}}, EXPANDS),
    "steps": (normalizers(*[{"type": "NFC"}] * 100), "more than 64 steps"),
    "pattern": ({"pre_tokenizer": split("(x+x+)+y")}, "retry-limit-in-match over"),
}


def tokenizer(folder: Path, **changes: Any) -> ChatTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer_json()), **changes}))
    return ChatTokenizer.from_folder(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_without_bounds_is_refused_in_words(name: str, tmp_path: Path) -> None:
    changes, reason = HOSTILE[name]
    with pytest.raises(UserError) as refused:
        tokenizer(tmp_path, **changes)
    assert reason in refused.value.what


def test_a_token_of_absurd_length_is_refused(tmp_path: Path) -> None:
    content = json.loads(tokenizer_json())
    content["model"]["vocab"]["x" * (LONGEST_TOKEN + 1)] = len(content["model"]["vocab"])
    with pytest.raises(UserError, match="Broken tokenizer") as refused:
        tokenizer(tmp_path, model=content["model"])
    assert "a token of more than 4,096 characters" in refused.value.what


def test_a_tokenizer_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError) as refused:
        ChatTokenizer.from_folder(tmp_path)
    assert "larger than 64 MiB" in refused.value.what


def test_a_tokenizer_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":' * 10_000)
    with pytest.raises(UserError, match="Broken tokenizer"):
        ChatTokenizer.from_folder(tmp_path)


def test_the_steps_of_real_tokenizers_are_within_the_bounds() -> None:
    llama = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
    albert = [replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}]
    for steps in (llama, albert):
        content = {**json.loads(tokenizer_json()), "normalizer": {"type": "Sequence", "normalizers": steps}}
        assert check_tokenizer(content) <= 2
