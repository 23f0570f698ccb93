"""What exported files are compared with: validation rows, and the trained model's answers to them.

Logits at every trained position would take gigabytes. ``answer_files`` stores the inputs of the model's
output layer, hundredths of that, and the layer's matrix, from which any program computes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import ChatSession, chat_tokenizer, model_folder
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.render import prompt_text
from qlora_tui.data.store import GOOD, Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.answer_files import (
    delete_answers,
    head_inputs,
    head_parts,
    row_progress,
    store_answers,
)
from qlora_tui.export.journal import Journal
from qlora_tui.export.llama_cpp.jobs import ComparedPrompt, ComparedRow, StoredAnswers
from qlora_tui.export.llama_cpp.stored_answers import AnswerReader, kl_divergence
from qlora_tui.export.ollama_template import sample_conversations
from qlora_tui.runs.exports import COMPARED_TOKENS

_MAX_ROWS = 200
"""Most validation rows whose tokens are compared; docs/export.md states this and the next limit."""
_MAX_TOKENS = 4096
"""Most tokens of a row."""
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
        computed = [row for row in self.rows if row.positions]
        report = row_progress(on_status, words)
        for number, row in enumerate(computed, 1):
            inputs, _ = head_inputs(session, adapter_name, row)
            for part in head_parts(inputs, self.answers.vocabulary):
                expected = reader.log_probabilities(start, start + len(part))
                actual = session.head.logits(part).log_softmax(-1).cpu().numpy()
                total += float(kl_divergence(expected, actual).sum())
                start += len(part)
            report(number, len(computed))
        return total / start


def reference_bytes(source: ChatSource, tokens: int) -> int:
    """Return the most bytes that the files of answers take where at most ``tokens`` are compared."""
    model = resolve_model(source.recipe.model.id).architecture
    longest = min(_MAX_TOKENS, source.recipe.data.max_length)
    return 4 * model.hidden_size * (min(tokens, _MAX_ROWS * longest) + model.vocab_size)


@contextmanager
def reference_answers(
    source: ChatSource,
    adapter_name: str,
    journal: Journal,
    on_status: StatusFn,
    tokens: int = COMPARED_TOKENS,
) -> Iterator[Reference]:
    """Compute the answers to compare files with; their files in the journal's folder are deleted afterwards.

    What the journal knows to be complete is not computed again; a cancel leaves the files. ``tokens`` is the
    most whose answers are computed. Raises UserError where the model or the run's data cannot be read, or
    memory is too small.
    """
    words = "Computing the trained model's answers to compare with"
    on_status(words)
    try:
        tokenizer = chat_tokenizer(source, model_folder(source.recipe, on_status))
        rows, trained = compared_rows(_samples(source, tokenizer), tokenizer, tokens)
        if not trained:
            raise UserError(
                "There is nothing to compare the file with",
                what="No row of the run's data has a token that is trained.",
                fix="Compare answers in the chat instead.",
            )
        first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        begins = tokenizer.begins_with_bos and all(row.ids[:1] == first for row in rows)
        answers, effect = store_answers(source, adapter_name, rows, journal, on_status, words)
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
    except Exception:
        delete_answers(journal.folder)
        raise
    delete_answers(journal.folder)


def reference_or_reason(
    stack: ExitStack,
    source: ChatSource,
    adapter_name: str,
    journal: Journal,
    on_status: StatusFn,
    tokens: int,
) -> Reference | str:
    """Return what the files are compared with, or why there is nothing."""
    try:
        return stack.enter_context(reference_answers(source, adapter_name, journal, on_status, tokens))
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
    return (prepared.validation if len(prepared.validation) else prepared.train).of_side(GOOD)


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
