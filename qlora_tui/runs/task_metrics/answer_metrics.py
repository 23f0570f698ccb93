"""Metrics of answers, chosen by what the reference answers look like.

Several metrics may be computed. Verdicts name the first one, which depends on the references:

* calls of tools that the rows offer: whether the answer is a valid call;
* JSON: whether the answer is valid JSON;
* short texts: whether the answer matches exactly (if it is one of a few options, it is a decision:
  :mod:`.decisions`);
* anything else: the words that the answer shares with the reference (token F1).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from qlora_tui.data.conversation import ToolCall
from qlora_tui.data.repetition import words
from qlora_tui.runs.task_metrics.intervals import (
    MIN_ROWS,
    Interval,
    mcnemar_p,
    mean_interval,
    paired_share_interval,
    share_interval,
)

_FENCE = re.compile(r"\A```[a-zA-Z]*\n(.*?)\n?```\Z", re.DOTALL)
Comparison: TypeAlias = Literal["better", "worse", "unclear"]
SIGNIFICANCE = 0.05
_SHORT_WORDS = 8
"""Maximum number of words of a reference that the answer is expected to match exactly."""
_MOST = 0.9
"""Share of the references that must be of one kind."""


class TaskRow(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One validation prompt with its reference and both answers."""

    source: int
    """Index of the recipe's source, from 0."""
    row: int
    """Number of the row in its file, from 1."""
    file: str = ""
    """Name of the file in the source; empty if the source is one file."""
    prompt: str
    """The end of the prompt, for display."""
    reference: str
    base: str
    adapter: str
    base_ended: bool
    """Whether the base ended its turn within the token limit."""
    adapter_ended: bool
    tools: tuple[dict[str, Any], ...] = ()
    """Tools of the row as JSON schemas, if the reference calls one; otherwise empty."""
    reference_raw: str = ""
    """The reference with the special tokens that mark calls, if it calls a tool; otherwise empty."""
    base_raw: str = ""
    adapter_raw: str = ""
    reference_calls: tuple[ToolCall, ...] = ()
    base_calls: tuple[ToolCall, ...] = ()
    adapter_calls: tuple[ToolCall, ...] = ()


_Judge: TypeAlias = Callable[[TaskRow, str, tuple[ToolCall, ...]], bool]
"""Returns whether an answer to a row is right, given its text and its tool calls."""


class Metric(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One metric of base and adapter on the same prompts."""

    name: str
    rows: int
    """Number of prompts that the metric is computed on."""
    base: float
    """Mean of the base over the prompts, 0 to 1."""
    base_interval: Interval
    adapter: float
    adapter_interval: Interval
    difference_interval: Interval
    """Interval of the adapter's mean minus the base's mean."""
    p: float | None = None
    """McNemar's exact p-value for equality of both; None for means, which are compared by their interval."""

    @property
    def difference(self) -> float:
        """The adapter's mean minus the base's mean."""
        return self.adapter - self.base

    @property
    def comparison(self) -> Comparison:
        """Whether the adapter is better or worse than its base, or the evidence is insufficient."""
        if self.rows < MIN_ROWS:
            return "unclear"
        low, high = self.difference_interval
        is_clear = self.p < SIGNIFICANCE if self.p is not None else low > 0 or high < 0
        if not is_clear or not self.difference:
            return "unclear"
        return "better" if self.difference > 0 else "worse"


def measure_answers(rows: Sequence[TaskRow]) -> tuple[Metric, ...]:
    """Return the metrics that suit the references, the most informative one first."""
    metrics: list[Metric] = []
    calling = [row for row in rows if row.reference_calls]
    plain = [row for row in rows if not row.reference_calls]
    if calling:
        metrics.append(_share("valid tool calls", calling, _valid_call))
        metrics.append(_share("exact match", calling, _same_call))
    elif plain:
        judge = _exact_match(plain)
        if judge is _same_json:
            metrics.append(_share("valid JSON", plain, lambda row, answer, calls: is_json(answer)))
        if judge is not None:
            metrics.append(_share("exact match", plain, judge))
        if judge is not _same_json:
            metrics.append(_mean("token F1", plain))
    if rows:
        metrics.append(
            compare_shares("ended", [row.base_ended for row in rows], [row.adapter_ended for row in rows])
        )
    return tuple(metrics)


def match_answers(rows: Sequence[TaskRow]) -> list[tuple[bool | None, bool | None]]:
    """Return for each row whether the base's answer and the adapter's answer match the reference.

    None for an answer that differs from a reference in free text, since such an answer may be right too.
    """
    judge = _exact_match([row for row in rows if not row.reference_calls])

    def matches(row: TaskRow, answer: str, calls: tuple[ToolCall, ...]) -> bool | None:
        if row.reference_calls:
            return _same_call(row, answer, calls)
        return judge(row, answer, calls) if judge is not None else _same_words(row, answer, calls) or None

    return [
        (matches(row, row.base, row.base_calls), matches(row, row.adapter, row.adapter_calls)) for row in rows
    ]


def compare_shares(name: str, base: Sequence[bool], adapter: Sequence[bool]) -> Metric:
    """Return a metric from answers that are right or wrong, on the same prompts."""
    rows = len(base)
    return Metric(
        name=name,
        rows=rows,
        base=sum(base) / rows,
        base_interval=share_interval(sum(base), rows),
        adapter=sum(adapter) / rows,
        adapter_interval=share_interval(sum(adapter), rows),
        difference_interval=paired_share_interval(base, adapter),
        p=mcnemar_p(base, adapter),
    )


def compare_means(name: str, base: Sequence[float], adapter: Sequence[float]) -> Metric:
    """Compare the mean scores of base and adapter on the same prompts. Scores are from 0 to 1."""
    rows = len(base)
    return Metric(
        name=name,
        rows=rows,
        base=sum(base) / rows,
        base_interval=_bounded(mean_interval(base), 0.0, 1.0),
        adapter=sum(adapter) / rows,
        adapter_interval=_bounded(mean_interval(adapter), 0.0, 1.0),
        difference_interval=_bounded(
            mean_interval([after - before for before, after in zip(base, adapter, strict=True)]), -1.0, 1.0
        ),
    )


class NotJsonError(ValueError):
    """A text is not JSON."""


def same_words(one: str, other: str) -> bool:
    """Return whether two texts have the same words in the same order.

    Texts without words are compared as a whole.
    """
    first, second = words(one), words(other)
    return first == second if first or second else one.strip() == other.strip()


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words with respect to the reference.

    Repeated words count as often as they occur in both texts, as in SQuAD (Rajpurkar et al. 2016, section
    6.1).
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def parse_json(text: str) -> Any:
    """Parse a text that is one JSON object or array, alone or in one code fence.

    Raises:
        NotJsonError: The text is anything else, including JSON surrounded by text.
    """
    inner = text.strip()
    if fenced := _FENCE.match(inner):
        inner = fenced[1].strip()
    if not inner.startswith(("{", "[")):
        raise NotJsonError("The answer is not an object or array.")
    try:
        return json.loads(inner, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def is_json(text: str) -> bool:
    """Return whether a text is one JSON object or array, alone or in one code fence."""
    try:
        parse_json(text)
    except NotJsonError:
        return False
    return True


def same_json(one: str, other: str) -> bool:
    """Return whether two texts are JSON with the same value."""
    try:
        return bool(parse_json(one) == parse_json(other))
    except (NotJsonError, RecursionError):
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON.")


def fits_tools(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a call names one of the tools, and its arguments are an object with all required ones.

    If the tool allows no additional properties, the arguments must not include any others.

    Args:
        call: A parsed call.
        tools: Functions as JSON schemas, with or without OpenAI's wrapping.
    """
    if not isinstance(call.arguments, dict):
        return False
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or function.get("name") != call.name:
            continue
        schema = function.get("parameters")
        if not isinstance(schema, Mapping):
            return True
        required, properties = schema.get("required"), schema.get("properties")
        if isinstance(required, list) and any(name not in call.arguments for name in required):
            return False
        if schema.get("additionalProperties") is False and isinstance(properties, Mapping):
            return all(name in properties for name in call.arguments)
        return True
    return False


def _share(name: str, rows: Sequence[TaskRow], judge: _Judge) -> Metric:
    return compare_shares(
        name,
        [judge(row, row.base, row.base_calls) for row in rows],
        [judge(row, row.adapter, row.adapter_calls) for row in rows],
    )


def _mean(name: str, rows: Sequence[TaskRow]) -> Metric:
    return compare_means(
        name,
        [token_f1(row.base, row.reference) for row in rows],
        [token_f1(row.adapter, row.reference) for row in rows],
    )


def _bounded(interval: Interval, low: float, high: float) -> Interval:
    return Interval(max(low, interval.low), min(high, interval.high))


def _exact_match(plain: Sequence[TaskRow]) -> _Judge | None:
    """Return the function that decides whether an answer matches its reference; None for free text.

    Args:
        plain: Rows whose references call no tool.
    """
    if plain and sum(is_json(row.reference) for row in plain) >= _MOST * len(plain):
        return _same_json
    if sum(len(words(row.reference)) <= _SHORT_WORDS for row in plain) >= _MOST * len(plain):
        return _same_words
    return None


def _same_json(row: TaskRow, answer: str, calls: tuple[ToolCall, ...]) -> bool:
    return same_json(answer, row.reference)


def _same_words(row: TaskRow, answer: str, calls: tuple[ToolCall, ...]) -> bool:
    return same_words(answer, row.reference)


def _valid_call(row: TaskRow, answer: str, calls: tuple[ToolCall, ...]) -> bool:
    return bool(calls) and all(fits_tools(call, row.tools) for call in calls)


def _same_call(row: TaskRow, answer: str, calls: tuple[ToolCall, ...]) -> bool:
    made, wanted = ([(c.name, c.arguments) for c in each] for each in (calls, row.reference_calls))
    return made == wanted
