"""Builds a ``tokenizer.json`` from a GGUF file with a GPT-2 vocabulary that splits digits.

Used by :mod:`.gguf_llama`. What the keys mean: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

KIND = ("gpt2", "smollm")
"""``tokenizer.ggml.model`` and ``.pre`` of the supported kind of vocabulary."""
CONTROL = 3
"""``token_type`` of a control token, such as the begin or end of a turn."""


def tokenizer_from(header: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer from a file's metadata, which must be of the kind ``KIND``."""
    tokens = header["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = header["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == CONTROL
        ]
    )
    return tokenizer
