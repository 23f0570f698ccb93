"""Checks that the tokens to train are in the vocabulary, and finds tokens that a model has never learned.

A base model's vocabulary often holds tokens reserved for later (Llama 3's ``<|eot_id|>``) whose embedding
rows are still near zero, or all equal. LoRA does not train the embedding, so a template that uses such tokens
cannot be learned, unless ``lora.trainable_tokens`` trains their rows. Such tokens are found by reading a few
rows of the safetensors files, without torch. ``check_tokens`` reads ``tokenizer.json`` without the tokenizers
library, because the library takes a second for 262k entries.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable
from math import sqrt
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import INDEX, MAX_INDEX_BYTES, indexed_files, read_header
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.problems import CHECKS, DataProblem, problem_of
from qlora_tui.errors import UsageError, UserError

if TYPE_CHECKING:
    from qlora_tui.data.tokenizer import ChatTokenizer


class _AddedToken(Struct, frozen=True):
    content: str


class _Model(Struct, frozen=True):
    vocab: dict[str, int] | list[tuple[str, float]] = {}
    """Tokens with their ids or, for Unigram, with their scores."""


class _Tokenizer(Struct, frozen=True):
    added_tokens: list[_AddedToken] = []
    model: _Model = _Model()


_DECODER = msgspec.json.Decoder(_Tokenizer)


def check_tokens(tokens: Iterable[str], folder: Path) -> None:
    """Raise UserError, exit code 2, for a token that is not in the vocabulary of the model in ``folder``.

    If the tokenizer cannot be read, nothing is raised here, because loading the tokenizer raises the error.
    """
    tokens = list(dict.fromkeys(tokens))
    if not tokens:
        return
    try:
        tokenizer = _DECODER.decode((folder / "tokenizer.json").read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError):
        return
    vocabulary = tokenizer.model.vocab
    known = vocabulary.keys() if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    for token in tokens:
        if token not in known and not any(token == added.content for added in tokenizer.added_tokens):
            raise unknown_token(token)


def unknown_token(token: str) -> UserError:
    """Build the error for a trainable token that the tokenizer does not have."""
    return UsageError(
        "Unknown token",
        what=f"lora.trainable_tokens contains {token!r}, which is not a token of this model.",
        fix="`qlora-tui data inspect FILE --model MODEL` lists the tokens that the model never learned.",
    )


_EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight"),
    *("embed_in.weight", "tok_embeddings.weight"),
)
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TYPICAL_ROWS = 64
UNTRAINED_NORM_RATIO = 0.1
"""A row counts as untrained if its norm is below this share of the norm of a typical row."""
_MAX_SPECIAL_ROWS = 64
_MAX_IDENTICAL_ROWS = 2
"""Maximum number of special tokens with identical rows. If more rows are identical, they were initialized but
never trained.
"""
_MAX_ROW_BYTES = 1 << 20


def untrained_tokens(folder: Path, tokenizer: ChatTokenizer) -> list[str]:
    """Return the special tokens of the template that look untrained in the model in ``folder``.

    Empty if the embedding cannot be found or read.
    """
    wanted = _template_tokens(tokenizer)
    if not wanted:
        return []
    try:
        embedding = _Embedding.of(folder)
        if embedding is None:
            return []
        step = max(1, tokenizer.backend.get_vocab_size(with_added_tokens=False) // _TYPICAL_ROWS)
        typical_norm = median(_size(embedding.row(n * step)) for n in range(_TYPICAL_ROWS))
        rows = {token: embedding.row(tokenizer.added_tokens[token]) for token in wanted}
        special_rows = [embedding.row(i) for i in sorted(tokenizer.special_ids)[:_MAX_SPECIAL_ROWS]]
    except (UserError, OSError, ValueError, KeyError, IndexError, TypeError, struct.error):
        return []
    return [
        token
        for token, row in rows.items()
        if _size(row) < UNTRAINED_NORM_RATIO * typical_norm or special_rows.count(row) > _MAX_IDENTICAL_ROWS
    ]


def untrained_problem(folder: Path, tokenizer: ChatTokenizer) -> DataProblem | None:
    """Return the untrained tokens as a problem for the report; None if there are none."""
    tokens = untrained_tokens(folder, tokenizer)
    if not tokens:
        return None
    listed = json.dumps(tokens, ensure_ascii=False)
    fix = f"Train the embeddings of these tokens: lora.trainable_tokens = {listed}."
    fix = f"{fix} {CHECKS['untrained-tokens'].fix}"
    return problem_of("untrained-tokens", len(tokens), (), ", ".join(tokens), fix=fix, tokens=tuple(tokens))


def token_ids(tokens: Iterable[str], tokenizer: ChatTokenizer) -> list[int]:
    """Return the distinct ids of ``lora.trainable_tokens``. Raises UserError for an unknown token."""
    ids = []
    for token in dict.fromkeys(tokens):
        token_id = tokenizer.backend.token_to_id(token)
        if token_id is None:
            raise unknown_token(token)
        ids.append(token_id)
    return ids


def _template_tokens(tokenizer: ChatTokenizer) -> list[str]:
    """Return the special tokens in a rendered conversation, except the BOS and EOS tokens."""
    try:
        text = tokenizer.template.render(tokenizer.traits.example("a", "b"))
    except RowRejectedError:
        return []
    ends = {tokenizer.special_tokens.get("bos_token"), tokenizer.special_tokens.get("eos_token")}
    return sorted({token for token in tokenizer.special_pattern.findall(text) if token not in ends})


class _Embedding:
    """The token embedding in a safetensors file, read one row at a time."""

    def __init__(self, path: Path, start: int, dtype: str, shape: list[int]):
        self._path = path
        self._start = start
        self._dtype = dtype
        self._rows, self._width = shape

    @classmethod
    def of(cls, folder: Path) -> _Embedding | None:
        for path in _files(folder):
            start, entries = read_header(path)
            for name, tensor in entries.items():
                if (
                    name.endswith(_EMBEDDINGS)
                    and len(tensor["shape"]) == 2
                    and tensor["dtype"] in _ITEM_BYTES
                ):
                    return cls(path, start + tensor["data_offsets"][0], tensor["dtype"], tensor["shape"])
        return None

    def row(self, number: int) -> tuple[float, ...]:
        """Read one row. Raises ``IndexError`` past the last row, and ``ValueError`` for an absurd width."""
        if number >= self._rows:
            raise IndexError(number)
        size = self._width * _ITEM_BYTES[self._dtype]
        if size > _MAX_ROW_BYTES:
            raise ValueError(f"a row takes more than {_MAX_ROW_BYTES >> 20} MiB")
        with self._path.open("rb") as file:
            file.seek(self._start + number * size)
            data = file.read(size)
        if self._dtype == "BF16":
            halves = array("H", data)
            return struct.unpack(f"<{self._width}f", array("I", (half << 16 for half in halves)).tobytes())
        return struct.unpack(f"<{self._width}{'e' if self._dtype == 'F16' else 'f'}", data)


def _files(folder: Path) -> list[Path]:
    """Return the file that holds the embedding if an index names it, else all files."""
    index = folder / INDEX
    if index.is_file():
        names = load_config(index, MAX_INDEX_BYTES)
        indexed_files(names, str(index))
        return [folder / file for name, file in names["weight_map"].items() if name.endswith(_EMBEDDINGS)]
    return sorted(folder.glob("*.safetensors"))


def _size(row: Iterable[float]) -> float:
    return sqrt(sum(value * value for value in row))
