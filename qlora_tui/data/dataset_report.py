"""The types of the report on data, the counter of lengths, and the sentences on reasoning.

This module is quick to import, because the app needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct, field

from qlora_tui.data.problems import DataProblem
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Data, Thinking

if TYPE_CHECKING:
    from qlora_tui.data.template_capabilities import Switch, TemplateCapabilities
_BINS = 24


class Bin(Struct, frozen=True):
    """Samples whose length is above the ``up_to`` of the previous bin and at most ``up_to``."""

    up_to: int
    count: int


class Lengths(Struct, frozen=True):
    """Length distribution of the samples, before truncation."""

    unit: str
    """``tokens``, or ``characters`` without a tokenizer."""
    count: int = 0
    mean: float = 0.0
    p50: int = 0
    p90: int = 0
    p99: int = 0
    longest: int = 0
    longest_row: int = 0
    histogram: tuple[Bin, ...] = ()
    within: tuple[tuple[int, int], ...] = ()
    """Lengths of the percentiles and of the longest sample, each with the number of samples up to it."""


class LengthCounter:
    """Collects lengths one at a time."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._counts: Counter[int] = Counter()
        self._longest_row = 0
        self._longest = -1

    def add(self, lengths: Iterable[int], row: int) -> None:
        """Add the lengths of one row's samples."""
        for length in lengths:
            self._counts[length] += 1
            if length > self._longest:
                self._longest, self._longest_row = length, row

    def above(self, limit: int) -> int:
        """Count the samples longer than ``limit``."""
        return sum(count for length, count in self._counts.items() if length > limit)

    def summary(self) -> Lengths:
        """Compute percentiles (nearest rank) and the histogram."""
        if not self._counts:
            return Lengths(self.unit)
        ordered = sorted(self._counts.items())
        total = sum(count for _, count in ordered)
        p50, p90, p99 = (_percentile(ordered, total, percent) for percent in (50, 90, 99))
        return Lengths(
            unit=self.unit,
            count=total,
            mean=sum(length * count for length, count in ordered) / total,
            p50=p50,
            p90=p90,
            p99=p99,
            longest=self._longest,
            longest_row=self._longest_row,
            histogram=_histogram(ordered, p99),
            within=tuple((length, total - self.above(length)) for length in (p50, p90, p99, self._longest)),
        )


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= rank:
            return length
    return ordered[-1][0]


def _histogram(ordered: list[tuple[int, int]], p99: int) -> tuple[Bin, ...]:
    """Return bins of equal width for nearly all samples. A long tail goes into one last bin, since it would
    flatten the other bins.
    """
    longest = ordered[-1][0]
    width = _round_width(min(longest, 1.15 * p99) / (_BINS - 1))
    bins: Counter[int] = Counter()
    for length, count in ordered:
        bins[min(max(0, length - 1) // width, _BINS - 1)] += count
    last = max(bins)
    ends = [(n + 1) * width for n in range(last)]
    ends.append(longest if last == _BINS - 1 else (last + 1) * width)
    return tuple(Bin(end, bins[n]) for n, end in enumerate(ends))


def _round_width(least: float) -> int:
    """Return the smallest readable bin width not below ``least``: 1 to 6 or 8, times a power of ten."""
    power = 1
    while True:
        for digit in (1, 2, 3, 4, 5, 6, 8):
            if digit * power >= least:
                return digit * power
        power *= 10


class Counts(Struct):
    """Counts of rows and samples by outcome."""

    rows: int = 0
    conversations: int = 0
    """Number of rows that give at least one sample; without a tokenizer, of rows that are not rejected."""
    samples: int = 0
    """Number of samples; for a method that compares two answers, number of pairs."""
    tokens: int = 0
    trained_tokens: int = 0
    left_out: int = 0
    """Number of rejected rows, such as empty or bad rows, and rows that the template rejects."""
    dropped: int = 0
    """Samples or pairs that are dropped because they are too long or have no tokens left to learn."""
    cut: int = 0
    split: int = 0
    """Number of samples that were split into several, because they were too long."""
    excluded: int = 0
    """Number of rows that the source excludes (``excluded_rows``), which no other count includes."""

    def add(self, other: Counts) -> None:
        """Add the counts of ``other`` to these."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Piece(Struct, frozen=True):
    """A part of a sample's text for display."""

    text: str
    in_loss: bool = field(name="trained")
    special: bool
    """Whether the piece is a single special token."""


class FileReport(Struct, frozen=True):
    """Format and columns of one file."""

    path: str
    bytes: int
    format: str
    columns: dict[str, str]
    """Column of each part."""
    all_columns: tuple[str, ...]
    evidence: tuple[str, ...]
    last_row: int = 0
    """Number of the last row; 0 until the whole file has been read."""


class Report(Struct, frozen=True):
    """The report on one source, which msgspec can encode as JSON."""

    files: tuple[FileReport, ...]
    complete: bool
    """Whether every row has been read."""
    share: float
    """Share of the bytes that have been read, 0 to 1."""
    counts: Counts
    """Counts, in which tokens and samples are 0 without a tokenizer."""
    lengths: Lengths
    too_long: int
    """Rows with a sample longer than ``max_length``."""
    problems: tuple[DataProblem, ...]
    notes: dict[str, int]
    template: str
    """``tokenizer``, or the name of the stock template in use; empty without a tokenizer."""
    thinking: tuple[str, ...] = ()
    """Sentences on the reasoning in the rows and how the template handles it."""


NO_SUCH_ROW = "no-such-row"
"""Error code for a row number past the end of a file."""


class Shown(Struct, frozen=True):
    """One row as the model sees it."""

    row: int
    samples: tuple[tuple[Piece, ...], ...]
    """Pieces of each sample, nearly always one sample; without the text that truncation removed."""
    token_counts: tuple[int, ...]
    """Number of tokens of each sample before truncation."""
    trained_counts: tuple[int, ...]
    refused: str = ""
    """Why the row gives no sample; empty if it gives one."""
    notes: tuple[str, ...] = ()
    findings: tuple[tuple[str, str], ...] = ()
    """Kind and example of each finding on this row."""
    path: str = ""
    """File that the row is from."""
    trained_texts: tuple[tuple[str, ...], ...] = ()
    """Text of each token in the loss, for each sample.

    The first token of a sample is left out, because it is never predicted.
    """
    sides: tuple[str, ...] = ()
    """The side of each sample, under a preference method: ``chosen``, ``rejected``, ``good`` or ``bad``."""


def thinking_sentences(
    notes: Mapping[str, int], conversations: int, traits: TemplateCapabilities | None, data: Data
) -> tuple[str, ...]:
    """Return up to two sentences, on the reasoning in the data and on the template's thinking switch.

    ``notes`` counts conversations by kind of note, ``conversations`` is their total number. Without a model
    (``traits`` is None), there is at most one sentence, on how many rows have reasoning.
    """
    if traits is None:
        present = notes.get("reasoning-present", 0)
        where = f"{present:,} of {pluralize(conversations, 'row')}"
        return (f"Reasoning: {where}; choose a model to see how it is rendered.",) if present else ()
    left_out = notes.get("reasoning-left-out", 0)
    with_reasoning = notes.get("reasoning-learned", 0) + notes.get("reasoning-read", 0)
    sentences = []
    if with_reasoning or left_out:
        sentences.append(
            _on_reasoning(with_reasoning or left_out, conversations, bool(left_out), notes, data)
        )
    elif traits.thinks and conversations:
        sentences.append(f"Reasoning: in none of {pluralize(conversations, 'row')}.")
    on_switch = _on_switch(notes, with_reasoning, conversations, traits, data)
    return (*sentences, on_switch) if on_switch else tuple(sentences)


def _on_reasoning(rows: int, conversations: int, left_out: bool, notes: Mapping[str, int], data: Data) -> str:
    where = "learned" if data.reasoning_in_loss else "only read"
    text = f"Reasoning: {rows:,} of {pluralize(conversations, 'row')}, {'left out' if left_out else where}"
    split = notes.get("reasoning-split", 0)
    if split:
        text += f"; the template drops it from earlier turns: {pluralize(split, 'row')} split into samples"
    return f"{text}."


def _on_switch(
    notes: Mapping[str, int],
    with_reasoning: int,
    conversations: int,
    traits: TemplateCapabilities,
    data: Data,
) -> str:
    switch = traits.switch
    if switch is None and traits.opens_thought:
        closed = notes.get("thought-closed", 0)
        closing = (
            f"; the block is closed immediately in {pluralize(closed, 'row')} without reasoning"
            if closed
            else ""
        )
        return f"Thinking: the template always opens a thinking block and has no switch{closing}."
    if switch is None:
        no_effect = data.thinking == "on" or (data.thinking == "off" and not notes.get("reasoning-left-out"))
        return (
            f"Thinking: {data.thinking} has no effect, since this template has no switch."
            if no_effect
            else ""
        )
    if not switch.can_turn_off:
        return _on_effort(switch, data)
    on, off = notes.get("thinking-on", 0), notes.get("thinking-off", 0)
    if data.thinking == "on":
        empty = conversations - with_reasoning
        but = (
            f"; an empty thinking block is learned from {pluralize(empty, 'row')} without reasoning"
            if empty
            else ""
        )
        return f"Thinking: on for every row ({switch.variable}){but}."
    if data.thinking == "off" or (off and not on):
        why = "" if data.thinking == "off" else ", since none has reasoning"
        return f"Thinking: off for every row ({switch.variable}){why}."
    if on and off:
        with_it = pluralize(on, "row")
        return f"Thinking: on for the {with_it} with reasoning, off for {off:,} without ({switch.variable})."
    return f"Thinking: on for every row ({switch.variable}), since each has reasoning." if on else ""


def _on_effort(switch: Switch, data: Data) -> str:
    name, least = switch.variable, switch.off[switch.variable]
    if data.thinking == "off":
        return f"Thinking: {name} = {least}; this template cannot turn thinking off."
    return f"Thinking: {name} has the template's default; thinking can be reduced, but not turned off."


def prompt_thinking(setting: Thinking, notes: Mapping[str, int]) -> Thinking:
    """Return the thinking setting of prompts for a model trained on this data.

    It is ``setting`` unless that is ``auto``, which selects the mode of most rows.
    """
    on, off = notes.get("thinking-on", 0), notes.get("thinking-off", 0)
    if setting != "auto" or not (on or off):
        return setting
    return "on" if on >= off else "off"
