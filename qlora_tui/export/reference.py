"""What exported files are compared with: validation rows, and the trained model's answers to them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.chat.session import ChatSession, every_tenth, load_session, out_of_memory
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.render import prompt_text
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.jobs import ComparedPrompt, ComparedRow
from qlora_tui.export.ollama_template import sample_conversations

_MAX_ROWS = 200
"""Most validation rows whose tokens are compared; docs/export.md states this and the next limits."""
_MAX_TOKENS = 1024
"""Most tokens of a row."""
_MAX_COMPUTED_TOKENS = 16_384
"""Most tokens whose logits are computed; of further rows only the tokens are compared."""
_MAX_MULTIPLICATIONS = 2 * 10**13
"""Of each model, tokens times weights: minutes on a CPU."""
_MAX_BYTES = 640 * 2**20
"""Most bytes of the file of log-probabilities: 6,800 positions of 49,152 tokens, 1,280 of 262,144."""
_MAX_ROW_BYTES = 128 * 2**20
"""Most bytes of a row's: its logits are in memory in float32, several times."""
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
    """Rows, and the logits of base and adapter at their trained positions."""

    rows: tuple[ComparedRow, ...]
    strange: tuple[ComparedRow, ...]
    """Texts in which wrong rules of a tokenizer show, compared by their tokens only."""
    prompts: tuple[ComparedPrompt, ...]
    """Conversations, rendered by the chat template."""
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

    def divergence(self, session: ChatSession, adapter_name: str, on_status: StatusFn, words: str) -> float:
        """Return the mean KL divergence of another loaded model with the adapter, in nats.

        Raises UserError where memory is too small.
        """
        count = sum(len(row.positions) for row in self.rows)
        reference = np.memmap(self.path, np.float16, "r", shape=(count, self.vocabulary))
        total, start = 0.0, 0
        for row in _computed(self.rows, on_status, words):
            expected = torch.from_numpy(reference[start : start + len(row.positions)].astype(np.float32))
            start += len(row.positions)
            actual = _log_probabilities(session, adapter_name, row)
            total += float((expected.exp() * (expected - actual)).sum())
        return total / count


def release_gpu_memory() -> None:
    """Return the memory of models that are no longer used to the GPU: a run may start during the export."""
    gc.collect()
    torch.cuda.empty_cache()


def reference_bytes(vocabulary: int) -> int:
    """Return the most bytes that the file of reference logits takes."""
    return min(_MAX_BYTES, _MAX_COMPUTED_TOKENS * _position_bytes(vocabulary))


def _position_bytes(vocabulary: int) -> int:
    return 2 * vocabulary


@contextmanager
def reference_logits(
    source: ChatSource, adapter_name: str, folder: Path, on_status: StatusFn
) -> Iterator[Reference]:
    """Compute the logits to compare files with; the file in ``folder`` is deleted afterwards.

    Raises UserError where the model or the run's data cannot be read, or memory is too small.
    """
    words = "Computing the trained model's answers to compare with"
    on_status(words)
    session = load_session(source, on_status)
    path = folder / "reference.f16"
    try:
        session.ensure_loaded(adapter_name)
        tokenizer = session.tokenizer
        model = resolve_model(source.recipe.model.id).architecture
        rows = compared_rows(_samples(source, tokenizer), tokenizer, model.total_params, model.vocab_size)
        first = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        begins = tokenizer.begins_with_bos and all(row.ids[:1] == first for row in rows)
        vocabulary, effect, count = 0, 0.0, 0
        with path.open("wb") as file:
            for row in _computed(rows, on_status, words):
                values = _log_probabilities(session, adapter_name, row)
                vocabulary = values.shape[-1]
                file.write(values.half().numpy().tobytes())
                base = _log_probabilities(session, BASE, row)
                effect += float((values.exp() * (values - base)).sum())
                count += len(row.positions)
        del session
        release_gpu_memory()
        if not vocabulary:
            raise UserError(
                "There is nothing to compare the file with",
                what="No row of the run's data has a token that is trained.",
                fix="Compare answers in the chat instead.",
            )
        yield Reference(
            rows=rows,
            strange=tuple(_strange_rows(tokenizer)),
            prompts=tuple(_prompts(source, tokenizer)),
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
    stack: ExitStack, source: ChatSource, adapter_name: str, folder: Path, on_status: StatusFn
) -> Reference | str:
    """Return what the files are compared with, or why there is nothing."""
    try:
        return stack.enter_context(reference_logits(source, adapter_name, folder, on_status))
    except UserError as error:
        return reason_of(error)


def reason_of(error: UserError) -> str:
    """Return an error as the end of a sentence."""
    return f"{error.title}: {error.what}".rstrip(".")


def compared_rows(
    samples: Samples, tokenizer: ChatTokenizer, weights: int, vocabulary: int
) -> tuple[ComparedRow, ...]:
    """Return rows from all over the samples, with every trained position of those that are computed.

    Where the file of log-probabilities would be too large for them, each computed row has fewer positions.

    Args:
        weights: how many the model has.
        vocabulary: how many logits it computes at a position.
    """
    count = min(len(samples), _MAX_ROWS)
    numbers = [place * len(samples) // count for place in range(count)]
    ids = [tuple(samples.token_ids(number)[:_MAX_TOKENS]) for number in numbers]
    tokens = min(_MAX_COMPUTED_TOKENS, _MAX_MULTIPLICATIONS // weights)
    computed = max(1, min(count, tokens * count // max(1, sum(map(len, ids)))))
    places = [place * count // computed for place in range(computed)]
    trained = {place: _trained_positions(ids[place], samples.loss_mask(numbers[place])) for place in places}
    limit = _MAX_ROW_BYTES // _position_bytes(vocabulary)
    most = _MAX_BYTES // _position_bytes(vocabulary)
    if sum(min(len(positions), limit) for positions in trained.values()) > most:
        limit = most // computed
    ends = frozenset(tokenizer.turn_end_ids)
    return tuple(
        ComparedRow(_text(row, tokenizer), row, _sample_positions(row, trained.get(place, []), ends, limit))
        for place, row in enumerate(ids)
    )


def _trained_positions(ids: Sequence[int], loss_mask: Sequence[int]) -> list[int]:
    """Return places whose next token is trained."""
    return [place for place in range(len(ids) - 1) if loss_mask[place + 1]]


def _sample_positions(
    ids: Sequence[int], trained: Sequence[int], ends: Collection[int], limit: int
) -> tuple[int, ...]:
    """Return all trained places, or ``limit`` of them: those before a turn end first, then others evenly."""
    before_ends = _spread([place for place in trained if ids[place + 1] in ends], limit)
    others = [place for place in trained if ids[place + 1] not in ends]
    return tuple(sorted([*before_ends, *_spread(others, limit - len(before_ends))]))


def _spread(places: list[int], limit: int) -> list[int]:
    count = min(limit, len(places))
    return [places[number * len(places) // count] for number in range(count)]


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
    """Yield the rows whose logits are compared, and report progress."""
    computed = [row for row in rows if row.positions]
    report = every_tenth(on_status, words)
    for number, row in enumerate(computed, 1):
        yield row
        report(number, len(computed))


def _log_probabilities(session: ChatSession, adapter_name: str, row: ComparedRow) -> torch.Tensor:
    """Return log-probabilities at the row's positions, (positions, vocabulary), float32. Raises UserError."""
    try:
        logits = session.logits_at(adapter_name, list(row.computed_ids), list(row.positions))
        return logits.float().log_softmax(-1).cpu()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(session.compute_device) from error
