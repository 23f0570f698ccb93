"""Comparison of a written GGUF file with the model as it was trained, by llama.cpp itself.

The run's validation rows are split into tokens by llama.cpp, and its next-token logits at trained positions
are compared with those of base and adapter as they were trained (``reference``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.export.gguf_file.vocabulary import KnownDifference
from qlora_tui.export.llama_cpp.jobs import Compare, Compared
from qlora_tui.export.llama_cpp.llama_process import compare
from qlora_tui.export.reference import Reference

# A file is wrong if its mean KL divergence is above ``limit``, what rounding explains:
#     limit = _LIMITS[beginning of the file type], else _LIMIT_OTHER_TYPES
#     limit = min(limit, max(floor, effect / _EFFECT_DIVISOR)) for the nearly exact types, which have a floor
#     limit = min(limit, effect) for the others, if effect > _FLOOR_OTHER_TYPES: above it, the base itself
#             answers nearer to the trained model than the file does
# The adapter at half its scale would diverge by effect / 4, because the divergence grows with the square.
_LIMITS = {"F16": 0.02, "BF16": 0.02, "Q8_0": 0.05, "Q6_K": 0.1, "Q5": 0.5, "Q4": 1.0}
_LIMIT_OTHER_TYPES = 2.0
_EFFECT_DIVISOR = 8
_FLOORS = {"F16": 0.004, "BF16": 0.01, "Q8_0": 0.03}
"""KL divergences that rounding alone may cause, so that a smaller effect cannot be seen."""
_FLOOR_OTHER_TYPES = 0.015
_DIFFERENT_SHARE = 0.02
"""Share of rows that may become other tokens for a reason that is not known."""
_FEWER_ENDS = 3
"""Turn ends that a file must lose before it is wrong: of few turns, rounding may change one or two."""


class Proof(Struct, frozen=True, kw_only=True):
    """A file compared with base and adapter as they were trained."""

    name: str
    """What was compared: ``Q4_K_M``, or ``The LoRA``."""
    rows: int
    """Rows whose tokens were compared."""
    different_rows: int
    """Rows that llama.cpp splits into other tokens."""
    effect: float
    """Mean KL(trained model ‖ base), in nats: how much the adapter changes."""
    effect_is_measurable: bool = True
    """Whether a file without the adapter would be noticed."""
    positions: int
    """Trained positions whose logits were compared."""
    trained: int = 0
    """Trained positions of all rows; 0 where they were not counted."""
    divergence: float
    """Mean KL divergence of the file from the trained model, in nats."""
    top1_matches: int
    """Positions at which both rank the same token first."""
    turns: int
    """Positions at which a turn ends."""
    turns_ended: int
    """Those at which the file ends it."""
    turns_ended_by_adapter: int
    prompts: Literal["alike", "different", "not compared"] = "not compared"
    """Prompts of llama.cpp's built-in renderer, compared with those of the chat template."""
    problem: str = ""
    """Why the file is wrong; empty if it is right."""

    @property
    def loses_turn_ends(self) -> bool:
        """Return whether the file ends clearly fewer turns than the adapter: more than 1, and 1 in 20."""
        lost = self.turns_ended_by_adapter - self.turns_ended
        return lost > max(1, self.turns_ended_by_adapter // 20)

    @property
    def sentence(self) -> str:
        """Return the result in one sentence."""
        share = self.top1_matches / max(self.positions, 1)
        text = (
            f"{self.name} answers as your adapter does at {share:.1%} of {self.positions:,} tokens "
            f"(KL {self.divergence:.2g})"
        )
        if self.positions < self.trained:
            text += f"; compared at {self.positions:,} of {self.trained:,} trained tokens"
        if not self.effect_is_measurable:
            text += (
                f"; the adapter itself changes so little (KL {self.effect:.2g}) that a file without it "
                "could not be told from this one"
            )
        if self.turns_ended != self.turns_ended_by_adapter:
            ends = f"{self.turns_ended} of {self.turns} turns"
            text += f"; it ends {ends}, the adapter {self.turns_ended_by_adapter}"
        if self.different_rows:
            text += f"; llama.cpp splits {self.different_rows} of {self.rows} rows into other tokens"
        elif not self.rows:
            text += "; how llama.cpp splits the rows into tokens could not be compared"
        return text

    @property
    def prompts_sentence(self) -> str:
        """Say how llama.cpp renders prompts."""
        if self.prompts == "alike":
            return "llama.cpp's built-in renderer writes prompts as the chat template does"
        if self.prompts == "different":
            return (
                "llama.cpp's built-in renderer writes other prompts than the chat template: do not use "
                "llama-server's --no-jinja"
            )
        return (
            "Rendered prompts were not compared: llama.cpp has no built-in renderer for this chat template, "
            "which llama-server runs itself"
        )


def prove(
    reference: Reference,
    file: Path,
    file_type: str,
    differences: Sequence[KnownDifference] = (),
    lora: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Compare a GGUF file with the reference, or with ``lora`` applied to it.

    Texts to which one of ``differences`` applies may become other tokens. ``on_progress`` gets the rows
    compared, and in all; it may raise. Raises UserError where llama.cpp cannot run the file.
    """
    result = compare(
        Compare(
            model=str(file),
            rows=(*reference.rows, *reference.strange),
            reference=reference.answers,
            end_ids=reference.end_ids,
            prompts=reference.prompts,
            lora=str(lora or ""),
        ),
        on_progress,
    )
    count = len(reference.rows)
    different = [reference.rows[number].text for number in result.different_tokens if number < count]
    strange = [
        reference.strange[number - count].text for number in result.different_tokens if number >= count
    ]
    proof = Proof(
        name="The LoRA" if lora else file_type,
        rows=sum(bool(row.text) for row in reference.rows),
        different_rows=len(different),
        effect=reference.effect,
        effect_is_measurable=reference.effect > _FLOORS.get(file_type, _FLOOR_OTHER_TYPES),
        positions=result.positions,
        trained=reference.trained,
        divergence=result.divergence,
        top1_matches=result.top1_matches,
        turns=result.turns,
        turns_ended=result.turns_ended,
        turns_ended_by_adapter=result.turns_ended_by_reference,
        prompts="not compared"
        if result.different_prompts is None
        else ("different" if result.different_prompts else "alike"),
    )

    def is_unexplained(text: str) -> bool:
        return not any(known.applies_to(text) for known in differences)

    problem = _wrong_vocabulary(reference, result)
    if wrong := next(filter(is_unexplained, strange), ""):
        problem = problem or f"llama.cpp splits {wrong[:30]!r} into other tokens"
    if (wrong_rows := sum(map(is_unexplained, different))) > proof.rows * _DIFFERENT_SHARE:
        problem = problem or f"llama.cpp splits {wrong_rows} of {proof.rows} rows into other tokens"
    return replace(proof, problem=problem or _wrong_answers(proof, file_type))


def _wrong_vocabulary(reference: Reference, result: Compared) -> str:
    """Return what is wrong with the file's template and special tokens; empty if nothing is."""
    if result.template != reference.template:
        return "llama.cpp reads another chat template from it"
    if result.first_tokens != reference.first_tokens:
        does = "puts" if result.first_tokens else "does not put"
        return f"llama.cpp {does} a begin token before a text, unlike the tokenizer"
    if result.overrun_ids:
        return "llama.cpp does not stop at a token that ends a turn"
    return ""


def _wrong_answers(proof: Proof, file_type: str) -> str:
    """Return how the file's answers differ more than rounding explains; empty if they do not."""
    limit = next((limit for kind, limit in _LIMITS.items() if file_type.startswith(kind)), _LIMIT_OTHER_TYPES)
    if file_type in _FLOORS:
        limit = min(limit, max(_FLOORS[file_type], proof.effect / _EFFECT_DIVISOR))
    # Written so that NaN is a problem too.
    if not proof.divergence <= limit:
        return (
            f"its answers differ from the adapter's by a KL divergence of {proof.divergence:.2g}, "
            f"where rounding to {file_type} accounts for about {limit:.2g}"
        )
    if proof.effect_is_measurable and proof.divergence > proof.effect:
        return (
            f"its answers differ from the adapter's by a KL divergence of {proof.divergence:.2g}, more than "
            f"those of the base without the adapter ({proof.effect:.2g}): rounding lost what was learned"
        )
    lost = proof.turns_ended_by_adapter - proof.turns_ended
    if lost >= _FEWER_ENDS and 2 * proof.turns_ended < proof.turns_ended_by_adapter:
        return (
            f"it ends {proof.turns_ended} of {proof.turns} turns, and the adapter "
            f"{proof.turns_ended_by_adapter}: answers would not stop"
        )
    return ""
