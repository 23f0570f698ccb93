"""Decisions: answers that are one of a few options, such as labels or objects of enumerated fields.

Data are decisions if their answers are a few short texts that occur again and again, whatever the layout of
the rows. ``formats`` uses this module to describe a file, and the evaluation of a run uses it to score every
option instead of generating text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import product
from typing import Any

from msgspec import Struct

from qlora_tui.data.repetition import words

MOST_OPTIONS = 256
_MOST_WORDS = 8
"""Maximum number of words of a label; longer recurring answers count as texts."""
_ROWS_PER_OPTION = 3
"""Minimum mean number of rows for each option, or each value of a field."""
_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"separators": separators, "ensure_ascii": ascii_}
    for separators in ((", ", ": "), (",", ":"))
    for ascii_ in (False, True)
)
"""Ways to write a JSON object on one line."""


class Decision(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A decision, which chooses one of a few options as a row's answer."""

    options: tuple[str, ...]
    """Texts of the answers, most frequent first; at least two."""
    fields: tuple[str, ...] = ()
    """Keys of the objects if the options are objects; empty if they are labels."""

    def value(self, option: int, field: str) -> str:
        """Return the value of a field in an option, as JSON unless it is a string."""
        return _shown(json.loads(self.options[option])[field])

    def values(self, field: str) -> dict[str, list[int]]:
        """Return the indices of the options that have each value of a field, keyed by the value."""
        options: dict[str, list[int]] = {}
        for number in range(len(self.options)):
            options.setdefault(self.value(number, field), []).append(number)
        return options

    def describe(self) -> str:
        """Return a phrase that describes the decision: ``4 labels: a, b, c, d``."""
        if self.fields:
            return f"objects with {len(self.fields)} enumerated fields: {', '.join(self.fields)}"
        shown = ", ".join(self.options[:6])
        more = f" and {len(self.options) - 6} more" if len(self.options) > 6 else ""
        return f"{len(self.options)} labels: {shown}{more}"


def decision_of(answers: Mapping[str, int]) -> Decision | None:
    """Return the decision that answers form, given how often each occurs; None if they are texts.

    For objects, combinations of values that no row has are options too, if there are not too many.
    """
    rows = sum(answers.values())
    most = min(MOST_OPTIONS, rows // _ROWS_PER_OPTION)
    ordered = [text for text, _ in Counter(answers).most_common()]
    objects = [_object(text) for text in ordered]
    if ordered and all(each is not None for each in objects):
        return _of_objects(ordered, [each for each in objects if each is not None], most)
    if not 2 <= len(ordered) <= most or not all(0 < len(words(text)) <= _MOST_WORDS for text in ordered):
        return None
    return Decision(options=tuple(ordered))


def _of_objects(texts: list[str], objects: list[dict[str, Any]], most: int) -> Decision | None:
    fields = tuple(objects[0])
    if not fields or any(tuple(each) != fields for each in objects):
        return None
    # Keyed by their JSON, because 1 and true are two values.
    values = [list(dict.fromkeys(json.dumps(each[field]) for each in objects)) for field in fields]
    if any(len(each) > most for each in values) or all(len(each) == 1 for each in values):
        return None
    written = list(zip(texts, objects, strict=True))
    style = next(
        (each for each in _STYLES if all(json.dumps(value, **each) == text for text, value in written)), None
    )
    if style is not None and math.prod(map(len, values)) <= MOST_OPTIONS:
        combined = (
            json.dumps({field: json.loads(value) for field, value in zip(fields, each, strict=True)}, **style)
            for each in product(*values)
        )
        texts = list(dict.fromkeys([*texts, *combined]))
    return Decision(options=tuple(texts), fields=fields) if len(texts) <= MOST_OPTIONS else None


def _object(text: str) -> dict[str, Any] | None:
    """Return the object that a text encodes, if its values are short scalars other than floats; else None."""
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    is_short = all(
        not isinstance(each, dict | list | float) and len(words(str(each))) <= _MOST_WORDS
        for each in value.values()
    )
    return value if is_short else None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
