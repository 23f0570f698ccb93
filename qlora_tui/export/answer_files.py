"""Files of the trained model's answers at every compared position, so that they are computed once.

``reference.inputs`` has the inputs of the output layer, row by row, and ``reference.matrix`` the layer's
matrix. The journal has the digest of each row: where an export was interrupted, the next computes the others.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.chat.session import ChatSession, load_session, out_of_memory
from qlora_tui.errors import UserError
from qlora_tui.export.journal import Digest, Journal
from qlora_tui.export.llama_cpp.jobs import ComparedRow, StoredAnswers
from qlora_tui.export.llama_cpp.stored_answers import (
    AnswerReader,
    Floats,
    kl_divergence,
    positions_at_once,
)
from qlora_tui.formatting import format_duration
from qlora_tui.training.heap import release_gpu_memory

_MAX_DIFFERENCE = 0.01
"""Most by which stored answers may differ from the model's own, as KL divergence in nats: 16-bit rounding."""
_REPORT_S = 30.0
"""Longest time without a report of progress, in seconds."""
_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_INPUTS = "reference.inputs"
_MATRIX = "reference.matrix"
_ENTRY = "reference"

StatusFn = Callable[[str], None]


class _AnswersEntry(Struct, frozen=True):
    """The journal's entry of the files of answers."""

    rows: str
    """Hash of the rows."""
    answers: StoredAnswers
    matrix: Digest


class _RowEntry(Struct, frozen=True):
    """The journal's entry of one row."""

    inputs: Digest
    effect: float
    """Sum of KL(trained model ‖ base) over its positions, in nats."""


def store_answers(
    source: ChatSource,
    adapter_name: str,
    rows: Sequence[ComparedRow],
    journal: Journal,
    on_status: StatusFn,
    words: str,
) -> tuple[StoredAnswers, float]:
    """Write the files, as far as they are not complete; the model is loaded only then.

    Returns:
        What reads the files, and the mean KL(trained model ‖ base) in nats.

    Raises:
        UserError: the model cannot be loaded, or memory is too small. OSError.
    """
    computed = [row for row in rows if row.positions]
    hashed = hashlib.sha256(msgspec.json.encode(computed)).hexdigest()
    entry = journal.get(_ENTRY, _AnswersEntry)
    if entry is not None and (
        entry.rows != hashed or not _is_complete(journal.folder / _MATRIX, entry.matrix)
    ):
        entry = None
    effects = _complete_rows(computed, journal) if entry is not None else []
    if entry is None or len(effects) < len(computed):
        if entry is None:
            journal.forget(_ENTRY)
        entry = _compute(source, adapter_name, computed, effects, entry, hashed, journal, on_status, words)
    return entry.answers, sum(effects) / sum(len(row.positions) for row in computed)


def delete_answers(folder: Path) -> None:
    """Delete the files."""
    for name in (_INPUTS, _MATRIX):
        (folder / name).unlink(missing_ok=True)


def _is_complete(file: Path, digest: Digest) -> bool:
    try:
        return Digest.of_file(file) == digest
    except FileNotFoundError:
        return False


def _complete_rows(computed: Sequence[ComparedRow], journal: Journal) -> list[float]:
    """Return the effect of each row at the beginning whose inputs are as the journal says."""
    effects: list[float] = []
    try:
        with (journal.folder / _INPUTS).open("rb") as file:
            for number in range(len(computed)):
                entry = journal.get(f"{_ENTRY}/{number}", _RowEntry)
                if entry is None or Digest.of_next(file, entry.inputs.size) != entry.inputs:
                    break
                effects.append(entry.effect)
    except FileNotFoundError:
        pass
    return effects


def _compute(
    source: ChatSource,
    adapter_name: str,
    computed: Sequence[ComparedRow],
    effects: list[float],
    entry: _AnswersEntry | None,
    hashed: str,
    journal: Journal,
    on_status: StatusFn,
    words: str,
) -> _AnswersEntry:
    """Compute the rows after those of ``effects``, and add theirs; return the entry of the files."""
    session = load_session(source, on_status)
    session.ensure_loaded(adapter_name)
    report = row_progress(on_status, words, len(effects))
    path = journal.folder / _INPUTS
    with path.open("r+b" if effects else "wb") as file:
        if entry is not None:
            positions = sum(len(row.positions) for row in computed[: len(effects)])
            file.truncate(positions * entry.answers.position_bytes)
            file.seek(0, os.SEEK_END)
        for number in range(len(effects), len(computed)):
            row = computed[number]
            inputs, logits = head_inputs(session, adapter_name, row)
            if entry is None:
                entry = _AnswersEntry(hashed, *_store_matrix(session, inputs, journal.folder))
                journal.record(_ENTRY, entry)
            data = _bytes(inputs)
            file.write(data)
            file.flush()
            if number == 0:
                _require_same(AnswerReader(entry.answers).log_probabilities(0, 1), logits)
            effects.append(_effect(session, adapter_name, row, inputs, entry.answers.vocabulary))
            journal.record(f"{_ENTRY}/{number}", _RowEntry(Digest.of(data), effects[-1]))
            report(number + 1, len(computed))
    del session
    # A run may start during the export.
    release_gpu_memory()
    assert entry is not None
    return entry


def _store_matrix(session: ChatSession, like: Tensor, folder: Path) -> tuple[StoredAnswers, Digest]:
    """Write the matrix of the output layer with the active adapter. Raises OSError."""
    vocabulary = 0
    path = folder / _MATRIX
    with path.open("wb") as file:
        for block in session.head.matrix(like):
            vocabulary = block.shape[-1]
            file.write(_bytes(block))
    answers = StoredAnswers(
        inputs=str(folder / _INPUTS),
        matrix=str(path),
        dtype=_DTYPES[like.dtype],
        width=like.shape[-1],
        vocabulary=vocabulary,
        scale=session.head.scale,
        softcap=session.head.softcap,
    )
    return answers, Digest.of_file(path)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().cpu().view(torch.uint8).numpy().data


def _require_same(stored: Floats, logits: Tensor) -> None:
    """Raise UserError where stored answers (1, vocabulary) are not those of the model (vocabulary,)."""
    expected = logits.float().log_softmax(-1).cpu().numpy()[None]
    # Written so that NaN is a difference too.
    if not float(kl_divergence(expected, stored).sum()) <= _MAX_DIFFERENCE:
        raise UserError(
            "The answers cannot be compared",
            what="The model computes its logits in another way than from its output layer's matrix.",
            fix="Compare answers in the chat instead, and report the model.",
        )


def head_parts(inputs: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Yield inputs (positions, width) in parts whose logits fit into memory."""
    count = positions_at_once(vocabulary)
    for start in range(0, len(inputs), count):
        yield inputs[start : start + count]


def _effect(
    session: ChatSession, adapter_name: str, row: ComparedRow, trained: Tensor, vocabulary: int
) -> float:
    """Return the sum of KL(trained model ‖ base) over a row's positions, in nats. Raises UserError."""
    base, _ = head_inputs(session, BASE, row)
    total = 0.0
    for ours, theirs in zip(head_parts(trained, vocabulary), head_parts(base, vocabulary), strict=True):
        # The adapter may change the output layer too.
        session.activate(BASE)
        actual = session.head.logits(theirs).log_softmax(-1)
        session.activate(adapter_name)
        expected = session.head.logits(ours).log_softmax(-1)
        total += float((expected.exp() * (expected - actual)).sum())
    return total


def row_progress(on_status: StatusFn, words: str, start: int = 0) -> Callable[[int, int], None]:
    """Return what reports the rows done, and in all, with the time left: at each tenth, and every 30 s.

    ``start`` rows were done before.
    """
    began = reported_at = time.monotonic()
    tenths = -1 if start else 0

    def report(done: int, total: int) -> None:
        nonlocal tenths, reported_at
        now = time.monotonic()
        if done * 10 // total == tenths and now - reported_at < _REPORT_S:
            return
        tenths, reported_at = done * 10 // total, now
        left = format_duration((now - began) * (total - done) / (done - start))
        on_status(f"{words}: row {done} of {total}" + (f", {left} left" if done < total else ""))

    return report


def head_inputs(session: ChatSession, adapter_name: str, row: ComparedRow) -> tuple[Tensor, Tensor]:
    """Return the output layer's inputs at the row's positions, and the logits of the first.

    Raises UserError.
    """
    try:
        return session.head_inputs(adapter_name, list(row.computed_ids), list(row.positions))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(session.compute_device) from error
