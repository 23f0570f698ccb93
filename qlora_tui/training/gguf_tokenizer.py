"""Writes the tokenizer of a GGUF file as ``tokenizer.json``, with its special tokens and chat template.

The written tokenizer gives the same tokens as llama.cpp (src/llama-vocab.cpp). It supports these kinds of
vocabulary. ``gpt2`` is byte-level BPE with merges; text is first split by the rules that
``tokenizer.ggml.pre`` names. ``llama`` is SentencePiece's BPE: of all adjacent pairs that form a token, the
pair with the best score is merged first. The same result comes from BPE with one merge for each split of a
token into two other tokens, with the merges in the order of the tokens' scores. ``gemma4`` is like ``llama``,
but with merges in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import GgufHeader
from qlora_tui.catalog.gguf_tokenizers import DIGITS, GPT2, PRE_TOKENIZERS
from qlora_tui.catalog.model_validation import TOOL_TEMPLATE

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Types of tokens whose text llama.cpp looks for before it splits the rest."""
NORMAL = 1
BYTE = 6
_SPACE = "▁"
_USUAL_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids that special tokens have in a ``llama`` vocabulary if the file does not give their ids.

From ``llama_vocab::impl::load``.
"""
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
"""Tokens that identify the vocabulary in which llama.cpp drops white space after special tokens.

The model's name must also contain ``phi-3`` or ``phi3``. After three of these tokens white space is kept: it
is dropped after ``</s>`` and after all other special tokens.
"""


class GgufTokenizer:
    """The tokenizer that a file describes. Raises ValueError if the description is damaged or incomplete."""

    def __init__(self, header: GgufHeader):
        """Read the tokenizer from ``header``, which was read with its vocabulary."""
        self._header = header
        self._kind = self._get("model")
        self.tokens = self._texts("tokens")
        self._types: Sequence[int] = self._get("token_type") or (NORMAL,) * len(self.tokens)
        if not self.tokens or len(self._types) != len(self.tokens):
            raise ValueError(f"it has {len(self.tokens):,} tokens and {len(self._types):,} types of tokens")
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        self._pre = PRE_TOKENIZERS[self._get("pre")] if self._kind == "gpt2" else None

    def _get(self, key: str) -> Any:
        return self._header.values.get(f"tokenizer.ggml.{key}")

    def _texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key)
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"its tokenizer.ggml.{key} is not a list of strings")
        return value

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token; None if the vocabulary has no such token.

        ``name`` is ``bos``, ``eos``, ``eot``, ``eom``, ``padding`` or ``unknown``.
        """
        number = self._get(f"{name}_token_id")
        if number is None and self._kind == "llama":
            number = _USUAL_IDS.get(name)
        is_id = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.tokens)
        return number if is_id else None

    @property
    def ends(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        ids = (self.special_id(name) for name in ("eos", "eot", "eom"))
        return list(dict.fromkeys(number for number in ids if number is not None))

    def content(self) -> dict[str, Any]:
        """Return the content of ``tokenizer.json``."""
        if self._pre is not None:
            model = {"vocab": self._ids, "merges": self._merges(), "ignore_merges": self._pre.takes_words}
            rules = {"normalizer": None, "pre_tokenizer": splits(self._pre.rules), "decoder": _BYTES}
        else:
            unknown = self.special_id("unknown")
            has_merges = self._kind == "gemma4"
            model = {
                "vocab": self._ids,
                "merges": self._merges() if has_merges else self._merges_by_score(),
                "byte_fallback": True,
                "fuse_unk": True,
                "unk_token": None if unknown is None else self.tokens[unknown],
            }
            adds_space = self._get("add_space_prefix")
            rules = _sentencepiece(adds_space if isinstance(adds_space, bool) else not has_merges)
            if has_merges:
                rules["pre_tokenizer"] = splits((_LINES,))["pretokenizers"][0]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            "post_processor": self._post_processor(),
            "model": {"type": "BPE", **model},
            **rules,
        }

    def _merges(self) -> list[list[str]]:
        merges = []
        for text in self._texts("merges"):
            cut = text.find(" ", 1)
            left, right = text[:cut], text[cut + 1 :]
            if left in self._ids and right in self._ids and left + right in self._ids:
                merges.append([left, right])
        return merges

    def _merges_by_score(self) -> list[list[str]]:
        scores = self._get("scores")
        if not isinstance(scores, tuple) or len(scores) != len(self.tokens):
            raise ValueError("it has no score for each token")
        ranked = []
        for number, token in enumerate(self.tokens):
            if self._types[number] in (UNKNOWN, CONTROL, BYTE) or self._ids[token] != number:
                continue
            for cut in range(1, len(token)):
                left, right = self._ids.get(token[:cut]), self._ids.get(token[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[number], number, left, right))
        ranked.sort()
        return [[self.tokens[left], self.tokens[right]] for _, _, left, right in ranked]

    def _added(self) -> list[dict[str, Any]]:
        strips = self._strips_after_special()
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and (token == "</s>" or token not in _PHI3_TOKENS),
                "normalized": False,
                "special": self._types[number] != USER_DEFINED,
            }
            for number, token in enumerate(self.tokens)
            if self._types[number] in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]

    def _strips_after_special(self) -> bool:
        name = str(self._header.values.get("general.name", "")).lower()
        return ("phi-3" in name or "phi3" in name) and self._ids.keys() >= _PHI3_TOKENS

    def _post_processor(self) -> dict[str, Any] | None:
        begins = self._pre.adds_begin if self._pre else self._kind == "llama"
        flags = {"bos": self._get("add_bos_token"), "eos": self._get("add_eos_token")}
        wanted = {"bos": begins if flags["bos"] is None else flags["bos"], "eos": bool(flags["eos"])}
        ids = {name: self.special_id(name) for name, is_wanted in wanted.items() if is_wanted}
        first, last = ([] if (number := ids.get(name)) is None else [number] for name in ("bos", "eos"))
        if not first and not last:
            return None
        special = [{"SpecialToken": {"id": self.tokens[number], "type_id": 0}} for number in (*first, *last)]
        begin, end = special[: len(first)], special[len(first) :]
        sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        return {
            "type": "TemplateProcessing",
            "single": [*begin, sequences[0], *end],
            "pair": [*begin, *sequences, *end],
            "special_tokens": {
                self.tokens[number]: {
                    "id": self.tokens[number],
                    "ids": [number],
                    "tokens": [self.tokens[number]],
                }
                for number in (*first, *last)
            },
        }

    def write(self, folder: Path, context: int | None) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat templates of the file."""
        from tokenizers import Tokenizer

        Tokenizer.from_str(json.dumps(self.content())).save(str(folder / "tokenizer.json"))
        names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        ids = {name: self.special_id(key) for name, key in names.items()}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: self.tokens[number] for name, number in ids.items() if number is not None},
        }
        if context:
            config["model_max_length"] = context
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for key, path in (("chat_template", "chat_template.jinja"), (_TOOL_KEY, TOOL_TEMPLATE)):
            if isinstance(template := self._header.values.get(f"tokenizer.{key}"), str) and template:
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_text(template, encoding="utf-8")


_LINES = r"[^\n]+|[\n]+"
"""Pattern that splits text into lines and runs of line breaks, for a ``gemma4`` vocabulary."""
_TOOL_KEY = "chat_template.tool_use"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

_BYTES = _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}
"""The decoder of byte-level BPE, as the tokenizers library writes it. The decoder ignores both settings."""


def splits(rules: Sequence[str]) -> dict[str, Any]:
    """Return the pre-tokenizer of byte-level BPE that splits text by ``rules``.

    Each rule is a regular expression, ``DIGITS`` or ``GPT2``.
    """
    steps: list[Mapping[str, Any]] = []
    for rule in rules:
        if rule == DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif rule != GPT2:
            pattern = {"Regex": rule}
            steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": [*steps, _BYTE_LEVEL | {"use_regex": rules[-1] == GPT2}]}


def _sentencepiece(adds_space: bool) -> dict[str, Any]:
    """Return the rules of a vocabulary that writes spaces as ▁.

    With ``adds_space`` a space is added before each text.
    """
    written = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    read = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders: list[Mapping[str, Any]] = [read, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers: list[Mapping[str, Any]] = [written]
    if adds_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
