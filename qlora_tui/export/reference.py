"""What exported files are compared with: validation rows, and the trained model's answers to them.

Logits at every trained position would take gigabytes. Stored are the inputs of the model's output layer,
hundredths of that, and the layer's matrix, from which any program computes the logits again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.chat.session import ChatSession, load_session, out_of_memory
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.render import prompt_text
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.jobs import ComparedPrompt, ComparedRow, StoredAnswers
from qlora_tui.export.llama_cpp.stored_answers import (
    AnswerReader,
    Floats,
    kl_divergence,
    positions_at_once,
)
from qlora_tui.export.ollama_template import sample_conversations
from qlora_tui.formatting import format_duration
from qlora_tui.runs.exports import COMPARED_TOKENS

_MAX_ROWS = 200
"""Most validation rows whose tokens are compared; docs/export.md states this and the next limit."""
_MAX_TOKENS = 4096
"""Most tokens of a row."""
_MAX_DIFFERENCE = 0.01
"""Most by which stored answers may differ from the model's own, as KL divergence in nats: 16-bit rounding."""
_REPORT_S = 30.0
"""Longest time without a report of progress, in seconds."""
_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
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

StatusFn = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """Rows, and what base and adapter answer at their trained positions."""

    rows: tuple[ComparedRow, ...]
    strange: tuple[ComparedRow, ...]
    """Texts in which wrong rules of a tokenizer show, compared by their tokens only."""
    prompts: tuple[ComparedPrompt, ...]
    """Conversations, rendered by the chat template."""
    answers: StoredAnswers
    """The trained model's answers at the rows' positions."""
    end_ids: tuple[int, ...]
    """Tokens that end a turn."""
    first_tokens: tuple[int, ...]
    """Tokens that begin every text: the begin token, or none."""
    template: str
    """The chat template that the conversations were rendered with."""
    effect: float
    """Mean KL(trained model ‖ base), in nats: how much the adapter changes."""
    trained: int
    """Trained tokens of all rows, of which some may not be compared."""

    def divergence(self, session: ChatSession, adapter_name: str, on_status: StatusFn, words: str) -> float:
        """Return the mean KL divergence of another loaded model with the adapter, in nats.

        Raises UserError where memory is too small.
        """
        reader = AnswerReader(self.answers)
        total, start = 0.0, 0
        for row in _computed(self.rows, on_status, words):
            inputs, _ = _head_inputs(session, adapter_name, row)
            for part in _parts(inputs, self.answers.vocabulary):
                expected = reader.log_probabilities(start, start + len(part))
                actual = session.head.logits(part).log_softmax(-1).cpu().numpy()
                total += float(kl_divergence(expected, actual).sum())
                start += len(part)
        return total / start


def release_gpu_memory() -> None:
    """Return the memory of models that are no longer used to the GPU: a run may start during the export."""
    gc.collect()
    torch.cuda.empty_cache()


def reference_bytes(source: ChatSource, tokens: int) -> int:
    """Return the most bytes that the files of answers take where at most ``tokens`` are compared."""
    model = resolve_model(source.recipe.model.id).architecture
    longest = min(_MAX_TOKENS, source.recipe.data.max_length)
    return 4 * model.hidden_size * (min(tokens, _MAX_ROWS * longest) + model.vocab_size)


@contextmanager
def reference_answers(
    source: ChatSource,
    adapter_name: str,
    folder: Path,
    on_status: StatusFn,
    tokens: int = COMPARED_TOKENS,
) -> Iterator[Reference]:
    """Compute the answers to compare files with; their files in ``folder`` are deleted afterwards.

    ``tokens`` is the most whose answers are computed. Raises UserError where the model or the run's data
    cannot be read, or memory is too small.
    """
    words = "Computing the trained model's answers to compare with"
    on_status(words)
    session = load_session(source, on_status)
    matrix, inputs = folder / "reference.matrix", folder / "reference.inputs"
    try:
        session.ensure_loaded(adapter_name)
        tokenizer = session.tokenizer
        rows, trained = compared_rows(_samples(source, tokenizer), tokenizer, tokens)
        if not trained:
            raise UserError(
                "There is nothing to compare the file with",
                what="No row of the run's data has a token that is trained.",
                fix="Compare answers in the chat instead.",
            )
        first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        begins = tokenizer.begins_with_bos and all(row.ids[:1] == first for row in rows)
        answers, effect = _store_answers(session, adapter_name, rows, matrix, inputs, on_status, words)
        del session
        release_gpu_memory()
        yield Reference(
            rows=rows,
            strange=tuple(_strange_rows(tokenizer)),
            prompts=tuple(_prompts(source, tokenizer)),
            answers=answers,
            end_ids=tokenizer.turn_end_ids,
            first_tokens=first if begins else (),
            template=tokenizer.template.text,
            effect=effect,
            trained=trained,
        )
    finally:
        matrix.unlink(missing_ok=True)
        inputs.unlink(missing_ok=True)


def _store_answers(
    session: ChatSession,
    adapter_name: str,
    rows: Sequence[ComparedRow],
    matrix: Path,
    inputs: Path,
    on_status: StatusFn,
    words: str,
) -> tuple[StoredAnswers, float]:
    """Write the files of answers; return them and the adapter's effect. Raises UserError and OSError."""
    answers, effect, count = None, 0.0, 0
    with inputs.open("wb") as file:
        for row in _computed(rows, on_status, words):
            trained, logits = _head_inputs(session, adapter_name, row)
            if answers is None:
                answers = _store_matrix(session, trained, matrix, inputs)
            file.write(_bytes(trained))
            if count == 0:
                file.flush()
                _require_same(AnswerReader(answers).log_probabilities(0, 1), logits)
            effect += _effect(session, adapter_name, row, trained, answers.vocabulary)
            count += len(row.positions)
    assert answers is not None
    return answers, effect / count


def _store_matrix(session: ChatSession, like: Tensor, matrix: Path, inputs: Path) -> StoredAnswers:
    """Write the matrix of the output layer with the active adapter. Raises OSError."""
    vocabulary = 0
    with matrix.open("wb") as file:
        for block in session.head.matrix(like):
            vocabulary = block.shape[-1]
            file.write(_bytes(block))
    return StoredAnswers(
        inputs=str(inputs),
        matrix=str(matrix),
        dtype=_DTYPES[like.dtype],
        width=like.shape[-1],
        vocabulary=vocabulary,
        scale=session.head.scale,
        softcap=session.head.softcap,
    )


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


def _parts(inputs: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Yield inputs (positions, width) in parts whose logits fit into memory."""
    count = positions_at_once(vocabulary)
    for start in range(0, len(inputs), count):
        yield inputs[start : start + count]


def _effect(
    session: ChatSession, adapter_name: str, row: ComparedRow, trained: Tensor, vocabulary: int
) -> float:
    """Return the sum of KL(trained model ‖ base) over a row's positions, in nats. Raises UserError."""
    base, _ = _head_inputs(session, BASE, row)
    total = 0.0
    for ours, theirs in zip(_parts(trained, vocabulary), _parts(base, vocabulary), strict=True):
        # The adapter may change the output layer too.
        session.activate(BASE)
        actual = session.head.logits(theirs).log_softmax(-1)
        session.activate(adapter_name)
        expected = session.head.logits(ours).log_softmax(-1)
        total += float((expected.exp() * (expected - actual)).sum())
    return total


def reference_or_reason(
    stack: ExitStack,
    source: ChatSource,
    adapter_name: str,
    folder: Path,
    on_status: StatusFn,
    tokens: int,
) -> Reference | str:
    """Return what the files are compared with, or why there is nothing."""
    try:
        return stack.enter_context(reference_answers(source, adapter_name, folder, on_status, tokens))
    except UserError as error:
        return reason_of(error)


def reason_of(error: UserError) -> str:
    """Return an error as the end of a sentence."""
    return f"{error.title}: {error.what}".rstrip(".")


def compared_rows(
    samples: Samples, tokenizer: ChatTokenizer, tokens: int
) -> tuple[tuple[ComparedRow, ...], int]:
    """Return rows from all over the samples, and how many trained tokens they have.

    Every trained position of as many rows as have ``tokens`` tokens together is compared; of the others only
    how their text is split into tokens.
    """
    count = min(len(samples), _MAX_ROWS)
    numbers = [place * len(samples) // count for place in range(count)]
    ids = [tuple(samples.token_ids(number)[: min(_MAX_TOKENS, tokens)]) for number in numbers]
    trained = [_trained_positions(samples.loss_mask(number)) for number in numbers]
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


def _trained_positions(loss_mask: Sequence[int]) -> list[int]:
    """Return places whose next token is trained."""
    return [place for place in range(len(loss_mask) - 1) if loss_mask[place + 1]]


def _samples(source: ChatSource, tokenizer: ChatTokenizer) -> Samples:
    """Return the run's validation rows; its training rows if it has none."""
    prepared = prepare_dataset(source.recipe, tokenizer)
    return prepared.validation if len(prepared.validation) else prepared.train


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


def _prompts(source: ChatSource, tokenizer: ChatTokenizer) -> Iterator[ComparedPrompt]:
    """Yield the conversations that the template accepts."""
    writes_begin = "bos_token" in tokenizer.template.names
    begin = tokenizer.special_tokens.get("bos_token", "") if writes_begin else ""
    for messages in sample_conversations():
        try:
            text = prompt_text(messages, tokenizer, thinking=source.thinking)
        except RowRejectedError:
            continue
        turns = tuple((message.role, message.content) for message in messages)
        yield ComparedPrompt(turns, text.removeprefix(begin))


def _computed(rows: Sequence[ComparedRow], on_status: StatusFn, words: str) -> Iterator[ComparedRow]:
    """Yield the rows whose answers are compared, and report progress."""
    computed = [row for row in rows if row.positions]
    report = row_progress(on_status, words)
    for number, row in enumerate(computed, 1):
        yield row
        report(number, len(computed))


def row_progress(on_status: StatusFn, words: str) -> Callable[[int, int], None]:
    """Return what reports the rows done, and in all, with the time left: at each tenth, and every 30 s."""
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


def _head_inputs(session: ChatSession, adapter_name: str, row: ComparedRow) -> tuple[Tensor, Tensor]:
    """Return the output layer's inputs at the row's positions, and the logits of the first.

    Raises UserError.
    """
    try:
        return session.head_inputs(adapter_name, list(row.computed_ids), list(row.positions))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(session.compute_device) from error
