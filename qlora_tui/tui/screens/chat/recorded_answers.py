"""Answers that a run recorded, as Chat shows them before the first message: side by side, and in full if they
fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest

from textual.content import Content

from qlora_tui.data.repetition import words

_COMPARED_ROWS = 2
"""Number of lines for each answer except the last one, such as the base model's answer, if the full answers
do not fit. Rows that would stay empty are added.
"""
_LEAST_ROWS = 3
"""A recorded answer is never shortened to fewer lines than this."""
_ENOUGH_WHOLE = 2
"""If the last answers to at least this many prompts fit in full, they are not shortened to make room for more
prompts.
"""
_LEAST_CELLS = 40
"""Minimum width of a column of answers, in cells, if there are more than two columns."""
_LEAST_ALIKE = 0.5
"""Minimum share of words that two texts must have in common for their differences to be marked."""
_COLUMN_GAP, _INDENT = 3, 2


@dataclass(frozen=True)
class RecordedAnswers:
    """A prompt and the answers to it."""

    prompt: str
    answers: tuple[tuple[str, str], ...]
    """(name, answer) pairs, with the adapter's answer last. ``base`` and ``step 60`` are examples of names.
    """
    by_step: bool = False
    """Whether the answers come from different training steps. If so, they are ordered by step, earliest
    first.
    """
    expected: str = ""
    """The answer in the data; empty if the data has none."""
    matches: Mapping[str, bool] = field(default_factory=dict)
    """Whether each answer is the expected one, by the answer's name. If this cannot be decided for an answer,
    there is no entry for it.
    """

    def select(self, number: int) -> tuple[tuple[str, str], ...]:
        """Return at most ``number`` of the answers. ``number`` is at least 2.

        If the answers come from different steps, return the first, the last, and evenly spaced answers in
        between; otherwise, return the last ones.
        """
        most = len(self.answers) - 1
        if not self.by_step or number > most:
            return self.answers[-number:]
        return tuple(self.answers[round(place * most / (number - 1))] for place in range(number))


def recorded_lines(
    answered: Sequence[RecordedAnswers], opened: str, width: int, height: int
) -> list[Content]:
    """Return a heading and the prompts with their recorded answers side by side.

    If everything fits, each prompt has all its answers in full, in one or more rows. Otherwise, each prompt
    has only one row of answers, the ``opened`` prompt comes first, and prompts that do not fit are left out.
    All answers but the last (for example, the base model's answer) are cut, as :func:`_fitting_blocks` says.
    If fewer than :data:`_ENOUGH_WHOLE` prompts fit with their last answers in full, and the ``opened`` prompt
    is not one of them, all answers are shortened as little as possible.
    """
    heading = [Content.styled("Recorded answers", "bold $primary")]
    height -= len(heading)
    most = max(2, (width + _COLUMN_GAP) // (_LEAST_CELLS + _COLUMN_GAP))
    everything = [_answer_lines(each, each.answers, most, width) for each in answered]
    if sum(map(len, everything)) <= height:
        return heading + _separated(everything, height)
    recorded = sorted(answered, key=lambda each: each.prompt != opened)
    for gap in (1, 0):
        blocks = _fitting_blocks(recorded, opened, most, width, height, gap)
        is_open = bool(blocks) and recorded[0].prompt == opened
        if is_open or len(blocks) >= min(_ENOUGH_WHOLE, len(recorded)):
            return heading + _separated(blocks, height)
    count = max(1, min(len(recorded), height // (_LEAST_ROWS + 1)))
    shortened: list[Content] = []
    for rows in range(max(_LEAST_ROWS, height // count), _LEAST_ROWS - 1, -1):
        blocks = [_answer_lines(each, each.select(most), most, width, rows) for each in recorded[:count]]
        shortened = [line for block in blocks for line in block]
        if len(shortened) <= height:
            break
    return heading + shortened[: max(0, height)]


def _fitting_blocks(
    recorded: Sequence[RecordedAnswers], opened: str, most: int, width: int, height: int, gap: int
) -> list[list[Content]]:
    """Return the lines of each of the first prompts, as many as fit with ``gap`` rows between two of them.

    The last answer of each prompt is in full. Its other answers have at most :data:`_COMPARED_ROWS` lines,
    except for the ``opened`` prompt, whose answers are all in full if they fit. If rows remain, the other
    answers get more lines, beginning with those of the first prompt.
    """
    blocks: list[list[Content]] = []
    free = height
    for each in recorded:
        for compared in (None, _COMPARED_ROWS) if each.prompt == opened else (_COMPARED_ROWS,):
            lines = _answer_lines(each, each.select(most), most, width, compared=compared)
            if len(lines) <= free:
                blocks.append(lines)
                free -= len(lines) + gap
                break
        else:
            break
    free = max(0, free + gap)
    for at, each in enumerate(recorded[: len(blocks)]):
        room = len(blocks[at]) + free
        for compared in range(room, _COMPARED_ROWS, -1):
            lines = _answer_lines(each, each.select(most), most, width, compared=compared)
            if len(lines) <= room:
                blocks[at], free = lines, room - len(lines)
                break
    return blocks


def _separated(blocks: Sequence[list[Content]], height: int) -> list[Content]:
    """Return the lines of all blocks, with an empty line between blocks if that fits into ``height`` rows."""
    gap = [Content("")] if sum(map(len, blocks)) + len(blocks) - 1 <= height else []
    return [line for at, block in enumerate(blocks) for line in (*gap[:at], *block)]


def _answer_lines(
    recorded: RecordedAnswers,
    answers: Sequence[tuple[str, str]],
    most: int,
    width: int,
    rows: int | None = None,
    *,
    compared: int | None = None,
) -> list[Content]:
    """Return lines with a prompt, the expected answer, and the given answers. The answers are side by side;
    the expected answer is next to them if there is room for its column, and otherwise above them. If the last
    answer is the expected one, the expected answer is left out; if it resembles the expected one, the words
    in which the two differ are marked.

    Args:
        recorded: The prompt.
        answers: (name, answer) pairs of the answers to show.
        most: Maximum number of answers side by side.
        width: Width of the lines, in cells.
        rows: Maximum number of lines of an answer; None to show answers in full. If the expected answer is
            above the answers, it has at most half of these lines, and the answers have the rest.
        compared: Maximum number of lines of each answer except the last, if lower than ``rows``; None if only
            ``rows`` applies.
    """
    prompt = Content.styled(f"❯ {' '.join(recorded.prompt.split())}", "bold")
    lines = [prompt.truncate(width, ellipsis=True)]
    shown = [
        (_answer_name(name, recorded.matches.get(name)), Content(" ".join(answer.split())))
        for name, answer in answers
    ]
    if recorded.expected and not recorded.matches.get(answers[-1][0]):
        texts = mark_differences(recorded.expected, answers[-1][1])
        shown[-1] = (shown[-1][0], texts[1])
        expected = (_answer_name("expected", None), texts[0])
        if len(answers) < most:
            shown.insert(0, expected)
        else:
            above = _column(*expected, width, None if rows is None else max(1, rows // 2), "$text-muted")
            lines += above
            rows = None if rows is None else max(1, rows - len(above))
    columns = min(most, len(shown))
    cells = max(1, (width - _COLUMN_GAP * (columns - 1)) // columns)
    limits = [each for each in (rows, compared) if each is not None]
    for first in range(0, len(shown), columns):
        beside = [
            _column(name, answer, cells, rows, "")
            if at == len(shown) - 1
            else _column(name, answer, cells, min(limits, default=None), "$text-muted")
            for at, (name, answer) in enumerate(shown[first : first + columns], first)
        ]
        for parts in zip_longest(*beside, fillvalue=Content("")):
            padded = [part.pad_right(cells - part.cell_length) for part in parts[:-1]]
            lines.append(Content(" " * _COLUMN_GAP).join([*padded, parts[-1]]))
    return lines


def _answer_name(name: str, is_match: bool | None) -> Content:
    """Return the name of an answer. If it is known whether the answer is the expected one, ``✓`` or ``✗``
    precedes the name.
    """
    label = Content.styled(f"{name}: ", "dim")
    if is_match is None:
        return label
    return Content.assemble(("✓ ", "$success") if is_match else ("✗ ", "$error"), label)


def mark_differences(one: str, other: str) -> tuple[Content, Content]:
    """Return two texts, each on one line. If at least half of their words are the same, the words that only
    one of them has are marked. Case and punctuation do not count.
    """
    texts = one.split(), other.split()
    first, second = (["".join(words(word)) or word for word in text] for text in texts)
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    same = [set[int](), set[int]()]
    for block in matcher.get_matching_blocks():
        for place, start in enumerate((block.a, block.b)):
            same[place].update(range(start, start + block.size))
    if matcher.ratio() < _LEAST_ALIKE:
        return Content(" ".join(texts[0])), Content(" ".join(texts[1]))
    marked = [
        Content(" ").join(
            Content.styled(word, "" if at in kept else "bold $warning") for at, word in enumerate(text)
        )
        for text, kept in zip(texts, same, strict=True)
    ]
    return marked[0], marked[1]


def _column(name: Content, answer: Content, cells: int, rows: int | None, style: str) -> list[Content]:
    """Return a column of ``cells`` cells: ``name``, followed by the answer. ``rows``: maximum number of
    lines; None to show the answer in full.
    """
    wrapped = (name + answer.stylize_before(style)).wrap(cells - _INDENT)
    if rows is not None and len(wrapped) > rows:
        wrapped = [*wrapped[: rows - 1], wrapped[rows - 1].truncate(cells - _INDENT - 1) + "…"]
    return [Content(" " * _INDENT) + line for line in wrapped]
