"""Answers of an exported GGUF file in the chat: llama.cpp computes the logits, the chat samples from them.

So the same prompt, template, sampling and seed apply to the file and to the adapter beside it.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from threading import Event

import numpy as np
import torch
from torch import Tensor

from qlora_tui import subprocesses
from qlora_tui.chat.chat_types import Sampling
from qlora_tui.chat.generation import AnswerStream
from qlora_tui.chat.kv_cache import reusable_prefix
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.availability import install_hint, is_installed
from qlora_tui.recipe.schema import Thinking

_MAX_CONTEXT_TOKENS = 8192
"""Longest conversation, which bounds the memory of llama.cpp's cache."""


class GgufModel:
    """A GGUF file in a process of llama.cpp, and the tokens it has processed."""

    def __init__(self, path: str, context: int) -> None:
        """Start the process. Raises UserError."""
        if not is_installed():
            raise UserError(
                "llama.cpp is not installed", what="It answers from GGUF files.", fix=install_hint()
            )
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            subprocesses.module_argv("qlora_tui.export.llama_cpp.logits_server", path, str(context)),
            env=subprocesses.subprocess_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        # It also ends with this process, when its stdin does.
        self.close = weakref.finalize(self, _end, self._process)
        self._tokens: list[int] = []
        self._vocabulary = int(np.frombuffer(self._read(4), "<i4")[0])

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the common prefix with ``prompt``, without its last token; return its length."""
        known = reusable_prefix(self._tokens, prompt)
        if known < len(self._tokens):
            self._request(known, [])
            known = int(np.frombuffer(self._read(4), "<i4")[0])
            del self._tokens[known:]
        return known

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Process further tokens; return the logits after the last, (1, vocabulary). Raises UserError."""
        self._request(len(self._tokens), token_ids)
        self._tokens += token_ids
        logits = np.frombuffer(self._read(4 * self._vocabulary), "<f4")
        return torch.from_numpy(logits.copy())[None]

    def _request(self, tokens: int, token_ids: Sequence[int]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.array([tokens, len(token_ids), *token_ids], "<i4").tobytes())
            self._process.stdin.flush()
        except (OSError, ValueError):  # a broken pipe, or one that was closed
            raise self._ended() from None

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise self._ended()
        return data

    def _ended(self) -> UserError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        return UserError(
            "llama.cpp could not run the GGUF file",
            what=f"It ended with {name}.",
            why=lines[-1] if lines else "",
            fix="Export the file again, or choose another answer.",
        )


class GgufDecoder:
    """What an answer needs of a model, by a GGUF file."""

    def __init__(self, session: ChatSession, path: str) -> None:
        """Start llama.cpp with a file of the session's model. Raises UserError."""
        self._session = session
        self.device = torch.device("cpu")
        self.context_length = min(session.context_length, _MAX_CONTEXT_TOKENS)
        self.end_ids = session.end_ids
        self.warning = ""
        self.model = GgufModel(path, self.context_length)

    def ask(
        self,
        name: str,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        stop: Event,
        thinking: Thinking = "auto",
    ) -> AnswerStream[GgufModel]:
        """Start the answer to a conversation, as :meth:`ChatSession.ask` does. Raises UserError."""
        prompt = self._session.prompt(messages, thinking)
        return AnswerStream(self, name, prompt, self.model, sampling, stop, self._session.splitter(prompt))

    def next_logits(self, adapter_name: str, token_ids: list[int], prefix_cache: GgufModel) -> Tensor:
        """Return the logits (1, vocabulary) of the token after ``token_ids``. Raises UserError."""
        return prefix_cache.extend(token_ids)

    def next_logits_ahead(
        self, adapter_name: str, token: Tensor, prefix_cache: GgufModel
    ) -> tuple[int, Tensor] | None:
        """Return None: there is no CUDA graph."""
        return None

    def take_note(self) -> str:
        """Return an empty text."""
        return ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens."""
        return self._session.decode(token_ids)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
