"""llama.h through the package ``llama-cpp-py-sync``, whose wheel contains the library.

Uses the package's generated bindings, which are private to it; ``tests/export/test_llama_cpp.py`` fails if
they change. The functions are documented in llama.cpp, include/llama.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_tui.export.llama_cpp.client import PACKAGE

if TYPE_CHECKING:
    from qlora_tui.export.llama_cpp.client import Floats

_F32 = 0
"""Value of ``GGML_TYPE_F32``."""


def thread_count() -> int:
    """Return the number of threads: OMP_NUM_THREADS as torch reads it, otherwise one for each CPU."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) else os.cpu_count() or 1


class LlamaCppError(Exception):
    """llama.cpp returned an error."""


class LlamaCpp:
    """The library, which is loaded once per process."""

    def __init__(self) -> None:
        """Load the library. Raises LlamaCppError."""
        try:
            from llama_cpp_py_sync import _cffi_bindings as generated

            self._ffi: Any = generated.get_ffi()
            self._lib: Any = generated.get_lib()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            raise LlamaCppError(f"{PACKAGE} could not be loaded: {error}") from error
        self._lib.llama_backend_init()

    def quantize(self, source: str, target: str, file_type: str) -> None:
        """Write ``target``, quantized to ``file_type``. Raises LlamaCppError."""
        parameters = self._lib.llama_model_quantize_default_params()
        try:
            parameters.ftype = getattr(self._lib, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        except AttributeError as error:
            raise LlamaCppError(f"it has no file type {file_type}") from error
        parameters.nthread = thread_count()
        code = self._lib.llama_model_quantize(
            source.encode(), target.encode(), self._ffi.new("llama_model_quantize_params *", parameters)
        )
        if code:
            raise LlamaCppError(f"quantizing returned {code}")

    @contextmanager
    def open(self, path: str, *, context: int, exact: bool = False) -> Iterator[LlamaModel]:
        """Load a model for rows of at most ``context`` tokens, on the CPU. Raises LlamaCppError."""
        lib = self._lib
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(path.encode(), settings)
        if not model:
            raise LlamaCppError(f"it could not load {path}")
        try:
            options = lib.llama_context_default_params()
            options.n_ctx = options.n_batch = context
            options.n_ubatch = min(context, 512)
            options.n_threads = options.n_threads_batch = thread_count()
            if exact:
                options.type_k = options.type_v = _F32
                options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            state = lib.llama_init_from_model(model, options)
            if not state:
                raise LlamaCppError("it could not set up a context")
            try:
                yield LlamaModel(self._ffi, lib, model, state)
            finally:
                lib.llama_free(state)
        finally:
            lib.llama_model_free(model)


class LlamaModel:
    """A loaded model."""

    def __init__(self, ffi: Any, lib: Any, model: Any, state: Any) -> None:
        """Wrap the objects that :meth:`LlamaCpp.open` created."""
        self._ffi, self._lib, self._model, self._state = ffi, lib, model, state
        self._vocabulary = lib.llama_model_get_vocab(model)
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(self._vocabulary)

    def template(self) -> str:
        """Chat template of the file."""
        text = self._lib.llama_model_chat_template(self._model, self._ffi.NULL)
        return str(self._ffi.string(text).decode()) if text else ""

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Return the tokens of a text in which special tokens are written out.

        ``add_special`` adds the BOS token if the file requests it.
        """
        data = text.encode()
        size = len(data) + 16
        ids = self._ffi.new("llama_token[]", size)
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), ids, size, add_special, True)
        if count < 0:
            raise LlamaCppError(f"it could not tokenize a text of {len(data)} bytes")
        return list(ids[0:count])

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt as llama-server computes them.

        If the file requests a BOS token, the server removes a BOS token that the template wrote, and then
        tokenizes with ``add_special`` (common/chat.cpp, ``common_chat_template_direct_apply``).
        """
        if self._lib.llama_vocab_get_add_bos(self._vocabulary):
            begin = self._lib.llama_vocab_get_text(
                self._vocabulary, self._lib.llama_vocab_bos(self._vocabulary)
            )
            prompt = prompt.removeprefix(str(self._ffi.string(begin).decode()))
        return self.tokenize(prompt, add_special=True)

    def ends_answer(self, token: int) -> bool:
        """Return whether llama.cpp stops at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocabulary, token))

    def truncate(self, tokens: int) -> bool:
        """Keep only the first ``tokens``. If the model cannot do this, drop all and return False."""
        memory = self._lib.llama_get_memory(self._state)
        if tokens and self._lib.llama_memory_seq_rm(memory, 0, tokens, -1):
            return True
        self._lib.llama_memory_clear(memory, True)
        return tokens == 0

    def compute(self, ids: Sequence[int], positions: Sequence[int], start: int) -> Floats:
        """Append ``ids`` after the first ``start`` tokens; return the logits (…, vocabulary) at ``positions``
        of ``ids``.

        Raises LlamaCppError.
        """
        if not start:
            self.truncate(0)
        lib = self._lib
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            wanted = set(positions)
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place] = token
                batch.pos[place] = start + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = place in wanted
            if code := lib.llama_decode(self._state, batch):
                raise LlamaCppError(f"computing a row of {len(ids)} tokens returned {code}")
            size = 4 * self.vocabulary_size
            rows = [
                np.frombuffer(
                    self._ffi.buffer(lib.llama_get_logits_ith(self._state, place), size), np.float32
                )
                for place in positions
            ]
            return np.stack(rows)
        finally:
            lib.llama_batch_free(batch)
