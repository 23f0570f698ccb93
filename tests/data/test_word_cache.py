"""Encoding word by word gives what encoding the whole text gives."""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_tui.data import word_cache
from qlora_tui.data.word_cache import WordTokenCache, isolated_added_tokens, splits_on_spaces, token_at
from tests.data.families import tokenizer_json

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
PATTERNS = {
    "llama3": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}|{_REST}",
    "qwen3.5": rf"{_SHORT}|{_FIRST}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-oss": rf"{_FIRST}[{_UPPER}]*[{_LOWER}]+{_SHORT}?|{_FIRST}[{_UPPER}]+[{_LOWER}]*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_REST}",
    "tekken": rf"{_FIRST}[{_UPPER}]*[{_LOWER}]+|{_FIRST}[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How these families cut words; gpt2's is ByteLevel's own."""
LETTERS = "aBé1٣.,'/!-\n\r\t\u00a0\u2003\x1c\x85你😀\u0301s"


@cache
def build_cache(name: str) -> Tokenizer:
    """A small tokenizer that cuts words in one of these ways."""
    tokenizer = Tokenizer(models.BPE())
    if name in PATTERNS:
        tokenizer.normalizer = normalizers.NFC() if name.startswith("qwen") else None
        split = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if name == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [
        *("a 1 é. B a 's \n\n  a  1 1,\t!! -- a/ B你 你\n a <|im_end|>\n", " ..  11 a'saBé\r\n"),
        *("a.\n\nb !\n a!\r\n", "\n\na!\n\nB.\n-\n", "/\n1,\r\n\r\n'\n\n"),
    ]
    tokenizer.train_from_iterator(lines * 20, trainer)
    stripping = AddedToken("<|im_end|>", lstrip=name == "gpt2", normalized=False, special=True)
    tokenizer.add_special_tokens([stripping, AddedToken("<|im_end|>!", normalized=False, special=True)])
    return tokenizer


def whole(tokenizer: Tokenizer, text: str, places: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
    """What the tokenizer itself says."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [token_at(encoding, place) for place in places]


def by_words(tokenizer: Tokenizer, text: str, places: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
    """What the memo says, the words known or not."""
    memo = WordTokenCache(
        lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False),
        isolated_added_tokens(json.loads(tokenizer.to_str())),
    )
    (first,), (again,) = memo.encode([text], [places]), memo.encode([text], [places])
    assert (first.ids, first.cuts) == (again.ids, again.cuts)
    return first.ids, first.cuts


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
def test_these_tokenizers_cut_at_spaces(name: str) -> None:
    assert splits_on_spaces(json.loads(build_cache(name).to_str()))


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
@given(data=st.data())
def test_word_by_word_gives_what_the_whole_text_gives(name: str, data: st.DataObject) -> None:
    pieces = st.sampled_from([*LETTERS, "<|im_end|>", "<|im_end|>!", " ", " ", "  ", "\n\n", "a", "word"])
    text = "".join(data.draw(st.lists(pieces, max_size=40)))
    places = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    places = [place for place in places if place < len(text)]
    assert by_words(build_cache(name), text, places) == whole(build_cache(name), text, places)


@pytest.mark.parametrize("name", ["gpt2", "smollm", *PATTERNS])
@given(text=st.lists(st.sampled_from([*LETTERS, " ", " ", "  ", "\n\n", "word"]), max_size=40).map("".join))
@example(text="\n\nSure!\n\nHere is")
@example(text="\n")
@example(text="  a!\n ")
def test_no_word_of_the_tokenizer_reaches_across_a_cut(name: str, text: str) -> None:
    """Any trained tokens: a wrong split shows even where no token would span it."""
    words, _ = WordTokenCache(lambda _: [])._cut(text, [])
    assert "".join(words) == text
    assert _pieces(name, text) == [piece for word in words for piece in _pieces(name, word)]


def _pieces(name: str, text: str) -> list[str]:
    """What one of these tokenizers looks for tokens in."""
    tokenizer = build_cache(name)
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def test_a_token_that_absorbs_adjacent_whitespace_is_not_split_off() -> None:
    plain = {"content": "<a>", "normalized": False}
    assert isolated_added_tokens({"added_tokens": [plain, {"content": "<b>", "normalized": True}]}) == ["<a>"]
    for flag in ("lstrip", "rstrip", "single_word"):
        assert isolated_added_tokens({"added_tokens": [plain, {**plain, flag: True}]}) == []


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_every_kind_of_white_space_beside_a_space_is_heeded(name: str) -> None:
    blanks = [chr(n) for n in range(sys.maxunicode) if chr(n).isspace() or n in (0x180E, 0x200B, 0xFEFF)]
    for blank in blanks:
        for text in (f"a{blank} a", f"a {blank}a", f"a {blank} a", f"a{blank}", f"{blank} a"):
            assert by_words(build_cache(name), text, []) == whole(build_cache(name), text, [])


def test_a_full_word_cache_is_cleared_and_skips_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MAX_CACHED_WORDS", 3)
    words: list[str] = []

    def encode(texts: list[str]) -> Any:
        words.append("".join(texts))
        return build_cache("gpt2").encode_batch(texts, add_special_tokens=False)

    memo = WordTokenCache(encode)
    memo.encode(["a 1 é B 1"], [[]])
    memo.encode(["a 1", "x" * 100], [[], []])
    memo.encode(["a 1", "x" * 100], [[], []])
    assert [sorted(text) for text in words] == [sorted("a 1 é B"), sorted("a 1" + "x" * 100), ["x"] * 100]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}},
        {"model": {"type": "Unigram"}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"added_tokens": [{"content": "<a>", "rstrip": True}]},
        {"added_tokens": [{"content": "end of turn"}]},
    ],
)
def test_others_are_encoded_whole(change: dict[str, Any]) -> None:
    assert not splits_on_spaces({**json.loads(tokenizer_json()), **change})


@pytest.mark.parametrize(
    "pattern",
    [r"\p{L}+ \p{L}+|\s+", r"[^\p{L}]+|\s+", r"\s?\p{L}+|\s+", r".+|\s+", r"\p{L}+", r" ?\p{L}+ ?|\s+"],
)
def test_a_pattern_that_may_cross_a_space_is_not_cached(pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    assert not splits_on_spaces({**json.loads(tokenizer_json()), "pre_tokenizer": split})
