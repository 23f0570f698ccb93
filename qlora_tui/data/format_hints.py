"""Hints for rows that match no format, or that match one only at first sight. Used by ``formats``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tui.data.chat_formats import ROLE_KEYS, is_role

_MARKS = ("### Human:", "### Instruction:", "\n\nHuman:", "[INST]", "<|im_start|>", "USER:")
"""Markers that begin a question in conversations already rendered as one text."""
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
"""Columns that hold what is asked, whatever holds the answer."""
UNMAPPED_COLUMNS = "unmapped-columns"
"""Code of the error for rows that can be trained on once their columns are mapped by hand."""
_TREE = ("parent_id", "message_tree_id", "message_id")


def single_turns(values: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return why rows are single turns of conversations rather than texts; empty if they are not."""
    role = next((c for c in columns if c.lower() in ROLE_KEYS), "")
    if not role or not any(c in columns for c in _TREE):
        return ""
    turns = sum(is_role(value.get(role)) for value in values)
    return f"Each row is one turn, with its role in {role!r}." if 2 * turns >= max(1, len(values)) else ""


def written_out(texts: Sequence[Any]) -> str:
    """Return the marker by which most texts are whole conversations; empty if they are not."""
    strings = [text for text in texts if isinstance(text, str)]
    common_mark = Counter(mark for text in strings for mark in _MARKS if mark in text).most_common(1)
    return common_mark[0][0].strip() if common_mark and 2 * common_mark[0][1] >= len(strings) else ""


def mapping_hint(values: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[str, str]:
    """Suggest how to map these columns by hand, with their own names if they can be guessed.

    Returns the fix and the code of the error: :data:`UNMAPPED_COLUMNS`, if mapping helps.
    """
    nested = next((c for c in columns if any(isinstance(value.get(c), dict) for value in values)), "")
    texts = [c for c in columns if _is_text(values, c)]
    if len(texts) < 2 and nested:
        return f"{nested!r} holds an object: put its fields in separate columns.", ""
    prose = [c for c in texts if has_words(values, c)]
    texts = prose if len(prose) > 1 else texts  # rather than names and tags
    first = next((c for c in columns if c.lower() in PROMPTS and c in texts), texts[0] if texts else "")
    others = [c for c in texts if c != first]
    first, last = (first, others[-1]) if others else ("…", "…")
    example = f'columns = {{ prompt = "{first}", completion = "{last}" }}'
    return f"Map the columns to their parts, as in {example}.", UNMAPPED_COLUMNS


def has_words(values: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Return whether most rows have several words in a column, rather than a name, a tag or a number."""
    count = sum(isinstance(v.get(column), str) and len(v[column].split()) > 1 for v in values)
    return 2 * count >= max(1, len(values))


def _is_text(values: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Return whether most rows have words in a column, not numbers or ids."""
    string_count = sum(isinstance(v.get(column), str) and not v[column].isdigit() for v in values)
    return 2 * string_count >= max(1, len(values)) and not column.lower().endswith("id")
