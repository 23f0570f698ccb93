"""Token ids of texts, each word encoded once and then remembered.

Most tokenizers of today cut a text into words before they look for tokens, and no word reaches across a
single space that stands between two characters that are no white space. Where that can be proved of a
tokenizer (``cuts_at_spaces``) a text may be encoded word by word, and a word gives the same tokens wherever
it stands: a look into a table instead of a search. Used by ``tokenizer``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from msgspec import Struct
from tokenizers import Encoding

_KEPT_WORDS = 100_000
"""All are forgotten when there are more: with their tokens, some 25 MB."""
_LONGEST_WORD = 48
"""Characters. What is longer is seldom met again: addresses, code, writing without spaces."""
_CHUNKS = re.compile(r" ?\S+(?:(?! \S)\s+(?:\S+|$))*|\s+\S*")
"""A word and the space before it; with what follows it, where that is other white space."""


class Marked(Struct, frozen=True):
    """A text, encoded."""

    ids: list[int]
    cuts: list[tuple[int, bool]]
    """For each place that was asked for: see ``token_at``."""


def token_at(encoding: Encoding, character: int) -> tuple[int, bool]:
    """The first token that begins at ``character`` or later, and whether the one before reaches across."""
    token = encoding.char_to_token(character)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > character), len(offsets))
    if token < len(encoding.ids) and encoding.token_to_chars(token)[0] < character:  # type: ignore[index]
        return token + 1, True
    return token, False


class WordMemo:
    """Words and their tokens."""

    def __init__(self, encode_batch: Callable[[list[str]], list[Encoding]]):
        self._encode_batch = encode_batch
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Marked]:
        """The tokens of each text, and which of them begin at its ``places``: characters, ascending, none of
        them at either end."""
        if len(self._words) > _KEPT_WORDS:
            self._words.clear()
        cut = [_Cut(text, at) for text, at in zip(texts, places, strict=True)]
        words = {word for one in cut for run in one.runs for word in run}
        new = list(words.difference(self._words))
        encodings = iter(self._encode_batch([*new, *(joint for one in cut for joint in one.joints)]))
        self._words.update((word, tuple(next(encodings).ids)) for word in new)
        found = [one.marked(self._words, encodings) for one in cut]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del self._words[word]
        return found


class _Cut:
    """A text as runs of words, and joints between them: the words that a place falls into, or between."""

    def __init__(self, text: str, places: Sequence[int]):
        self.runs: list[list[str]] = []
        self.joints: list[str] = []
        self._at: list[list[int]] = []
        """Places in each joint."""
        run: list[str] = []
        for start, end in zip((0, *places), (*places, len(text)), strict=True):
            words = _CHUNKS.findall(text, start, end)
            if start:
                self._join(run, words.pop(0))
            run = words
        self.runs.append(run)

    def marked(self, words: Mapping[str, tuple[int, ...]], joints: Iterator[Encoding]) -> Marked:
        """With the tokens of every word, and the encodings of its joints."""
        ids: list[int] = []
        cuts: list[tuple[int, bool]] = []
        for run, at in zip(self.runs, self._at, strict=False):
            ids.extend(chain.from_iterable(map(words.__getitem__, run)))
            joint = next(joints)
            for character in at:
                token, straddles = token_at(joint, character)
                cuts.append((len(ids) + token, straddles))
            ids.extend(joint.ids)
        ids.extend(chain.from_iterable(map(words.__getitem__, self.runs[-1])))
        return Marked(ids, cuts)

    def _join(self, before: list[str], word: str) -> None:
        """The last word before a place and the first after it; without one, the last joint goes on."""
        if before:
            self.joints.append(before.pop())
            self._at.append([])
            self.runs.append(before)
        self._at[-1].append(len(self.joints[-1]))
        self.joints[-1] += word


_CLASS = r"(?:\\p\{[LMN]\w?\}|\[(?:\\p\{[LMN]\w?\})+\]|\[\^\\s(?:\\p\{[LMN]\w?\})+\]|\[\\r\\n/?\])"
_SHORT_FORMS = r"\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"
_LEAD = r"(?: \?|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?)?"
_BLANKS = r"\\s\*\[\\r\\n\]\+|\\s\+\(\?!\\S\)|\\s\+"
_WORD = rf"(?:{_LEAD}(?:(?:{_CLASS}|{_SHORT_FORMS})(?:[+*?]|\{{\d(?:,\d)?\}})?)+|{_BLANKS})"
_PATTERN = re.compile(rf"(?:{_WORD}\|)+\\s\+")
"""Patterns whose words are white space alone, or have a space at most in the first place, and that take any
space for the beginning of a word: those of Llama 3, Qwen, gpt-oss, Mistral's Tekken and their kin."""


def cuts_at_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the words of a tokenizer (its ``tokenizer.json``) can be encoded one by one.

    For that its pattern must end a word at every single space between two characters that are no white
    space, and nothing else may look across it.
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


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    return [pre_tokenizer]


def _cuts(step: Mapping[str, Any]) -> bool:
    """Whether it ends a word at every such space. ByteLevel's own pattern is that of GPT-2."""
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
    """Whether an added token has such a space in it, or takes white space after it."""
    return bool(token.get("rstrip")) or re.search(r"\S \S", token["content"]) is not None
