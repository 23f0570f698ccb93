"""A model's tokenizer as GGUF keys: tokens, their types, merges or scores, special tokens, chat template.

For the supported families, llama.cpp has two kinds of tokenizer. ``gpt2`` is byte-level BPE with merges.
``llama`` is SentencePiece's BPE, which merges the pair with the best score first. transformers stores the
latter as BPE with ``byte_fallback``; the order of its merges gives the scores.

The key ``tokenizer.ggml.pre`` selects the pre-tokenizer of llama.cpp that splits text like
``tokenizer.json``. It is found by the regular expression that splits text before the merges. If no
pre-tokenizer has this expression, it is found by the words into which the expression splits difficult texts.
llama.cpp's own converter recognizes published tokenizers by a hash of their output for one text, so it does
not recognize a tokenizer with added tokens. The rules of each pre-tokenizer are in
:mod:`qlora_tui.catalog.gguf_tokenizers`.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models

from qlora_tui.catalog.gguf_tokenizers import (
    DIGITS,
    GPT2,
    GPT4O_PUBLISHED,
    PRE_TOKENIZERS,
    TEKKEN_PUBLISHED,
)
from qlora_tui.data.chat_template import PINNED_DATE
from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.training.gguf_tokenizer import splits

_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((TEKKEN_PUBLISHED,), True): "tekken",
    ((GPT4O_PUBLISHED,), False): "gpt-4o",
}
"""Pre-tokenizers by their splitting rules, and by whether known words skip merges (``ignore_merges``)."""
for _name, _splitter in PRE_TOKENIZERS.items():
    _NAMES.setdefault((_splitter.rules, _splitter.takes_words), _name)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return the pre-tokenizer for a byte-level BPE tokenizer, given the content of ``tokenizer.json``.

    Raises UserError if llama.cpp has no such pre-tokenizer.
    """
    rules = tuple(_rules(tokenizer.get("pre_tokenizer") or {}))
    takes_words = bool(tokenizer["model"].get("ignore_merges"))
    # llama.cpp may have a rule only with or only without ``ignore_merges``. Merges give the same tokens for
    # nearly all words, and the check of the written file compares the tokens.
    name = (
        _NAMES.get((rules, takes_words))
        or _NAMES.get((rules, not takes_words))
        or _name_by_words(tokenizer.get("pre_tokenizer"), takes_words)
    )
    if name is None:
        raise UserError(
            "This tokenizer cannot be exported as GGUF",
            what=f"llama.cpp has no pre-tokenizer with this tokenizer's rules: "
            f"{' then '.join(rules) or 'none'}.",
            fix="Export the model with `qlora-tui export merge`; transformers and vLLM load the exported "
            "folder.",
        )
    return name


_PROBES = (
    "I'm sure they'LL say 'twas don'T, HE'S, we'Ve; '' ' ''s o'clock 'D",
    "0 12 123 1234 12345678 3.14 1,000,000 ½ ² Ⅻ ٣٤٥٦ １２３４ x²y³ v1.2.3-rc4 1st",
    "fooBar FooBARBaz HTTPServer_name __init__ ÉCOLE école aÉ ÉA Élève ßẞ Ĳ ǅ ﬁ ℌ",
    "cafe\u0301 e\u0301\u0302x \u0301 नमस्ते हिन्दी ไทยกำลัง بِسْمِ العربيّة שָׁלוֹם 한국어 각",
    "我想在apple工作1314天。こんにちは、カタカナ 世界！𠀀〜 Привет МОСКВА ΑΒΓ αβγ",
    "  two   three\t\ttabs \t mixed\n\n\nlines\r\n\r\nend  \n \n  x \u00a0\u3000\u2003\u200b\x0b\x0c y   ",
    'a/b //c/ \\\\d ...!!!??? ,;: #@&*%$ +=<>^~|` "q" (x)[y]{z} —–… €£¥ «»',
    'print("x"); // c\n#!/bin/sh\n    def f(a, b):\n\t\treturn a**b-1\n<div class="k">1</div>\n',
    "🚀 😶\u200d🌫️ 👩\u200d👩\u200d👧 ✅🦙🦙 →∑√ \u2028\u2029\x85 \ufeff ''' ``` ---===",
)
"""Texts that the rules of published tokenizers split differently."""


def _name_by_words(node: Any, takes_words: bool) -> str | None:
    """Return the pre-tokenizer of llama.cpp that splits the texts in ``_PROBES`` like ``node``, even by other
    rules; None if there is none.
    """
    own = _words(node)
    names = (name for name, each in PRE_TOKENIZERS.items() if own == _words(splits(each.rules)))
    alike = sorted(names, key=lambda name: PRE_TOKENIZERS[name].takes_words != takes_words)
    return alike[0] if alike else None


def _words(node: Any) -> list[Any]:
    """Return where a pre-tokenizer from ``tokenizer.json`` splits each of the probes."""
    content = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": node}
    split = Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    return [] if split is None else [[place for _, place in split.pre_tokenize_str(text)] for text in _PROBES]


def is_split_otherwise(text: str) -> bool:
    """Return whether llama.cpp's ``tekken`` and ``gpt-4o`` may split a text differently than the tokenizer's
    rule.

    They treat every letter outside ASCII as both uppercase and lowercase, and no combining mark as a letter:
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
        yield DIGITS
    elif kind == "Split":
        pattern = node.get("pattern") or {}
        yield pattern.get("Regex") or f"the text {pattern.get('String')!r}"
    elif kind == "ByteLevel":
        if node.get("use_regex", True):
            yield GPT2
    elif kind:
        yield str(kind)


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types in GGUF files."""
_SPACE = "▁"
_UNMERGED_SCORE = -1e6
"""Score of tokens that no merge produces, lower than the score of every merge."""
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
"""Tokens that llama.cpp requires in a model that it recognizes as Phi-3."""


@dataclass(frozen=True)
class KnownDifference:
    """Texts that llama.cpp tokenizes differently because it lacks a rule of the tokenizer."""

    note: str
    applies_to: Callable[[str], bool]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a GGUF file."""

    model: str
    """Kind of tokenizer: ``gpt2`` or ``llama``."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    """Token ids by name: ``bos``, ``eos``, ``eot``, ``padding``, ``unknown``."""
    adds_bos: bool
    adds_space: bool
    strips_after_special: bool
    """Whether white space after a special token is dropped, as for Phi-3."""
    template: str
    tool_template: str = ""
    """Chat template for conversations with tools, if it differs."""
    differences: tuple[KnownDifference, ...] = ()
    prompt_notes: tuple[str, ...] = ()
    """Sentences that say how llama.cpp's prompts differ from those of training although the template is the
    same.
    """


def read_vocabulary(tokenizer: ChatTokenizer, rows: int) -> Vocabulary:
    """Convert a tokenizer for a model whose embedding has ``rows`` rows.

    Raises UserError if llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unsupported(f"it is {model.get('type')}, not BPE")
    is_byte_level = _has(content.get("decoder") or {}, "ByteLevel")
    if not is_byte_level and not model.get("byte_fallback"):
        raise _unsupported("it is not byte-level, and has no tokens for single bytes")
    if others := _kinds(content.get("normalizer") or {}) - _NORMALIZERS:
        raise _unsupported(f"it changes texts by {' and '.join(sorted(others))}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ranks = _ranks(merges)
    tokens, types = _tokens(tokenizer, model["vocab"], rows, is_byte_level, ranks)
    pre = pre_tokenizer_name(content) if is_byte_level else "default"
    ends = tokenizer.turn_end_ids
    unknown = tokenizer.special_tokens.get("unk_token") or model.get("unk_token")
    ids = {
        "bos": tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id,
        "eos": tokenizer.eos_id,
        "eot": ends[-1] if ends else None,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.backend.token_to_id(unknown) if unknown else None,
    }
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=None if is_byte_level else [-float(ranks.get(t, -_UNMERGED_SCORE)) for t in tokens],
        merges=merges if is_byte_level else None,
        special_ids={name: id_ for name, id_ in ids.items() if id_ is not None},
        adds_bos=adds_bos(tokenizer),
        adds_space=not is_byte_level and _adds_space(tokenizer),
        strips_after_special=_strips_after_special(tokenizer, tokens),
        template=tokenizer.template.text,
        tool_template="" if tokenizer.tool_template is tokenizer.template else tokenizer.tool_template.text,
        differences=tuple(_differences(content)),
        prompt_notes=tuple(_prompt_notes(tokenizer)),
    )


def _tokens(
    tokenizer: ChatTokenizer,
    vocab: Mapping[str, int],
    rows: int,
    is_byte_level: bool,
    ranks: Mapping[str, int],
) -> tuple[list[str], list[int]]:
    """Return text and type for each row of the embedding. Rows without a token are marked unused."""
    added = tokenizer.backend.get_added_tokens_decoder()
    last = max([*vocab.values(), *added])
    if last >= rows:
        raise _unsupported(f"it has tokens up to id {last:,}, but the model has {rows:,} embeddings")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for text, number in vocab.items():
        tokens[number] = text
        is_byte = not is_byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = BYTE if is_byte else NORMAL
    for number, token in added.items():
        tokens[number] = token.content
        types[number] = CONTROL if token.special else USER_DEFINED
        if is_byte_level or token.special:
            continue
        if set(token.content) == {_SPACE} and token.content in ranks:
            # transformers looks for it before spaces become ▁, so merges produce it. This is the case for
            # Gemma.
            types[number] = NORMAL
        else:
            # llama.cpp looks for these tokens in the text before it replaces spaces by ▁.
            tokens[number] = token.content.replace(_SPACE, " ")
    if (unknown := vocab.get(tokenizer.special_tokens.get("unk_token", ""))) is not None:
        types[unknown] = CONTROL if is_byte_level else UNKNOWN
    if len(set(tokens)) < rows:
        repeated, _ = Counter(tokens).most_common(1)[0]
        raise _unsupported(f"two of its tokens have the same text, {repeated!r}")
    return tokens, types


def _ranks(merges: list[str]) -> dict[str, int]:
    """Return the index of the first merge that produces each token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return ranks


def adds_bos(tokenizer: ChatTokenizer) -> bool:
    """Return whether llama.cpp must begin every text with the BOS token.

    This is the case if the tokenizer does so, and the training conversations began with this token.
    llama-server then removes the BOS token that the template writes, and Ollama's templates write none.
    """
    return tokenizer.begins_with_bos and prompt_ids([Message("user", "a")], tokenizer)[0] == tokenizer.bos_id


def _adds_space(tokenizer: ChatTokenizer) -> bool:
    """Return whether the tokenizer adds a space before text that follows a special token."""
    begin = next((t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special), "")
    first = tokenizer.encode(f"{begin}a")[1 if begin else 0]
    return (tokenizer.backend.id_to_token(first) or "").startswith(_SPACE)


def _strips_after_special(tokenizer: ChatTokenizer, tokens: list[str]) -> bool:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return any(token.rstrip for token in added) and set(tokens) >= _PHI3_TOKENS


def _prompt_notes(tokenizer: ChatTokenizer) -> Iterator[str]:
    names = tokenizer.template.names
    if "strftime_now" in names:
        yield (
            f"The chat template prints the date: llama.cpp prints today's, training used "
            f"{PINNED_DATE:%d %B %Y}."
        )
    if "bos_token" in names and tokenizer.bos_id is None:
        yield (
            "The chat template writes the BOS token, but the tokenizer has none. llama.cpp writes the EOS "
            "token in its place; training wrote nothing."
        )


def _differences(tokenizer: Mapping[str, Any]) -> Iterator[KnownDifference]:
    if _has(tokenizer.get("normalizer") or {}, "NFC"):
        yield KnownDifference(
            "llama.cpp does not compose characters that are stored as a letter and an accent (Unicode NFC), "
            "so it splits text with them into different tokens.",
            lambda text: not unicodedata.is_normalized("NFC", text),
        )
    if {TEKKEN_PUBLISHED, GPT4O_PUBLISHED} & set(_rules(tokenizer.get("pre_tokenizer") or {})):
        yield KnownDifference(
            "llama.cpp splits words with accented capitals or combining marks into different tokens.",
            is_split_otherwise,
        )


_NORMALIZERS = {"Sequence", "NFC", "Prepend", "Replace"}
"""Normalizers that may precede the rules: they compose characters, or write ▁ for spaces."""


def _kinds(node: Mapping[str, Any]) -> set[str]:
    return {str(node["type"])}.union(*map(_kinds, node.get("normalizers", ()))) if node else set()


def _has(node: Mapping[str, Any], kind: str) -> bool:
    parts = (*node.get("decoders", ()), *node.get("normalizers", ()))
    return node.get("type") == kind or any(_has(part, kind) for part in parts)


def _unsupported(why: str) -> UserError:
    return UserError(
        "This tokenizer cannot be exported as GGUF",
        what=f"llama.cpp has no such tokenizer: {why}.",
        fix="Export the model with `qlora-tui export merge`; transformers and vLLM load the exported folder.",
    )
