"""The reference for comparing exported files: rows of the run's data, and the trained model's answers.

An answer is the model's distribution for the next token at one position of a row. Logits at every compared
position would take gigabytes. :class:`Answers` instead holds the matrix of the model's output layer and the
layer's inputs, which take about a hundredth of that. The logits are recomputed from these, some positions at
a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.chat.loading import chat_tokenizer, load_session
from qlora_tui.chat.session import ChatSession, reported_memory
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.store import GOOD, Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_duration
from qlora_tui.runs.exports import COMPARED_TOKENS
from qlora_tui.training.host import release_gpu_memory

_MAX_ROWS = 200
"""Maximum number of compared rows. docs/export.md states this limit."""
_MAX_TOKENS = 4096
"""Maximum number of tokens of a compared row. Longer rows are cut off."""
_LOGITS = 1 << 25
"""Maximum number of logits that are computed at once. In float32 they take 128 MiB."""
_MAX_DIFFERENCE = 0.01
"""Maximum KL divergence, in nats, between recomputed probabilities and those of the model itself. It allows
for 16-bit rounding.
"""
_REPORT_S = 30.0
"""Maximum seconds without a progress report."""
_STRANGE_TEXTS = (
    "I'm sure they'll say we've been there; DON'T HE'S you're",
    "1 12 123 1234 12345 3.14 1,000,000 x2y3 v1.2.3",
    "def f(x):\n\tif x:\n        return {'a': [1, 2]}\n\n\nprint(f(0))  # end \n",
    "a  b   c    d     e\t\tf \t g \n h",
    "我想在apple工作。こんにちは、世界！한국어",
    "Привет, мир! École française, straße",
    "🚀 fooBar FooBARBaz_HTTPServer ======= ...!!! https://example.org/a?b=c&d#e",
)
"""Texts that reveal wrong rules of a tokenizer."""

StatusFn = Callable[[str], None]


@dataclass(frozen=True)
class ComparedRow:
    """One conversation, and the positions at which its next-token logits are compared."""

    text: str
    """The rendered conversation; empty if its tokens are not compared."""
    ids: tuple[int, ...]
    """Token ids from our tokenizer."""
    positions: tuple[int, ...] = ()
    """Indices in ``ids`` whose logits predict a trained token, ascending."""

    @property
    def computed_ids(self) -> tuple[int, ...]:
        """The token ids up to the last compared position."""
        return self.ids[: self.positions[-1] + 1] if self.positions else ()


@dataclass(frozen=True)
class Answers:
    """The trained model's next-token probabilities at the compared positions, on the CPU.

    Logits are ``inputs`` times ``matrix`` times ``scale``, and then capped. Inputs and matrix have the
    model's own dtype, so nothing is rounded.
    """

    inputs: tuple[Tensor, ...]
    """Inputs (positions, width) of the output layer, for each row with compared positions."""
    matrix: Tensor
    """Matrix (width, vocabulary) of the output layer, including the adapter."""
    scale: float
    softcap: float
    """Bound c if the model limits logits to c·tanh(x/c); 0 if it does not."""

    @property
    def at_once(self) -> int:
        """Number of positions whose logits are computed at once."""
        return max(1, _LOGITS // self.matrix.shape[1])

    def log_probabilities(self, row: int) -> Iterator[Tensor]:
        """Yield float32 log probabilities (positions, vocabulary) at a row's positions, in order, for at most
        ``at_once`` positions at a time.
        """
        for inputs in torch.split(self.inputs[row], self.at_once):
            blocks = torch.split(self.matrix, max(1, _LOGITS // self.matrix.shape[0]), dim=1)
            logits = torch.cat([inputs.float() @ block.float() for block in blocks], dim=1) * self.scale
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            yield logits.log_softmax(-1)


@dataclass(frozen=True)
class Reference:
    """What exported files are compared with: rows, the trained model's answers, chat template and special
    tokens.
    """

    rows: tuple[ComparedRow, ...]
    strange: tuple[ComparedRow, ...]
    """Texts that reveal wrong rules of a tokenizer. Only their tokens are compared."""
    answers: Answers
    """The trained model's answers at the rows' positions."""
    end_ids: tuple[int, ...]
    """Tokens that end a turn."""
    first_tokens: tuple[int, ...]
    """Tokens that begin every text: the BOS token, or none."""
    template: str
    """The chat template that the conversations were rendered with."""
    effect: float
    """Mean KL(trained model ‖ base) in nats, which measures how much the adapter changes the answers."""
    trained: int
    """Number of trained tokens in all rows. Some of them may not be compared."""

    @property
    def computed_rows(self) -> list[ComparedRow]:
        """The rows with compared positions."""
        return [row for row in self.rows if row.positions]

    def divergence(self, session: ChatSession, adapter_name: str, on_status: StatusFn, words: str) -> float:
        """Return the mean KL divergence, in nats, between the trained model and the session's model.

        The adapter is active in both. Raises UserError if memory is too small.
        """
        total, positions = 0.0, 0
        rows = self.computed_rows
        report = row_progress(on_status, words)
        for number, row in enumerate(rows):
            inputs, _ = _head_inputs(session, adapter_name, row)
            parts = torch.split(inputs, self.answers.at_once)
            for part, expected in zip(parts, self.answers.log_probabilities(number), strict=True):
                actual = session.head.logits(part).log_softmax(-1).cpu()
                total += float(kl_divergence(expected, actual).sum())
            positions += len(inputs)
            report(number + 1, len(rows))
        return total / positions


def reference_answers(
    source: ChatSource, adapter_name: str, on_status: StatusFn, tokens: int = COMPARED_TOKENS
) -> Reference:
    """Compute the answers that files are compared with.

    Answers are computed at the trained positions of as many rows as have about ``tokens`` tokens in total.
    Raises UserError if the model or the run's data cannot be read, if the data has no trained token, or if
    memory is too small.
    """
    words = "Computing the trained model's answers for the comparison"
    on_status(words)
    tokenizer = chat_tokenizer(source, model_folder(source.recipe, on_status))
    rows, trained = compared_rows(_samples(source, tokenizer), tokenizer, tokens)
    if not trained:
        raise UserError(
            "There is nothing to compare the file with",
            what="No row of the run's data has a token that the model is trained on.",
            fix="Compare answers in the chat instead.",
        )
    first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    begins = tokenizer.begins_with_bos and all(row.ids[:1] == first for row in rows)
    begin = tokenizer.special_tokens.get("bos_token", "") if tokenizer.begins_with_bos else ""
    computed = [row for row in rows if row.positions]
    answers, effect = _compute(source, adapter_name, computed, on_status, words)
    return Reference(
        rows=rows,
        strange=tuple(
            ComparedRow(begin + text, tuple(tokenizer.encode(begin + text))) for text in _STRANGE_TEXTS
        ),
        answers=answers,
        end_ids=tokenizer.turn_end_ids,
        first_tokens=first if begins else (),
        template=tokenizer.template.text,
        effect=effect,
        trained=trained,
    )


def reference_or_reason(
    source: ChatSource, adapter_name: str, on_status: StatusFn, tokens: int
) -> Reference | str:
    """Return the reference for comparing files, or the reason why there is none."""
    try:
        return reference_answers(source, adapter_name, on_status, tokens)
    except UserError as error:
        return reason_of(error)


def reason_of(error: UserError) -> str:
    """Return an error as text for the end of a sentence."""
    return f"{error.title}: {error.what}".rstrip(".")


def _compute(
    source: ChatSource, adapter_name: str, rows: Sequence[ComparedRow], on_status: StatusFn, words: str
) -> tuple[Answers, float]:
    """Return the trained model's answers, and the mean KL(trained model ‖ base) in nats. Raises UserError."""
    session = load_session(source, on_status)
    session.ensure_loaded(adapter_name)
    report = row_progress(on_status, words)
    answers: Answers | None = None
    inputs: list[Tensor] = []
    effect = 0.0
    for number, row in enumerate(rows, 1):
        own, logits = _head_inputs(session, adapter_name, row)
        inputs.append(own.cpu())
        if answers is None:
            matrix = torch.cat([block.cpu() for block in session.head.matrix(own)])
            answers = Answers((inputs[0],), matrix, session.head.scale, session.head.softcap)
            _require_same(next(answers.log_probabilities(0))[:1], logits)
        effect += _effect(session, adapter_name, row, own, answers.at_once)
        report(number, len(rows))
    assert answers is not None
    del session
    # A run may start during the export.
    release_gpu_memory()
    positions = sum(len(row.positions) for row in rows)
    return Answers(tuple(inputs), answers.matrix, answers.scale, answers.softcap), effect / positions


def _require_same(computed: Tensor, logits: Tensor) -> None:
    """Raise UserError if recomputed log probabilities (1, vocabulary) differ, beyond rounding, from those of
    the model's own ``logits`` (vocabulary,).
    """
    expected = logits.float().log_softmax(-1).cpu()[None]
    # Written so that NaN counts as a difference.
    if not float(kl_divergence(expected, computed)) <= _MAX_DIFFERENCE:
        raise UserError(
            "The answers cannot be compared",
            what="The model does not compute its logits from its output layer's matrix alone.",
            fix="Compare answers in the chat instead, and report the problem.",
        )


def _effect(
    session: ChatSession, adapter_name: str, row: ComparedRow, trained: Tensor, at_once: int
) -> float:
    """Return the sum of KL(trained model ‖ base) over a row's positions, in nats. Raises UserError."""
    base, _ = _head_inputs(session, BASE, row)
    total = 0.0
    for ours, theirs in zip(torch.split(trained, at_once), torch.split(base, at_once), strict=True):
        # The adapter may also change the output layer.
        session.activate(BASE)
        actual = session.head.logits(theirs).log_softmax(-1)
        session.activate(adapter_name)
        total += float(kl_divergence(session.head.logits(ours).log_softmax(-1), actual).sum())
    return total


def _head_inputs(session: ChatSession, adapter_name: str, row: ComparedRow) -> tuple[Tensor, Tensor]:
    """Return the output layer's inputs at a row's positions, and the model's logits at the first position.
    Raises UserError.
    """
    with reported_memory(session.compute_device):
        return session.head_inputs(adapter_name, list(row.computed_ids), list(row.positions))


def kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """Return KL(expected ‖ actual) of each row, in nats, from log probabilities (rows, vocabulary).

    For example, expected (1/2, 1/2) and actual (1/4, 3/4) give ½·ln 2 + ½·ln ⅔ = 0.144.
    """
    return (expected.exp() * (expected - actual)).sum(-1)


def row_progress(on_status: StatusFn, words: str) -> Callable[[int, int], None]:
    """Return a function that reports the number of rows done, the total number, and the time left.

    It reports after each tenth of the rows, and when the last report was at least 30 s ago.
    """
    began = reported_at = time.monotonic()
    tenths = 0

    def report(done: int, total: int) -> None:
        nonlocal tenths, reported_at
        now = time.monotonic()
        if done * 10 // total == tenths and now - reported_at < _REPORT_S:
            return
        tenths, reported_at = done * 10 // total, now
        left = format_duration((now - began) * (total - done) / done)
        on_status(f"{words}: row {done} of {total}" + (f", {left} left" if done < total else ""))

    return report


def compared_rows(
    samples: Samples, tokenizer: ChatTokenizer, tokens: int
) -> tuple[tuple[ComparedRow, ...], int]:
    """Return rows spread over the samples, and the number of their trained tokens.

    Some of the rows, with about ``tokens`` tokens in total, are compared at every trained position. For the
    other rows, only the tokenization of their text is compared.
    """
    count = min(len(samples), _MAX_ROWS)
    numbers = [place * len(samples) // count for place in range(count)]
    ids = [tuple(samples.token_ids(number)[: min(_MAX_TOKENS, tokens)]) for number in numbers]
    masks = [samples.loss_mask(number) for number in numbers]
    # Indices whose next token is trained.
    trained = [[place for place in range(len(mask) - 1) if mask[place + 1]] for mask in masks]
    computed = max(1, min(count, tokens * count // max(1, sum(map(len, ids)))))
    chosen = {place * count // computed for place in range(computed)}
    rows = tuple(
        ComparedRow(
            _text(row, tokenizer),
            row,
            tuple(position for position in positions if place in chosen and position < len(row) - 1),
        )
        for place, (row, positions) in enumerate(zip(ids, trained, strict=True))
    )
    return rows, sum(map(len, trained))


def _samples(source: ChatSource, tokenizer: ChatTokenizer) -> Samples:
    """Return the run's validation rows, or its training rows if it has none."""
    prepared = prepare_dataset(source.recipe, tokenizer)
    return (prepared.validation if len(prepared.validation) else prepared.train).of_side(GOOD)


def _text(ids: tuple[int, ...], tokenizer: ChatTokenizer) -> str:
    """Return a text that is tokenized to these ids; empty if there is none.

    For example, there is none if a row contains the text of a special token, which training encoded as
    ordinary text.
    """
    text = tokenizer.decode(ids)
    if tokenizer.encode(text) == list(ids):
        return text
    # Some decoders drop the space that the tokenizer adds to the first word, except after a special token.
    runs = groupby(ids, tokenizer.special_ids.__contains__)
    text = "".join(tokenizer.decode(list(run)) for _, run in runs)
    return text if tokenizer.encode(text) == list(ids) else ""
