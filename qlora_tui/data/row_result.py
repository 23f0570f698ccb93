"""The result of one row, processed independently: read, rendered, truncated and checked.

``dataset_scan`` adds, in file order, results that depend on other rows (duplicates, counts, split), and runs
the functions here in other processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.dataset_report import Counts
from qlora_tui.data.problems import LongText, estimated_long_text
from qlora_tui.data.read import row_of
from qlora_tui.data.render import RenderOptions, render_many
from qlora_tui.data.row import Line, Row, rough_bytes
from qlora_tui.data.samples import TokenizedSample, last_samples, sides_of, truncate
from qlora_tui.data.sources import SourceFile, conversation_of
from qlora_tui.data.split import group_key, minhash_sketch
from qlora_tui.data.template_capabilities import has_reasoning
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.preference_methods import PAIR_METHODS
from qlora_tui.recipe.schema import Data

Finding = tuple[str, str]
"""Kind and example of a finding."""


_FIRST_BATCH_ROWS = 32
_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20
"""Number of bytes of text at which a batch ends, to limit the memory for long rows."""


class Batch(Struct, frozen=True):
    """Rows of one file that are processed together."""

    file: SourceFile
    rows: list[Row | Line]
    sketched: bool
    """Whether sketches are needed (see ``split``)."""


def batches(file: SourceFile, rows: Iterable[Row | Line], sketched: Callable[[], bool]) -> Iterator[Batch]:
    """Yield rows in batches: small ones first, so that the first results appear at once."""
    max_rows, batch, size = _FIRST_BATCH_ROWS, list[Row | Line](), 0
    for row in rows:
        batch.append(row)
        size += len(row.text) if isinstance(row, Line) else rough_bytes(row.value)
        if len(batch) >= max_rows or size >= _BATCH_BYTES:
            yield Batch(file, batch, sketched())
            max_rows, batch, size = min(2 * max_rows, _BATCH_ROWS), [], 0
    if batch:
        yield Batch(file, batch, sketched())


class RowResult(Struct, frozen=True):
    """The result of one row."""

    row: int
    is_rejected: bool = False
    """Whether the row cannot give a sample, whatever the length limit; its last finding says why."""
    key: int | None = None
    """Key, equal for rows with equal content (see ``split.group_key``); None without a conversation."""
    findings: tuple[Finding, ...] = ()
    """Findings on the conversation and its samples, and on how the length limit changed them."""
    notes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    """Number of tokens in each sample before truncation; without a tokenizer, the number of characters of the
    conversation.
    """
    samples: tuple[TokenizedSample, ...] = ()
    """The samples to train on; empty if the length limit leaves none, or samples are not requested."""
    counts: Counts | None = None
    """Counts to add to those of all rows; None for a rejected row."""
    long_text: LongText | None = None
    """The size of a plain text that exceeds the length limit and is not split."""
    sketch: bytes = b""


class RowProcessor:
    """Processes rows with the settings of a recipe. It is pickled and sent to the worker processes."""

    def __init__(self, data: Data, tokenizer: ChatTokenizer | None, seed: int = 0, keep_samples: bool = True):
        """Set up the processing; without a tokenizer rows are only read and checked, and give no samples."""
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._keep_samples = keep_samples

    def process(self, batch: Batch) -> list[RowResult]:
        """Return one result for each row, in order. Blank lines have no result."""
        rows = list(filter(None, map(row_of, batch.rows)))
        read = [conversation_of(row, batch.file) for row in rows]
        usable = [one for one in read if isinstance(one, Conversation)]
        sides = [each for one in usable for each in (one, *one.rejected)]
        rendered: Iterator[list[TokenizedSample] | RowRejectedError] = ([] for _ in sides)
        if self._tokenizer is not None:
            rendered = render_many(sides, self._tokenizer, RenderOptions.of(self._data))
        return [
            RowResult(row.number, True, findings=(*row.warnings, (one.kind, one.reason)))
            if isinstance(one, RowRejectedError)
            else self._row_result(
                one, [next(rendered) for _ in (one, *one.rejected)], batch.sketched, row.warnings
            )
            for row, one in zip(rows, read, strict=True)
        ]

    def _row_result(
        self,
        conversation: Conversation,
        sides: Sequence[list[TokenizedSample] | RowRejectedError],
        sketched: bool,
        warnings: tuple[Finding, ...],
    ) -> RowResult:
        """Return the result of a row from the samples of its conversation, and of its rejected answers."""
        result = RowResult(
            conversation.row,
            key=group_key(conversation, self._seed),
            findings=(*warnings, *conversation_findings(conversation)),
            sketch=minhash_sketch(conversation).tobytes() if sketched else b"",
        )
        rendered: list[list[TokenizedSample]] = []
        for side in sides:
            if isinstance(side, RowRejectedError):
                why = side.kind, side.reason
                return replace(result, is_rejected=True, findings=(*result.findings, why))
            rendered.append(side)
        if self._tokenizer is not None:
            return self._measured(result, conversation, rendered, self._tokenizer)
        if conversation.messages and not conversation.answers and self._data.train_on == "assistant":
            no_answer = "no-answer", "No assistant turn is in the loss."
            return replace(result, is_rejected=True, findings=(*result.findings, no_answer))
        characters = sum(len(m.content) + len(m.reasoning) for m in conversation.messages)
        return replace(
            result,
            notes=("reasoning-present",) if has_reasoning(conversation.messages) else (),
            lengths=(len(conversation.text) + characters,),
            long_text=estimated_long_text(conversation, self._data),
            counts=Counts(conversations=1),
        )

    def _measured(
        self,
        result: RowResult,
        conversation: Conversation,
        rendered: list[list[TokenizedSample]],
        tokenizer: ChatTokenizer,
    ) -> RowResult:
        """Return the result with the samples that fit the length limit, and the findings on them."""
        method, counts, long_text = self._data.preferences, Counts(), None
        whole = rendered[0]
        problems = list(sample_findings(tokenizer, conversation, whole, self._data.train_on))
        if method != "refuse" and method != "chosen":
            whole = last_samples(conversation, rendered)
            samples = sides_of(conversation, self._fitted_sides(result.row, whole, problems, counts), method)
        else:
            samples = [
                part for sample in whole for part in self._truncate(result.row, sample, problems, counts)
            ]
            long_text = self._long_text(whole[0], samples) if conversation.text else None
        if conversation.text and (long_text is not None or self._data.overflow == "split"):
            problems = [finding for finding in problems if finding[0] not in ("too-long", "nothing-left")]
        counts.samples = len(samples) // 2 if method in PAIR_METHODS else len(samples)
        counts.conversations = int(counts.samples > 0)
        counts.tokens = sum(len(sample.token_ids) for sample in samples)
        counts.trained_tokens = sum(sample.trained_count for sample in samples)
        return replace(
            result,
            findings=(*result.findings, *problems),
            notes=whole[0].notes,
            lengths=tuple(len(sample.token_ids) for sample in whole),
            samples=tuple(samples) if self._keep_samples else (),
            counts=counts,
            long_text=long_text,
        )

    def _long_text(self, sample: TokenizedSample, fitted: list[TokenizedSample]) -> LongText | None:
        """Describe a plain text that is cut or dropped; None if the text fits or is split."""
        assert self._tokenizer is not None
        length = len(sample.token_ids)
        if length <= self._data.max_length or self._data.overflow == "split":
            return None
        split = truncate(sample, self._data.max_length, "split", self._tokenizer.bos_id)
        return LongText(length, len(split), sum(len(part.token_ids) for part in fitted))

    def _fitted_sides(
        self,
        row: int,
        sides: Sequence[TokenizedSample],
        sample_problems: list[Finding],
        counts: Counts,
    ) -> list[TokenizedSample | None]:
        """Return, for each side of a preference row, the part that fits the length limit; None if nothing to
        learn is left of it.

        Adds the cut and dropped pairs, or rated answers, to ``counts``, and reports the row once.
        """
        assert self._tokenizer is not None
        limit = self._data.max_length
        parts = [truncate(side, limit, self._data.overflow, self._tokenizer.bos_id) for side in sides]
        fitted = [part[0] if part else None for part in parts]
        is_over = [len(side.token_ids) > limit for side in sides]
        if self._data.preferences in PAIR_METHODS:
            compared = [(0, other) for other in range(1, len(sides))]
        else:
            compared = [(number, number) for number in range(len(sides))]
        lost = [fitted[one] is None or fitted[other] is None for one, other in compared]
        over = [is_over[one] or is_over[other] for one, other in compared]
        counts.dropped += sum(lost)
        counts.cut += sum(long and not gone for long, gone in zip(over, lost, strict=True))
        if any(is_over):
            kind = "nothing-left" if any(lost) and self._data.overflow != "drop" else "too-long"
            sample_problems.append((kind, self._over_limit(row, max(len(side.token_ids) for side in sides))))
        return fitted

    def _over_limit(self, row: int, length: int) -> str:
        over = length - self._data.max_length
        return f"Row {row} has {length:,} tokens, {over:,} over the limit."

    def _truncate(
        self, row: int, sample: TokenizedSample, sample_problems: list[Finding], counts: Counts
    ) -> list[TokenizedSample]:
        """Return the samples that fit the length limit; updates ``sample_problems`` and ``counts``."""
        assert self._tokenizer is not None
        limit, overflow = self._data.max_length, self._data.overflow
        length = len(sample.token_ids)
        fitted = truncate(sample, limit, overflow, self._tokenizer.bos_id)
        if length > limit:
            kind = "too-long" if fitted or overflow == "drop" else "nothing-left"
            sample_problems.append((kind, self._over_limit(row, length)))
        if not fitted:
            counts.dropped += 1
        elif length > limit:
            counts.split += overflow == "split"
            counts.cut += overflow != "split"
        return fitted


_ALLOWED_AFTER: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("assistant", "tool"),
}

_CALL_MARKS = ("<tool_call>", "<functioncall>", "<function_call>", "<function=", "[TOOL_CALLS]")

_CONTROL_CHARACTERS = "[\\x00-\\x08\\x0b\\x0e-\\x1f]"
"""Control characters that text does not need."""
_CONTROL = re.compile(_CONTROL_CHARACTERS)
_DAMAGE = re.compile(
    "\ufffd"  # character that decoders write for invalid bytes
    "|\u00c3[\u0080-\u00bf\u0192\u201a\u2030\u0152\u0160\u0161\u0153]"  # Ã©: UTF-8 read as Latin-1
    "|\u00e2\u20ac[\u2122\u0153\u009d\u201c\u201d\u02dc\u00a6\u00a2]"  # â€™: the same for quotes and dashes
    "|\u00c2[\u00a0-\u00bf](?![\u00c0-\u024f])"  # Â°
    "|" + _CONTROL_CHARACTERS
)

_SECRETS = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    r"|\bgithub_pat_[A-Za-z0-9_]{50,}\b"
    r"|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{20,}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
)
_SECRET_MARKS = (
    *("-----BEGIN", "AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    *("hf_", "sk-", "xox", "AIza", "eyJ"),
)
"""Substrings of which every secret contains one.

Searching for them is a hundred times faster than matching the pattern.
"""
_SECRET_MARKS_WITHOUT_LINE = tuple(mark for mark in _SECRET_MARKS if "_" not in mark)
_SECRET_SHOWN_CHARACTERS = 6


def conversation_findings(conversation: Conversation) -> Iterator[Finding]:
    """Yield the findings on a conversation that need no tokenizer."""
    disorder = _disorder(conversation)
    if disorder:
        yield "role-order", disorder
    for number, message in enumerate(conversation.messages, 1):
        if message.role == "assistant" and not (
            message.content.strip() or message.tool_calls or message.reasoning
        ):
            yield "empty-answer", f"Turn {number} is empty."
            break
    if conversation.messages and conversation.messages[-1].role == "user":
        yield "ends-with-user", f"Turn {len(conversation.messages)}, the last, is the user's."
    text = conversation.text or "\n".join(m.content for m in conversation.messages)
    damage = (_CONTROL if text.isascii() else _DAMAGE).search(text)
    if damage:
        yield "encoding-damage", text[max(0, damage.start() - 30) : damage.end() + 30]
    marks = _SECRET_MARKS if "_" in text else _SECRET_MARKS_WITHOUT_LINE
    secret = _SECRETS.search(text) if any(map(text.__contains__, marks)) else None
    if secret:
        yield "secret", f"{secret[0][:_SECRET_SHOWN_CHARACTERS]}… ({len(secret[0])} characters)"


def sample_findings(
    tokenizer: ChatTokenizer, conversation: Conversation, rendered: Sequence[TokenizedSample], train_on: str
) -> Iterator[Finding]:
    """Yield the findings on the samples of a conversation, before any truncation."""
    notes = rendered[0].notes
    if "control-tokens" in notes:
        yield "control-tokens", _control_token(tokenizer, conversation)
    if "answer-changed" in notes:
        yield "answer-changed", conversation.answers[-1].content if conversation.answers else ""
    for sample in rendered:
        ids = sample.token_ids
        if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id, tokenizer.bos_id]:
            yield "double-bos", tokenizer.decode(ids[:8])
        if train_on != "assistant" or not conversation.messages:
            continue
        if 0 not in sample.loss_mask:
            yield "everything-trained", tokenizer.decode(ids[:60])
        if 1 in sample.loss_mask and not _ends_in_the_loss(tokenizer, sample):
            end = tokenizer.turn_end_ids[-1] if tokenizer.turn_end_ids else None
            kind = "pad-hides-end" if end is not None and end == tokenizer.pad_id else "turn-end-untrained"
            yield kind, tokenizer.decode(ids[-20:])


def _disorder(conversation: Conversation) -> str:
    """Return a description of the first turn that is out of order; empty if there is none."""
    before = ""
    for number, message in enumerate(conversation.messages, 1):
        if message.role not in _ALLOWED_AFTER[before]:
            shown = "a tool call" if before == "call" else before or "nothing"
            return f"Turn {number} is {message.role}, after {shown}."
        before = "call" if _calls(message) else message.role
    return ""


def _calls(message: Message) -> bool:
    """Return whether a turn calls a tool, even in its text, as in the Hermes and Glaive data sets."""
    return bool(message.tool_calls) or (
        message.role == "assistant" and any(mark in message.content for mark in _CALL_MARKS)
    )


def _ends_in_the_loss(tokenizer: ChatTokenizer, sample: TokenizedSample) -> bool:
    """Return whether the last span in the loss ends with a special token, ignoring white space."""
    last = sample.loss_mask.rindex(1)
    first = sample.loss_mask.rfind(b"\x00", 0, last) + 1
    for token in reversed(sample.token_ids[first : last + 1]):
        if token in tokenizer.special_ids:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _control_token(tokenizer: ChatTokenizer, conversation: Conversation) -> str:
    for text in (conversation.text, *(m.content for m in conversation.messages)):
        match = tokenizer.control_pattern.search(text)
        if match:
            return text[max(0, match.start() - 40) : match.end() + 40]
    return "(in the tool definitions, a tool call or the reasoning)"
