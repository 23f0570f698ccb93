"""Answers of an exported GGUF file in the chat: llama.cpp computes the logits, the chat samples from them.

The same prompt, template, sampling and seed therefore apply to the file and to the adapter it is compared
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

import torch
from torch import Tensor

from qlora_tui.chat.chat_types import Sampling
from qlora_tui.chat.decoding import reusable_prefix
from qlora_tui.chat.generation import PREFILL_CHUNK_TOKENS, AnswerStream
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.export.llama_cpp.client import LlamaFile
from qlora_tui.recipe.schema import Thinking

_MAX_CONTEXT_TOKENS = 8192
"""Maximum length of a conversation, which bounds the memory of llama.cpp's cache."""


class GgufDecoder:
    """A GGUF file as a chat model: llama.cpp computes its logits, and the tokens so far are kept."""

    def __init__(self, session: ChatSession, path: str) -> None:
        """Start llama.cpp with a GGUF file of the session's model. Raises UserError."""
        self._session = session
        self.device = torch.device("cpu")
        self.context_length = min(session.context_length, _MAX_CONTEXT_TOKENS)
        self.prefill_tokens = PREFILL_CHUNK_TOKENS
        self.end_ids = session.end_ids
        self.warning = ""
        self._file = LlamaFile(path, self.context_length)
        self.close = self._file.close
        self._tokens: list[int] = []

    def ask(
        self,
        name: str,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        stop: Event,
        thinking: Thinking = "auto",
    ) -> AnswerStream[GgufDecoder]:
        """Start the answer to a conversation, like :meth:`ChatSession.ask`. Raises UserError."""
        prompt = self._session.prompt(messages, thinking)
        return AnswerStream(self, name, prompt, self, sampling, stop, self._session.splitter(prompt))

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the processed tokens with which ``prompt`` begins, without the last token of ``prompt``.
        Return the number of tokens kept.
        """
        known = reusable_prefix(self._tokens, prompt)
        if known < len(self._tokens):
            if not self._file.call("truncate", known):
                known = 0
            del self._tokens[known:]
        return known

    def next_logits(self, adapter_name: str, token_ids: list[int], prefix_cache: GgufDecoder) -> Tensor:
        """Return the logits (1, vocabulary) of the token after ``token_ids``. Raises UserError."""
        logits = self._file.extend(token_ids, start=len(self._tokens), positions=[len(token_ids) - 1])
        self._tokens += token_ids
        return torch.from_numpy(logits.copy())

    def next_logits_ahead(
        self, adapter_name: str, token: Tensor, prefix_cache: GgufDecoder
    ) -> tuple[int, Tensor] | None:
        """Return None, because there is no CUDA graph."""
        return None

    def take_note(self) -> str:
        """Return an empty text, because there is nothing to note."""
        return ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._session.decode(token_ids)
