"""The tokenizer inside a GGUF file as a ``tokenizer.json``: a GPT-2 vocabulary with digits split.

Used by :mod:`.llama_gguf`. What the keys mean: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

KIND = ("gpt2", "smollm")
"""``tokenizer.ggml.model`` and ``.pre`` of the one kind of vocabulary that is read here."""
CONTROL = 3
"""``token_type`` of a token that stands for no text: a turn's begin, its end."""


def tokenizer_from(header: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file's metadata, of the kind ``KIND``."""
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
