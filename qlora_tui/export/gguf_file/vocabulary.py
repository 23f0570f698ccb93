"""A model's tokenizer as GGUF keys: tokens, their types, merges or scores, special tokens, chat template.

llama.cpp knows two kinds among the supported families. ``gpt2``: byte-level BPE with merges. ``llama``:
SentencePiece's BPE, where the pair with the best score is merged first; transformers stores such a tokenizer
as BPE with ``byte_fallback``, whose merges in order are the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.pre_tokenizer import pre_tokenizer_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of GGUF."""
_SPACE = "▁"
_UNMERGED_SCORE = -1e6
"""Score of tokens that no merge makes, below that of every merge."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a GGUF file."""

    model: str
    """``gpt2`` or ``llama``."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    """Token ids by name: ``bos``, ``eos``, ``eot``, ``padding``, ``unknown``."""
    adds_bos: bool
    adds_space: bool
    template: str


def read_vocabulary(tokenizer: ChatTokenizer, rows: int) -> Vocabulary:
    """Convert a tokenizer for a model whose embedding has ``rows`` rows.

    Raises UserError where llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unsupported(f"it is {model.get('type')}, not BPE")
    is_byte_level = _has(content.get("decoder") or {}, "ByteLevel")
    if not is_byte_level and not model.get("byte_fallback"):
        raise _unsupported("it is neither byte-level nor has it tokens for single bytes")
    tokens, types = _tokens(tokenizer, model["vocab"], rows, is_byte_level)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ends = tokenizer.turn_end_ids
    ids = {
        "bos": tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id,
        "eos": tokenizer.eos_id,
        "eot": ends[-1] if ends else None,
        "padding": tokenizer.pad_id,
        "unknown": _id_of(tokenizer, tokenizer.special_tokens.get("unk_token") or model.get("unk_token")),
    }
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=pre_tokenizer_name(content) if is_byte_level else "default",
        tokens=tokens,
        types=types,
        scores=None if is_byte_level else _scores(tokens, merges),
        merges=merges if is_byte_level else None,
        special_ids={name: id_ for name, id_ in ids.items() if id_ is not None},
        adds_bos=_adds_bos(tokenizer),
        adds_space=not is_byte_level and _adds_space(tokenizer),
        template=tokenizer.template.text,
    )


def _tokens(
    tokenizer: ChatTokenizer, vocab: Mapping[str, int], rows: int, is_byte_level: bool
) -> tuple[list[str], list[int]]:
    """Return text and type of each row of the embedding; rows without a token get a name and are unused."""
    added = tokenizer.backend.get_added_tokens_decoder()
    last = max([*vocab.values(), *added])
    if last >= rows:
        raise _unsupported(f"it has tokens up to id {last:,}, and the model {rows:,} embeddings")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for text, number in vocab.items():
        tokens[number] = text
        types[number] = BYTE if not is_byte_level and _is_byte(text) else NORMAL
    for number, token in added.items():
        tokens[number] = token.content
        types[number] = CONTROL if token.special else USER_DEFINED
        if not is_byte_level and not token.special:
            # llama.cpp looks for these in the text before it writes spaces as ▁.
            tokens[number] = token.content.replace(_SPACE, " ")
    if (unknown := vocab.get(tokenizer.special_tokens.get("unk_token", ""))) is not None:
        types[unknown] = CONTROL if is_byte_level else UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return for each token minus the number of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else _UNMERGED_SCORE for token in tokens]


def _adds_bos(tokenizer: ChatTokenizer) -> bool:
    """Return whether llama.cpp shall begin every text with the begin token.

    Only where the tokenizer itself does, and the conversations of the training began with it: llama-server
    then removes the one that the template writes, and Ollama's templates write none.
    """
    return tokenizer.begins_with_bos and prompt_ids([Message("user", "a")], tokenizer)[0] == tokenizer.bos_id


def _adds_space(tokenizer: ChatTokenizer) -> bool:
    """Return whether text after a special token gets a space before it."""
    begin = next((t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special), "")
    first = tokenizer.encode(f"{begin}a")[1 if begin else 0]
    return (tokenizer.backend.id_to_token(first) or "").startswith(_SPACE)


def _id_of(tokenizer: ChatTokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.backend.token_to_id(token)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _has(node: Mapping[str, Any], kind: str) -> bool:
    return node.get("type") == kind or any(_has(part, kind) for part in node.get("decoders", ()))


def _unsupported(why: str) -> UserError:
    return UserError(
        "This tokenizer cannot be exported as GGUF",
        what=f"llama.cpp has no such tokenizer: {why}.",
        fix="Export it with `qlora-tui export merge`; transformers and vLLM load that folder.",
    )
