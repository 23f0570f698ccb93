"""Comparison of a written GGUF file with the model as it was trained, by llama.cpp itself.

The run's validation rows are split into tokens by llama.cpp, and its next-token logits at every trained
position are compared with those of base and adapter as they were trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import ChatSession, load_session
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.jobs import Compare, ComparedRow
from qlora_tui.export.llama_cpp.llama_process import compare

_MAX_ROWS = 200
_MAX_TOKENS = 1024
"""Most tokens of a row."""
_MAX_POSITIONS = 1200
"""Number of positions after which rows are compared by their tokens only."""
_LIMITS = {"F16": 0.02, "BF16": 0.02, "Q8_0": 0.05, "Q6_K": 0.1, "Q5": 0.5, "Q4": 1.0}
"""Mean KL divergence that rounding explains, by the beginning of a file type; above, a file is wrong."""
_LIMIT_AT_FEW_BITS = 2.0


class Proof(Struct, frozen=True, kw_only=True):
    """A file compared with base and adapter as they were trained."""

    name: str
    """What was compared: ``Q4_K_M``, or ``The LoRA``."""
    rows: int
    """Rows whose tokens were compared."""
    different_rows: int
    """Rows that llama.cpp splits into other tokens."""
    positions: int
    """Trained positions whose logits were compared."""
    divergence: float
    """Mean KL divergence of the file from the trained model, in nats."""
    same_choice: int
    """Positions at which both rank the same token first."""
    turns: int
    """Positions at which a turn ends."""
    turns_ended: int
    """Those at which the file ends it."""
    turns_ended_by_adapter: int
    same_template: bool
    problem: str = ""
    """Why the file is wrong; empty if it is right."""

    @property
    def sentence(self) -> str:
        """Return the result in one sentence."""
        share = self.same_choice / max(self.positions, 1)
        text = (
            f"{self.name} answers as your adapter does at {share:.1%} of {self.positions:,} tokens "
            f"(KL {self.divergence:.2g})"
        )
        if self.turns_ended != self.turns_ended_by_adapter:
            ends = f"{self.turns_ended} of {self.turns} turns"
            text += f"; it ends {ends}, the adapter {self.turns_ended_by_adapter}"
        if self.different_rows:
            text += f"; llama.cpp splits {self.different_rows} of {self.rows} rows into other tokens"
        return text


@dataclass(frozen=True)
class Reference:
    """Rows, and the logits of base and adapter at their trained positions."""

    rows: tuple[ComparedRow, ...]
    path: Path
    """File of float16 log-probabilities, (positions, vocabulary)."""
    vocabulary: int
    end_ids: tuple[int, ...]
    """Tokens that end a turn."""

    def divergence(self, session: ChatSession, adapter_name: str) -> float:
        """Return the mean KL divergence of another loaded model with the adapter, in nats."""
        count = sum(len(row.positions) for row in self.rows)
        reference = np.memmap(self.path, np.float16, "r", shape=(count, self.vocabulary))
        total, start = 0.0, 0
        for row in self.rows:
            if row.positions:
                expected = torch.from_numpy(reference[start : start + len(row.positions)].astype(np.float32))
                start += len(row.positions)
                actual = _log_probabilities(session, adapter_name, row)
                total += float((expected.exp() * (expected - actual)).sum())
        return total / count


@contextmanager
def reference_logits(
    source: ChatSource, adapter_name: str, folder: Path, on_status: Callable[[str], None]
) -> Iterator[Reference]:
    """Compute the logits to compare files with; the file in ``folder`` is deleted afterwards.

    Raises UserError where the model or the run's data cannot be read.
    """
    on_status("Computing the trained model's answers to compare with")
    session = load_session(source, on_status)
    path = folder / "reference.f16"
    try:
        session.ensure_loaded(adapter_name)
        rows = tuple(_rows(_samples(source, session.tokenizer), session.tokenizer))
        vocabulary = 0
        with path.open("wb") as file:
            for row in rows:
                if row.positions:
                    values = _log_probabilities(session, adapter_name, row)
                    vocabulary = values.shape[-1]
                    file.write(values.half().numpy().tobytes())
        end_ids = session.tokenizer.turn_end_ids
        del session
        gc.collect()
        if not vocabulary:
            raise UserError(
                "There is nothing to compare the file with",
                what="No row of the run's data has a token that is trained.",
                fix="Compare answers in the chat instead.",
            )
        yield Reference(rows, path, vocabulary, end_ids)
    finally:
        path.unlink(missing_ok=True)


def prove(reference: Reference, file: Path, file_type: str, template: str, lora: Path | None = None) -> Proof:
    """Compare a GGUF file with the reference, or with ``lora`` applied to it.

    Raises UserError where llama.cpp cannot run it.
    """
    result = compare(
        Compare(
            model=str(file),
            rows=reference.rows,
            reference=str(reference.path),
            vocabulary=reference.vocabulary,
            end_ids=reference.end_ids,
            lora=str(lora or ""),
        )
    )
    rows = sum(bool(row.text) for row in reference.rows)
    proof = Proof(
        name="The LoRA" if lora else file_type,
        rows=rows,
        different_rows=len(result.different_tokens),
        positions=result.positions,
        divergence=result.divergence,
        same_choice=result.same_choice,
        turns=result.turns,
        turns_ended=result.turns_ended,
        turns_ended_by_adapter=result.turns_ended_by_reference,
        same_template=result.template == template,
    )
    return replace(proof, problem=_problem(proof, file_type))


def _problem(proof: Proof, file_type: str) -> str:
    if not proof.same_template:
        return "llama.cpp reads another chat template from it"
    if proof.different_rows > proof.rows * 0.02:
        return f"llama.cpp splits {proof.different_rows} of {proof.rows} rows into other tokens"
    limit = next((limit for kind, limit in _LIMITS.items() if file_type.startswith(kind)), _LIMIT_AT_FEW_BITS)
    # Written so that NaN is a problem too.
    if not proof.divergence <= limit:
        return (
            f"its answers differ from the adapter's by a KL divergence of {proof.divergence:.2g}, "
            f"where rounding to {file_type} explains {limit:g}"
        )
    return ""


def _samples(source: ChatSource, tokenizer: ChatTokenizer) -> Samples:
    """Return the run's validation rows; its training rows if it has none."""
    prepared = prepare_dataset(source.recipe, tokenizer)
    return prepared.validation if len(prepared.validation) else prepared.train


def _rows(samples: Samples, tokenizer: ChatTokenizer) -> Iterator[ComparedRow]:
    count, positions = min(len(samples), _MAX_ROWS), 0
    for place in range(count):
        number = place * len(samples) // count
        ids = tuple(samples.token_ids(number)[:_MAX_TOKENS])
        mask = samples.loss_mask(number)
        trained = [t - 1 for t in range(1, len(ids)) if mask[t]] if positions < _MAX_POSITIONS else []
        positions += len(trained)
        text = tokenizer.decode(ids)
        # Text that looks like a special token is no special token in training.
        yield ComparedRow(text if tokenizer.encode(text) == list(ids) else "", ids, tuple(trained))


def _log_probabilities(session: ChatSession, adapter_name: str, row: ComparedRow) -> torch.Tensor:
    logits = session.logits_at(adapter_name, list(row.ids), list(row.positions))
    return logits.float().log_softmax(-1).cpu()
