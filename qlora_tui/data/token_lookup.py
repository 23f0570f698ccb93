"""Lookup of tokens in a model's vocabulary, from ``tokenizer.json`` without the tokenizers library.

The app checks ``lora.trainable_tokens`` with it: building a tokenizer of 262k entries would take its memory
and one second. The trainer resolves the ids with the library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.errors import EXIT_USAGE, UserError


class _AddedToken(Struct, frozen=True):
    content: str


class _Model(Struct, frozen=True):
    vocab: msgspec.Raw = msgspec.Raw(b"{}")
    """A table of tokens and ids, or a list of [token, score] for Unigram; searched, not decoded."""


class _Tokenizer(Struct, frozen=True):
    added_tokens: list[_AddedToken] = []
    model: _Model = _Model()


_DECODER = msgspec.json.Decoder(_Tokenizer)


def check_tokens(tokens: Iterable[str], folder: Path) -> None:
    """Raise UserError, exit code 2, for a token that is not in the vocabulary of the model in ``folder``.

    A tokenizer that cannot be read raises nothing here: loading it raises the error.
    """
    tokens = list(dict.fromkeys(tokens))
    if not tokens:
        return
    try:
        tokenizer = _DECODER.decode((folder / "tokenizer.json").read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError):
        return
    added = {token.content for token in tokenizer.added_tokens}
    vocab = bytes(tokenizer.model.vocab)
    for token in tokens:
        if token not in added and not _is_in(token, vocab):
            raise unknown_token(token)


def unknown_token(token: str) -> UserError:
    """Build the error for a trainable token that the tokenizer does not have."""
    return UserError(
        "Unknown token",
        what=f"lora.trainable_tokens contains {token!r}, which is not a token of this model.",
        fix="`qlora-tui data inspect FILE --model MODEL` lists the tokens that the model never learned.",
        exit_code=EXIT_USAGE,
    )


def _is_in(token: str, vocab: bytes) -> bool:
    """Return whether a JSON table or a list of pairs has the token, with or without ASCII escapes."""
    written = {json.dumps(token).encode(), json.dumps(token, ensure_ascii=False).encode()}
    table = vocab.lstrip()[:1] == b"{"
    return any(_occurs(text, vocab, is_key=table) for text in written)


def _occurs(text: bytes, vocab: bytes, *, is_key: bool) -> bool:
    at = vocab.find(text)
    while at >= 0:
        after = vocab[at + len(text) : at + len(text) + 8].lstrip()[:1]
        before = vocab[max(0, at - 8) : at].rstrip()[-1:]
        if (is_key and after == b":" and before in (b"{", b",")) or (not is_key and before == b"["):
            return True
        at = vocab.find(text, at + 1)
    return False
