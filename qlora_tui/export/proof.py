"""Comparison of a written GGUF file with the trained model, by llama.cpp itself.

llama.cpp tokenizes the run's validation rows, and its next-token logits at trained positions are compared
with those of base and adapter as they were trained (``reference``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.catalog.gguf_file_types import FileType, find_file_type
from qlora_tui.export.gguf_file.vocabulary import KnownDifference
from qlora_tui.export.llama_cpp.client import LlamaFile
from qlora_tui.export.reference import ComparedRow, Reference, kl_divergence
from qlora_tui.formatting import format_nats, format_percent

# A file is wrong if its mean KL divergence is above ``limit``, what rounding explains:
#     limit = kl_limit of the file type
#     limit = min(limit, max(kl_floor, effect / _EFFECT_DIVISOR)) for the nearly exact types
#     limit = min(limit, effect) for the others, if effect > kl_floor: above it, the base itself answers
#             nearer to the trained model than the file does
# The adapter at half its scale would diverge by effect / 4, because the divergence grows with the square.
_EFFECT_DIVISOR = 8
_DIFFERENT_SHARE = 0.02
"""Share of rows that may be tokenized differently for an unknown reason."""
_FEWER_ENDS = 3
"""Minimum number of lost turn ends at which a file counts as wrong. With few turns, rounding alone may change
one or two.
"""


class Proof(Struct, frozen=True, kw_only=True):
    """Comparison of a file with base and adapter as they were trained."""

    name: str
    """Name of what was compared, such as ``Q4_K_M``."""
    rows: int
    """Rows whose tokens were compared."""
    different_rows: int
    """Number of rows that llama.cpp tokenizes differently."""
    effect: float
    """Mean KL(trained model ‖ base) in nats, which measures how much the adapter changes."""
    effect_is_measurable: bool = True
    """Whether the comparison would detect a file without the adapter."""
    positions: int
    """Trained positions whose logits were compared."""
    trained: int = 0
    """Number of trained positions in all rows; 0 if they were not counted."""
    divergence: float
    """Mean KL divergence of the file from the trained model, in nats."""
    top1_matches: int
    """Number of positions at which both rank the same token first."""
    turns: int
    """Number of positions at which a turn ends."""
    turns_ended: int
    """Number of these positions at which the file ends the turn."""
    turns_ended_by_adapter: int
    problem: str = ""
    """Why the file is wrong; empty if it is right."""

    @property
    def loses_turn_ends(self) -> bool:
        """Whether the file ends clearly fewer turns than the adapter. The difference must be more than 1, and
        more than 1 in 20.
        """
        lost = self.turns_ended_by_adapter - self.turns_ended
        return lost > max(1, self.turns_ended_by_adapter // 20)

    @property
    def verdict(self) -> str:
        """How close the file is to the adapter, such as ``same top token in 97%, KL 0.004``."""
        share = format_percent(self.top1_matches / max(self.positions, 1))
        return f"same top token in {share}, KL {format_nats(self.divergence)}"

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        text = f"{self.name}: {self.verdict} over {self.positions:,} tokens"
        if self.positions < self.trained:
            text += f"; compared at {self.positions:,} of {self.trained:,} trained tokens"
        if not self.effect_is_measurable:
            text += (
                f"; the adapter itself changes so little (KL {format_nats(self.effect)}) that a file without "
                "it could not be told apart from this one"
            )
        if self.turns_ended != self.turns_ended_by_adapter:
            ends = f"{self.turns_ended} of {self.turns} turns"
            text += f"; the file ends {ends}, and the adapter {self.turns_ended_by_adapter}"
        if self.different_rows:
            text += f"; llama.cpp splits {self.different_rows} of {self.rows} rows into different tokens"
        elif not self.rows:
            text += "; how llama.cpp splits the rows into tokens could not be compared"
        return text


def prove(
    reference: Reference,
    file: Path,
    file_type: str,
    differences: Sequence[KnownDifference] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Compare a GGUF file with the reference.

    Args:
        reference: Rows and the trained model's answers.
        file: The GGUF file.
        file_type: Its type, which determines the allowed rounding.
        differences: Texts that may be tokenized differently.
        on_progress: Called with the number of rows compared, and the total. May raise.

    Raises:
        UserError: llama.cpp cannot load or compute the file.
    """
    llama = LlamaFile(str(file), max(len(row.computed_ids) for row in reference.rows))
    try:
        different, strange = (
            [row.text for row in rows if row.text and not _splits_alike(llama, row)]
            for rows in (reference.rows, reference.strange)
        )
        answers = _compare_answers(reference, llama, on_progress)
        problem = _wrong_vocabulary(reference, llama)
    finally:
        llama.close()
    rows = sum(bool(row.text) for row in reference.rows)
    proof = Proof(
        name=file_type,
        rows=rows,
        different_rows=len(different),
        effect=reference.effect,
        trained=reference.trained,
        problem=problem or _wrong_tokens(different, strange, rows, differences),
        positions=answers.positions,
        divergence=answers.divergence / answers.positions,
        top1_matches=answers.top1_matches,
        turns=answers.turns,
        turns_ended=answers.turns_ended,
        turns_ended_by_adapter=answers.turns_ended_by_adapter,
    )
    return judged(proof, file_type)


def judged(proof: Proof, file_type: str) -> Proof:
    """Return the proof with two more results: the problem with the file's answers, if any, and whether the
    adapter's effect is measurable. Raises UserError if the file type is unknown.
    """
    kind = find_file_type(file_type)
    proof = replace(proof, effect_is_measurable=proof.effect > kind.kl_floor)
    return replace(proof, problem=proof.problem or _wrong_answers(proof, kind))


@dataclass
class _ComparedAnswers:
    """Sums over the compared positions."""

    positions: int = 0
    divergence: float = 0.0
    top1_matches: int = 0
    turns: int = 0
    turns_ended: int = 0
    turns_ended_by_adapter: int = 0


def _compare_answers(
    reference: Reference, llama: LlamaFile, on_progress: Callable[[int, int], None]
) -> _ComparedAnswers:
    rows, answers = reference.computed_rows, reference.answers
    ends = torch.tensor(reference.end_ids, dtype=torch.int64)
    sums = _ComparedAnswers()
    for number, row in enumerate(rows):
        at_end = torch.isin(torch.tensor([row.ids[place + 1] for place in row.positions]), ends)
        parts = zip(
            answers.log_probabilities(number),
            llama.logits(row.computed_ids, row.positions, answers.at_once),
            torch.split(at_end, answers.at_once),
            strict=True,
        )
        for expected, logits, ended in parts:
            actual = torch.from_numpy(logits[:, : expected.shape[1]].copy()).log_softmax(-1)
            choices, expected_choices = actual.argmax(-1), expected.argmax(-1)
            sums.positions += len(logits)
            sums.divergence += float(kl_divergence(expected, actual).sum())
            sums.top1_matches += int((choices == expected_choices).sum())
            sums.turns += int(ended.sum())
            sums.turns_ended += int((ended & torch.isin(choices, ends)).sum())
            sums.turns_ended_by_adapter += int((ended & torch.isin(expected_choices, ends)).sum())
        on_progress(number + 1, len(rows))
    return sums


def _splits_alike(llama: LlamaFile, row: ComparedRow) -> bool:
    """Return whether llama.cpp tokenizes a text like our tokenizer, alone and as a server's prompt."""
    return bool(list(row.ids) == llama.call("tokenize", row.text) == llama.call("prompt_tokens", row.text))


def _wrong_tokens(
    different: Sequence[str], strange: Sequence[str], rows: int, differences: Sequence[KnownDifference]
) -> str:
    """Return which texts are tokenized differently for no known reason; empty if few or none are."""

    def is_unexplained(text: str) -> bool:
        return not any(known.applies_to(text) for known in differences)

    if wrong := next(filter(is_unexplained, strange), ""):
        return f"llama.cpp splits {wrong[:30]!r} into different tokens"
    if (count := sum(map(is_unexplained, different))) > rows * _DIFFERENT_SHARE:
        return f"llama.cpp splits {count} of {rows} rows into different tokens"
    return ""


def _wrong_vocabulary(reference: Reference, llama: LlamaFile) -> str:
    """Return what is wrong with the file's template and special tokens; empty if nothing is wrong."""
    if llama.call("template") != reference.template:
        return "llama.cpp reads a different chat template from it"
    first_tokens = tuple(llama.call("tokenize", "", True))
    if first_tokens != reference.first_tokens:
        does = "puts" if first_tokens else "does not put"
        return f"llama.cpp {does} a begin token before a text, unlike the tokenizer"
    if not all(llama.call("ends_answer", token) for token in reference.end_ids):
        return "llama.cpp does not stop at a token that ends a turn"
    return ""


def _wrong_answers(proof: Proof, kind: FileType) -> str:
    """Return how the file's answers differ by more than rounding explains; empty if they do not."""
    limit = kind.kl_limit
    if kind.is_nearly_exact:
        limit = min(limit, max(kind.kl_floor, proof.effect / _EFFECT_DIVISOR))
    # Written so that NaN counts as a problem.
    if not proof.divergence <= limit:
        return (
            f"its answers differ from the adapter's by a KL divergence of {format_nats(proof.divergence)}, "
            f"where rounding to {kind.name} accounts for about {format_nats(limit)}"
        )
    if proof.effect_is_measurable and proof.divergence > proof.effect:
        return (
            f"its answers differ from the adapter's by a KL divergence of {format_nats(proof.divergence)}, "
            f"more than the base's do without the adapter ({format_nats(proof.effect)}): rounding lost what "
            "was learned"
        )
    lost = proof.turns_ended_by_adapter - proof.turns_ended
    if lost >= _FEWER_ENDS and 2 * proof.turns_ended < proof.turns_ended_by_adapter:
        return (
            f"it ends {proof.turns_ended} of {proof.turns} turns, and the adapter "
            f"{proof.turns_ended_by_adapter}: answers would not stop"
        )
    return ""
