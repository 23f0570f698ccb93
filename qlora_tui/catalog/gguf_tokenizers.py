r"""The rules by which llama.cpp splits text before merging, keyed by ``tokenizer.ggml.pre`` of GGUF files.

Each name stands for regular expressions that are applied one after the other; every match, and every text
between two matches, becomes a word. The expressions are those of llama.cpp (src/llama-vocab.cpp,
``llm_tokenizer_bpe``), written for the ``tokenizers`` library. llama.cpp's engine does not know ``\p{Lu}``,
so for ``tekken`` and ``gpt-4o`` it treats every letter beyond ASCII as both upper and lower case. A tokenizer
read from a file does the same, so that its tokens equal llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GPT2 = "gpt-2"
"""The regular expression of GPT-2, which ``ByteLevel`` has built in."""
DIGITS = "digits"
"""The rule that splits digits one by one."""

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
GPT4 = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_ENDING}"
QWEN2 = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}|{_ENDING}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_TEKKEN_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(upper: str, lower: str, ending: str = "") -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}"


_PUBLISHED_CASES = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
_LLAMA_CASES = (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])")
TEKKEN_PUBLISHED = rf"{_cased(*_PUBLISHED_CASES)}|\p{{N}}|{_TEKKEN_ENDING}"
GPT4O_PUBLISHED = rf"{_cased(*_PUBLISHED_CASES, CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_TEKKEN_ENDING}"
TEKKEN = rf"{_cased(*_LLAMA_CASES)}|\p{{N}}|{_TEKKEN_ENDING}"
GPT4O = rf"{_cased(*_LLAMA_CASES, CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_TEKKEN_ENDING}"

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2_SPLIT, "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split into words, and other consequences of the name."""

    rules: tuple[str, ...]
    """Regular expressions, ``GPT2`` or ``DIGITS``, in order."""
    takes_words: bool = False
    """Whether a word that is in the vocabulary becomes a single token (``ignore_merges``)."""
    adds_begin: bool = False
    """Whether a text begins with the BOS token if the file does not specify this."""


_LLAMA3 = PreTokenizer((GPT4,), takes_words=True, adds_begin=True)
_GPT2 = PreTokenizer((GPT2,))
_ONE_DIGIT = PreTokenizer((DIGITS, GPT2))
_QWEN2 = PreTokenizer((QWEN2,))
_DBRX = PreTokenizer((GPT4,))
_GPT4O = PreTokenizer((GPT4O,))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "dbrx": _DBRX,
    "qwen2": _QWEN2,
    "qwen35": PreTokenizer((QWEN35,)),
    "tekken": PreTokenizer((TEKKEN,), takes_words=True, adds_begin=True),
    "gpt-4o": _GPT4O,
    "smollm": _ONE_DIGIT,
    "gpt-2": _GPT2,
    "default": PreTokenizer(_DEFAULT),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "glm4", "chatglm-bpe"), _DBRX),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2", "solar-open"), _QWEN2),
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _ONE_DIGIT),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "exaone4", "a.x-4.0"), _GPT2),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
    "falcon": PreTokenizer(_FALCON),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), PreTokenizer((_BAILING,))),
}
"""Pre-tokenizers keyed by ``tokenizer.ggml.pre``. If several names have equal rules, exports write the first.

A file without a name is refused, because llama.cpp itself warns that it guesses.
"""
