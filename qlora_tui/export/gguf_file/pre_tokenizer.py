"""Which of llama.cpp's pre-tokenizers splits text as a ``tokenizer.json`` does (``tokenizer.ggml.pre``).

llama.cpp's converter recognizes a published tokenizer by a hash of what it makes of one text, so that a
tokenizer with added tokens is unknown to it. Here the rule is read instead: the regular expression that
splits text before the merges. The rules of each name: llama.cpp, src/llama-vocab.cpp, ``llm_tokenizer_bpe``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_tui.errors import UserError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)

_GPT4 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDING}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDING}"
_TEKKEN_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_TEKKEN_ENDING}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TEKKEN_ENDING}"

_GPT2 = "gpt-2"
"""The regular expression of GPT-2, which ``ByteLevel`` has built in."""
_DIGITS = "digits"
"""The rule that splits digits one by one."""

_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT4,), True): "llama-bpe",
    ((_GPT4,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
}
"""By the rules that split text, and whether a word in the vocabulary is taken whole (``ignore_merges``)."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return the name for a byte-level BPE tokenizer, the content of ``tokenizer.json``.

    Raises UserError where llama.cpp has no such pre-tokenizer.
    """
    rules = tuple(_rules(tokenizer.get("pre_tokenizer") or {}))
    takes_words = bool(tokenizer["model"].get("ignore_merges"))
    # Where llama.cpp knows a rule only with words taken whole, or only without, merges give the same tokens
    # for nearly all words. The check of the written file compares the tokens.
    name = _NAMES.get((rules, takes_words)) or _NAMES.get((rules, not takes_words))
    if name is None:
        raise UserError(
            "This tokenizer cannot be exported as GGUF",
            what=f"llama.cpp has no pre-tokenizer with its rules: {' then '.join(rules) or 'none'}.",
            fix="Export it with `qlora-tui export merge`; transformers and vLLM load that folder.",
        )
    return name


def is_split_otherwise(text: str) -> bool:
    """Return whether llama.cpp's ``tekken`` and ``gpt-4o`` may split a text unlike the tokenizer's rule.

    They take every letter beyond ASCII as both upper and lower case, and no combining mark as a letter:
    ``aÉ`` stays one word, and ``ÉA`` becomes two.
    """
    following = text[1:] + " "
    return not text.isascii() and any(
        (kind := unicodedata.category(character)) in ("Lu", "Lt", "Mn", "Mc", "Me")
        or (kind == "Ll" and "A" <= after <= "Z")
        for character, after in zip(text, following, strict=True)
        if not character.isascii()
    )


def _rules(node: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rules that split text, in order."""
    kind = node.get("type")
    if kind == "Sequence":
        for part in node["pretokenizers"]:
            yield from _rules(part)
    elif kind == "Digits" and node.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split":
        pattern = node.get("pattern") or {}
        yield pattern.get("Regex") or f"the text {pattern.get('String')!r}"
    elif kind == "ByteLevel":
        if node.get("use_regex", True):
            yield _GPT2
    elif kind:
        yield str(kind)
