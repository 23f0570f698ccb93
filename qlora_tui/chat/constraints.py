"""Answers that satisfy a JSON schema: tokens that would break it are not selected.

llguidance reads the schema and the tokenizer, and says which tokens may come next. A thought before the
answer is free, and so are the marks around it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import EXIT_USAGE, UserError

_OPTIONS = {"whitespace_pattern": r"(\n[ \t]{0,16}|[ ])?"}
"""Compact, or in lines with an indent. Without a bound a model may write blanks until it is cut off."""


class Grammars:
    """Makes constraints for the answers of models with one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        """``vocabulary``: number of logits, which may be more than the tokenizer has tokens.

        Raises UserError where llguidance is not installed.
        """
        try:
            self._library: Any = import_module("llguidance")
        except ImportError as error:
            raise UserError(
                "A library is missing",
                what="Answers by a JSON schema need llguidance, which is not installed.",
                fix="Install it: pip install 'qlora-tui[serve]'",
            ) from error
        # The text of the tokenizer is compiled once, which takes a second.
        self._tokenizer = self._library.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocabulary, eos_token=sorted(end_ids)
        )

    def constraint(self, schema: Mapping[str, Any], mark_ids: Collection[int] = ()) -> Constraint:
        """Return what keeps one answer within ``schema``.

        Args:
            schema: JSON schema.
            mark_ids: Tokens that mark thoughts and may precede the answer.

        Raises:
            UserError: the schema is wrong, or uses what the library does not know.
        """
        matcher_class = self._library.LLMatcher
        grammar = matcher_class.grammar_from_json_schema(dict(schema), overrides=_OPTIONS)
        matcher = matcher_class(self._tokenizer, grammar)
        if matcher.is_error():
            raise _unusable(matcher)
        return Constraint(matcher, mark_ids)


class Constraint:
    """The tokens that one answer may have next."""

    def __init__(self, matcher: Any, mark_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._marks = sorted(mark_ids)
        self._has_begun = False

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits (1, vocabulary) without those of tokens that may not come next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten().bool()
        allowed = allowed[: logits.shape[-1]]
        if not self._has_begun:
            allowed[self._marks] = True
        return logits.float().masked_fill(~allowed.to(logits.device), float("-inf"))

    def add(self, token_id: int) -> None:
        """Note the token that was selected."""
        if not self._has_begun and token_id in self._marks:
            return
        self._has_begun = True
        self._matcher.consume_token(token_id)

    def applies(self, *, is_outside: bool) -> bool:
        """Return whether the next token is part of the answer; ``is_outside``: of a thought or a mark."""
        return self._has_begun or not is_outside

    @property
    def is_satisfied(self) -> bool:
        """Return whether the value is complete, and nothing may follow. Raises UserError."""
        if self._matcher.is_error():
            raise _unusable(self._matcher)
        return bool(self._matcher.is_stopped())


def _unusable(matcher: Any) -> UserError:
    return UserError(
        "The JSON schema cannot be used",
        what=f"llguidance says: {matcher.get_error().strip().splitlines()[0].rstrip('.')}.",
        fix="Correct the schema, or leave out what is not supported.",
        exit_code=EXIT_USAGE,
    )
