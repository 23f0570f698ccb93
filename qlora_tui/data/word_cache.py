"""Token ids of texts, each word encoded once and then remembered.

Most current tokenizers split a text into words before they search for tokens, and no word extends across a
single space between two non-space characters. Where that can be proved for a tokenizer
(``splits_on_spaces``), a text can be encoded word by word, and a word gives the same tokens anywhere: a table
lookup instead of a search. Used by ``tokenizer``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from msgspec import Struct
from tokenizers import Encoding

_MAX_CACHED_WORDS = 100_000
"""Most words in the cache; it is cleared when full. With their tokens, they take some 25 MB."""
_LONGEST_WORD = 48
"""Most characters of a cached word. Longer ones rarely repeat: addresses, code, writing without spaces."""
_WORDS = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+(?:\S+|$))*")
"""A word with the white space before it, and what follows unless that is a single space and a word."""

_CHAINED = re.compile(r" \S(?:.*\S)?", re.DOTALL)
"""A word that begins with a space and ends without one."""


class Marked(Struct, frozen=True):
    """An encoded text."""

    ids: list[int]
    cuts: list[tuple[int, bool]]
    """Result of ``token_at`` for each requested place."""


def token_at(encoding: Encoding, character: int) -> tuple[int, bool]:
    """Return the first token that begins at ``character`` or later, and whether the previous one spans it."""
    token = encoding.char_to_token(character)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > character), len(offsets))
    if token < len(encoding.ids) and encoding.token_to_chars(token)[0] < character:  # type: ignore[index]
        return token + 1, True
    return token, False


class WordTokenCache:
    """Cache of the tokens of words."""

    def __init__(self, encode_batch: Callable[[list[str]], list[Encoding]], isolated: Iterable[str] = ()):
        """``isolated`` are tokens that split a text before any other step (see ``isolated_added_tokens``)."""
        self._encode_batch = encode_batch
        self._words: dict[str, tuple[int, ...]] = {}
        self._inside: dict[tuple[str, int], tuple[int, bool]] = {}
        """Results of ``token_at`` for places inside words."""
        longest_first = sorted(isolated, key=len, reverse=True)
        self._isolated = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Marked]:
        """Return the tokens of each text, and which of them begin at its ``places``: characters, ascending,
        none of them at either end."""
        if len(self._words) + len(self._inside) > _MAX_CACHED_WORDS:
            self._words.clear()
            self._inside.clear()
        cut = [self._cut(text, at) for text, at in zip(texts, places, strict=True)]
        new = list(set().union(*(words for words, _ in cut)).difference(self._words))
        self._learn(new)
        encoded = [self._marked(words, marks) for words, marks in cut]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._words[word]
        return encoded

    def _cut(self, text: str, places: Sequence[int]) -> _Cut:
        words: list[str] = []
        marks: list[tuple[int, int]] = []
        pending = deque(places)
        start = 0
        for number, piece in enumerate(self._isolated.split(text) if self._isolated else (text,)):
            parts = [piece] if number % 2 else _WORDS.findall(piece)
            end = start + len(piece)
            while pending and pending[0] < end:
                at, character = 0, pending.popleft() - start
                while character >= len(parts[at]):
                    character -= len(parts[at])
                    at += 1
                marks.append((len(words) + at, character))
            words += parts
            start = end
        return words, marks

    def _marked(self, words: list[str], marks: list[tuple[int, int]]) -> Marked:
        ids: list[int] = []
        cuts: list[tuple[int, bool]] = []
        done = 0
        for at, character in marks:
            ids.extend(chain.from_iterable(map(self._words.__getitem__, words[done:at])))
            done = at
            token, straddles = self._token_in(words[at], character) if character else (0, False)
            cuts.append((len(ids) + token, straddles))
        ids.extend(chain.from_iterable(map(self._words.__getitem__, words[done:])))
        return Marked(ids, cuts)

    def _learn(self, words: list[str]) -> None:
        """Encode words. Words that may follow each other are joined into one text, which is twice as fast."""
        chained = [word for word in words if _CHAINED.fullmatch(word)]
        alone = list(set(words).difference(chained))
        *encodings, chain_ = self._encode_batch([*alone, "".join(chained)])
        self._words.update(zip(alone, (tuple(encoding.ids) for encoding in encodings), strict=True))
        ids, ends = chain_.ids, [end for _, end in chain_.offsets]
        first = length = 0
        for word in chained:
            length += len(word)
            last = bisect_right(ends, length, first)
            self._words[word] = tuple(ids[first:last])
            first = last

    def _token_in(self, word: str, character: int) -> tuple[int, bool]:
        position = self._inside.get((word, character))
        if position is None:
            position = token_at(self._encode_batch([word])[0], character)
            if len(word) <= _LONGEST_WORD:
                self._inside[word, character] = position
        return position


_Cut: TypeAlias = tuple[list[str], list[tuple[int, int]]]
"""The words of a text, and for each place the index of its word and the character within that word."""

_CLASS = r"(?:\\p\{[LMN]\w?\}|\[(?:\\p\{[LMN]\w?\})+\]|\[\^\\s(?:\\p\{[LMN]\w?\})+\]|\[\\r\\n/?\])"
_SHORT_FORMS = r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"
_LEAD = r"(?: \?|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?)?"
_BLANKS = r"\\s\*\[\\r\\n\]\+|\\s\+\(\?!\\S\)|\\s\+"
_WORD = rf"(?:{_LEAD}(?:(?:{_CLASS}|{_SHORT_FORMS})(?:[+*?]|\{{\d(?:,\d)?\}})?)+|{_BLANKS})"
_PATTERN = re.compile(rf"(?:{_WORD}\|)+\\s\+")
"""Patterns whose words are white space only, or have a space at most in first position, and that treat any
space as the beginning of a word: those of Llama 3, Qwen, gpt-oss, Mistral's Tekken and similar ones."""


def splits_on_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the words of a tokenizer (its ``tokenizer.json``) can be encoded separately.

    For that its pattern must end a word at every single space between two non-space characters, and no other
    step may look across it.
    """
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer.get("type") == "NFC")
        and all(_is_local(step) for step in steps)
        and any(_cuts(step) for step in steps)
        and not any(_looks_across(token) for token in tokenizer.get("added_tokens") or ())
    )


def isolated_added_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the added tokens that are split off before any other step and that do not depend on adjacent
    text; none where one of the same kind does."""
    first = [token for token in tokenizer.get("added_tokens") or () if not token.get("normalized")]
    plain = not any(token.get(flag) for token in first for flag in ("lstrip", "rstrip", "single_word"))
    return [token["content"] for token in first] if plain else []


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    return [pre_tokenizer]


def _cuts(step: Mapping[str, Any]) -> bool:
    """Return whether the step ends a word at every such space. ByteLevel's own pattern is that of GPT-2."""
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    pattern = (step.get("pattern") or {}).get("Regex", "")
    return step["type"] == "Split" and _PATTERN.fullmatch(pattern) is not None


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space")
    if step["type"] == "Split":
        return _cuts(step) and step.get("behavior") == "Isolated" and not step.get("invert")
    return bool(step["type"] == "Digits")


def _looks_across(token: Mapping[str, Any]) -> bool:
    """Return whether an added token contains such a space, or takes the white space after it."""
    return bool(token.get("rstrip")) or re.search(r"\S \S", token["content"]) is not None
