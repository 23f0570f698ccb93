"""Whole characters only, and nothing lost; and a token for all settings that are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.chat.chat_types import Sampling
from qlora_tui.chat.generation import IncrementalDetokenizer, TokenSampler

pytestmark = pytest.mark.slow


def bytes_as_ids(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes; ids from 256 on are special, and left out."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def streamed(ids: Sequence[int]) -> list[str]:
    stream = IncrementalDetokenizer(bytes_as_ids)
    return [*(stream.add(i) for i in ids), stream.rest()]


def test_a_character_is_emitted_with_its_last_byte() -> None:
    assert streamed("né🦊".encode()) == ["n", "", "é", "", "", "", "🦊", ""]


def test_half_a_character_at_the_end_comes_with_the_rest() -> None:
    assert streamed("a🦊".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_invalid_bytes_do_not_delay_the_text_after_them() -> None:
    pieces = streamed([0xFF, 0xFF, 0xFF, 0xFF, ord("a"), ord("b")])
    assert pieces[-3:] == ["a", "b", ""]


@given(st.text(max_size=40))
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = streamed(text.encode())
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_between_words_are_not_shown() -> None:
    assert "".join(streamed([ord("a"), 300, 301, ord("b"), 302])) == "ab"


@pytest.mark.parametrize("setting", ["temperature", "repetition_penalty", "top_p"])
def test_the_smallest_settings_select_a_token(setting: str) -> None:
    sampling = msgspec.convert({"seed": 0, setting: 1e-300}, Sampling)
    logits = torch.tensor([[3.0, 60.0, 2.0, -50.0]])
    token = int(TokenSampler(sampling, [0, 3], logits.device).next(logits))
    assert token == (0 if setting == "repetition_penalty" else 1)
