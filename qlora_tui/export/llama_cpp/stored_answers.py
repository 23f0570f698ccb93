"""Reads the trained model's next-token probabilities from what is stored of them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qlora_tui.export.llama_cpp.jobs import StoredAnswers

Floats = npt.NDArray[np.float32]
_LOGITS = 1 << 25
"""Most logits that are in memory at once: 128 MiB."""
_MATRIX_BYTES = 1 << 30
"""A larger matrix is converted to float32 in parts, each time."""


def positions_at_once(vocabulary: int) -> int:
    """Return at how many positions the logits are computed at once."""
    return max(1, _LOGITS // vocabulary)


class AnswerReader:
    """Computes log-probabilities from the output layer's inputs and its matrix."""

    def __init__(self, answers: StoredAnswers) -> None:
        """Open the files. Raises OSError."""
        self._answers = answers
        positions = Path(answers.inputs).stat().st_size // answers.position_bytes
        self._inputs = _open(answers, answers.inputs, (positions, answers.width))
        self._matrix = _open(answers, answers.matrix, (answers.width, answers.vocabulary))
        if self._matrix.size * 4 <= _MATRIX_BYTES:
            self._matrix = _as_float32(self._matrix)

    def log_probabilities(self, start: int, stop: int) -> Floats:
        """Return the log-probabilities at these positions, (positions, vocabulary)."""
        answers = self._answers
        inputs = _as_float32(self._inputs[start:stop])
        logits = np.empty((len(inputs), answers.vocabulary), np.float32)
        for columns in self._columns():
            np.matmul(inputs, _as_float32(self._matrix[:, columns]), out=logits[:, columns])
        logits *= answers.scale
        if answers.softcap:
            logits = answers.softcap * np.tanh(logits / np.float32(answers.softcap))
        return log_softmax(logits)

    def _columns(self) -> Iterator[slice]:
        is_converted = self._matrix.dtype == np.float32
        count = self._answers.vocabulary if is_converted else _LOGITS // self._answers.width
        for start in range(0, self._answers.vocabulary, count):
            yield slice(start, min(start + count, self._answers.vocabulary))


def _stored_type(answers: StoredAnswers) -> np.dtype[np.generic]:
    return np.dtype(np.uint16 if answers.dtype == "bfloat16" else answers.dtype)


def _open(answers: StoredAnswers, path: str, shape: tuple[int, int]) -> npt.NDArray[np.generic]:
    return np.memmap(path, _stored_type(answers), "r", shape=shape)


def _as_float32(stored: npt.NDArray[np.generic]) -> Floats:
    """Convert stored values; numpy has no bfloat16, which is the upper half of a float32."""
    if stored.dtype == np.uint16:
        shifted: Floats = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
        return shifted
    converted: Floats = stored.astype(np.float32, copy=False)
    return converted


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl_divergence(expected: Floats, actual: Floats) -> Floats:
    """Return KL(expected || actual) of each row, in nats, from log-probabilities (rows, vocabulary).

    With probabilities (1/2, 1/2) expected and (1/4, 3/4) actual, ½·ln 2 + ½·ln ⅔ = 0.144.
    """
    result: Floats = (np.exp(expected) * (expected - actual)).sum(-1)
    return result
