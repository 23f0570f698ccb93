"""Comparison of a written GGUF file with the model as it was trained, by llama.cpp itself.

The run's validation rows are split into tokens by llama.cpp, and its next-token logits at every trained
position are compared with those of base and adapter as they were trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.chat.session import ChatSession, load_session
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.vocabulary import KnownDifference
from qlora_tui.export.llama_cpp.jobs import Compare, Compared, ComparedRow
from qlora_tui.export.llama_cpp.llama_process import compare

_MAX_ROWS = 200
_MAX_TOKENS = 1024
"""Most tokens of a row."""
_MAX_POSITIONS = 1200
"""Number of positions after which rows are compared by their tokens only."""
# A file is wrong if its mean KL divergence is above ``limit``, what rounding explains:
#     limit = _LIMITS[beginning of the file type], else _LIMIT_OTHER_TYPES
#     limit = min(limit, max(_LIMIT_FLOOR[type], effect / _EFFECT_DIVISOR)) for the nearly exact types
# The adapter at half its scale would diverge by effect / 4, because the divergence grows with the square.
_LIMITS = {"F16": 0.02, "BF16": 0.02, "Q8_0": 0.05, "Q6_K": 0.1, "Q5": 0.5, "Q4": 1.0}
_LIMIT_OTHER_TYPES = 2.0
_EFFECT_DIVISOR = 8
_LIMIT_FLOOR = {"F16": 0.004, "BF16": 0.01, "Q8_0": 0.015}
_DIFFERENT_SHARE = 0.02
"""Share of rows that may become other tokens for a reason that is not known."""
_STRANGE_TEXTS = (
    "I'm sure they'll say we've been there; DON'T HE'S you're",
    "1 12 123 1234 12345 3.14 1,000,000 x2y3 v1.2.3",
    "def f(x):\n\tif x:\n        return {'a': [1, 2]}\n\n\nprint(f(0))  # end \n",
    "a  b   c    d     e\t\tf \t g \n h",
    "我想在apple工作。こんにちは、世界！한국어",
    "Привет, мир! École française, straße",
    "🚀 fooBar FooBARBaz_HTTPServer ======= ...!!! https://example.org/a?b=c&d#e",
)
"""Texts in which wrong rules of a tokenizer show."""


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
    positions: int
    """Trained positions whose logits were compared."""
    divergence: float
    """Mean KL divergence of the file from the trained model, in nats."""
    top1_matches: int
    """Positions at which both rank the same token first."""
    turns: int
    """Positions at which a turn ends."""
    turns_ended: int
    """Those at which the file ends it."""
    turns_ended_by_adapter: int
    problem: str = ""
    """Why the file is wrong; empty if it is right."""

    @property
    def sentence(self) -> str:
        """Return the result in one sentence."""
        share = self.top1_matches / max(self.positions, 1)
        text = (
            f"{self.name} answers as your adapter does at {share:.1%} of {self.positions:,} tokens "
            f"(KL {self.divergence:.2g})"
        )
        if self.turns_ended != self.turns_ended_by_adapter:
            ends = f"{self.turns_ended} of {self.turns} turns"
            text += f"; it ends {ends}, the adapter {self.turns_ended_by_adapter}"
        if self.different_rows:
            text += f"; llama.cpp splits {self.different_rows} of {self.rows} rows into other tokens"
        elif not self.rows:
            text += "; how llama.cpp splits the rows into tokens could not be compared"
        return text


@dataclass(frozen=True)
class Reference:
    """Rows, and the logits of base and adapter at their trained positions."""

    rows: tuple[ComparedRow, ...]
    strange: tuple[ComparedRow, ...]
    """Texts in which wrong rules of a tokenizer show, compared by their tokens only."""
    path: Path
    """File of float16 log-probabilities, (positions, vocabulary)."""
    vocabulary: int
    end_ids: tuple[int, ...]
    """Tokens that end a turn."""
    first_tokens: tuple[int, ...]
    """Tokens that begin every text: the begin token, or none."""
    template: str
    """The chat template that the conversations were rendered with."""
    effect: float
    """Mean KL(trained model ‖ base), in nats: how much the adapter changes."""

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


def reference_bytes(vocabulary: int) -> int:
    """Return the most bytes that the file of reference logits takes."""
    return (_MAX_POSITIONS + _MAX_TOKENS) * vocabulary * 2


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
        tokenizer = session.tokenizer
        rows = tuple(_rows(_samples(source, tokenizer), tokenizer))
        first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        begins = tokenizer.begins_with_bos and all(row.ids[:1] == first for row in rows)
        vocabulary, effect, count = 0, 0.0, 0
        with path.open("wb") as file:
            for row in rows:
                if row.positions:
                    values = _log_probabilities(session, adapter_name, row)
                    vocabulary = values.shape[-1]
                    file.write(values.half().numpy().tobytes())
                    base = _log_probabilities(session, BASE, row)
                    effect += float((values.exp() * (values - base)).sum())
                    count += len(row.positions)
        del session
        gc.collect()
        if not vocabulary:
            raise UserError(
                "There is nothing to compare the file with",
                what="No row of the run's data has a token that is trained.",
                fix="Compare answers in the chat instead.",
            )
        yield Reference(
            rows=rows,
            strange=tuple(_strange_rows(tokenizer)),
            path=path,
            vocabulary=vocabulary,
            end_ids=tokenizer.turn_end_ids,
            first_tokens=first if begins else (),
            template=tokenizer.template.text,
            effect=effect / count,
        )
    finally:
        path.unlink(missing_ok=True)


def reference_or_reason(
    stack: ExitStack,
    source: ChatSource,
    adapter_name: str,
    folder: Path,
    on_status: Callable[[str], None],
) -> Reference | str:
    """Return what the files are compared with, or why there is nothing."""
    try:
        return stack.enter_context(reference_logits(source, adapter_name, folder, on_status))
    except UserError as error:
        return f"{error.title}: {error.what}".rstrip(".")


def prove(
    reference: Reference,
    file: Path,
    file_type: str,
    differences: Sequence[KnownDifference] = (),
    lora: Path | None = None,
) -> Proof:
    """Compare a GGUF file with the reference, or with ``lora`` applied to it.

    Texts to which one of ``differences`` applies may become other tokens. Raises UserError where llama.cpp
    cannot run the file.
    """
    result = compare(
        Compare(
            model=str(file),
            rows=(*reference.rows, *reference.strange),
            reference=str(reference.path),
            vocabulary=reference.vocabulary,
            end_ids=reference.end_ids,
            lora=str(lora or ""),
        )
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
        positions=result.positions,
        divergence=result.divergence,
        top1_matches=result.top1_matches,
        turns=result.turns,
        turns_ended=result.turns_ended,
        turns_ended_by_adapter=result.turns_ended_by_reference,
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
    if file_type in _LIMIT_FLOOR:
        limit = min(limit, max(_LIMIT_FLOOR[file_type], proof.effect / _EFFECT_DIVISOR))
    # Written so that NaN is a problem too.
    if not proof.divergence <= limit:
        return (
            f"its answers differ from the adapter's by a KL divergence of {proof.divergence:.2g}, "
            f"where rounding to {file_type} accounts for about {limit:.2g}"
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
        yield ComparedRow(_text(ids, tokenizer), ids, tuple(trained))


def _text(ids: tuple[int, ...], tokenizer: ChatTokenizer) -> str:
    """Return the text that has these tokens; empty where there is none.

    There is none where text that looks like a special token is no special token in training.
    """
    text = tokenizer.decode(ids)
    if tokenizer.encode(text) == list(ids):
        return text
    # Some decoders drop the space that the tokenizer adds to the first word, but not after a special token.
    runs = groupby(ids, tokenizer.special_ids.__contains__)
    text = "".join(tokenizer.decode(list(run)) for _, run in runs)
    return text if tokenizer.encode(text) == list(ids) else ""


def _strange_rows(tokenizer: ChatTokenizer) -> Iterator[ComparedRow]:
    first = tokenizer.special_tokens.get("bos_token", "") if tokenizer.begins_with_bos else ""
    for text in _STRANGE_TEXTS:
        yield ComparedRow(first + text, tuple(tokenizer.encode(first + text)), ())


def _log_probabilities(session: ChatSession, adapter_name: str, row: ComparedRow) -> torch.Tensor:
    logits = session.logits_at(adapter_name, list(row.ids), list(row.positions))
    return logits.float().log_softmax(-1).cpu()
