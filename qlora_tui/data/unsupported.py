"""Recognizes public formats that cannot be trained on, and gives hints for rows of unknown formats.

Used by ``formats``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tui.data.chat_formats import EXCHANGES, ROLE_KEYS, decoded, is_role, messages_of, turn_keys
from qlora_tui.data.conversation import RowRejectedError
from qlora_tui.errors import UserError

_NUMBERED = re.compile(
    r"(conversation|response|answer|completion|output|human_ref|model_response|chat)s?_?([ab]|[0-3])"
)
"""Pattern of columns with alternative answers, such as ``response_0``, or ``conversation_a``."""
_VERDICT = re.compile(
    r"(?:overall_)?(?:prefer|better|best|safer|winner|labels?|choice|chosen|score)(?:_?\w*)"
)
"""Pattern of columns with a verdict.

Examples are ``better_response_id``, ``overall_preference``, ``winner_model_a`` and ``score_0``.
"""
_RANKS = ("rank", "pm_score", "selected", "is_selected")
_ANSWERS = ("response", "completion", "output", "answer", "generation", "text", "content")
"""Keys that hold the answer in each item of a list of answers; also names of columns with answers."""
_Values = Sequence[Mapping[str, Any]]


def compared_answers(name: str, values: _Values, mapping: Mapping[str, str]) -> UserError | None:
    """Return the error for answers that are compared or graded; None for other rows.

    Side-by-side answers are rejected even if ``mapping`` selects one, because it is the worse answer in some
    rows.
    """
    columns = list(dict.fromkeys(column for value in values for column in value))
    what = _side_by_side(columns) or _ranked(columns, values, mapping) or _steps(values)
    if not what:
        return None
    return UserError(
        "Better and worse answers are mixed",
        what=f"{name} {what}",
        why="Some of the answers may be worse ones, which must not be learned.",
        fix="Convert the file: keep the better answer of each row, as columns prompt and completion.",
    )


def without_text(name: str, values: _Values) -> UserError | None:
    """Return the error for rows of a known format that cannot be trained on; None for other rows.

    The formats are token ids, text in segments, files of a batch API, lists of answers or examples in each
    row, and prompts without answers.
    """
    columns = {column for value in values for column in value}
    if _mostly(values, lambda v: _is_numbers(v.get("input_ids"))):
        return UserError(
            "Tokens instead of text",
            what=f"{name} contains token ids of an unknown tokenizer in 'input_ids'.",
            why="Token ids are valid only for the tokenizer that made them, and their chat template and "
            "length cannot be changed.",
            fix="Use the original text.",
        )
    if _mostly(values, lambda v: _is_segments(v.get("segments"))):
        return UserError(
            "Text in segments",
            what=f"{name} is in axolotl's template-free format, in which each item of 'segments' says "
            "whether it is trained on.",
            why="qlora-tui lets a chat template decide which parts are trained on.",
            fix="Convert the file to messages, or join the segments into one text to train on all of it.",
        )
    if problem := _batch(name, values):
        return problem
    prompt = next((c for c in PROMPTS if _mostly(values, lambda v: _is_prompt(v.get(c)))), "")  # noqa: B023
    if not prompt:
        return None
    if problem := _answers_in_items(name, values, prompt):
        return problem
    if any(c != prompt and (c.lower() in _ANSWERS or has_words(values, c)) for c in columns):
        return None  # one of them may be the answer
    return UserError(
        "Prompts without answers",
        what=f"{name} contains prompts without answers, in the columns {', '.join(sorted(columns))}.",
        why="Prompts alone are for reinforcement learning (PPO, GRPO), which is not supported.",
        fix='Choose a file with answers, or name the column that holds them: columns = { completion = "…" }.',
    )


def _is_prompt(value: Any) -> bool:
    """Return whether a cell is a text, or turns without an answer."""
    if not turn_keys(value):
        return isinstance(value, str)
    try:
        return all(message.role != "assistant" for message in messages_of(value))
    except RowRejectedError:
        return False


def _batch(name: str, values: _Values) -> UserError | None:
    """Return the error for the requests, or the results, of a batch API."""
    if not _mostly(values, lambda v: "custom_id" in v):
        return None
    objects = [c for v in values for c in v if isinstance(decoded(v[c]), dict)]
    if not objects:
        return None
    holder, has_answers = objects[0], objects[0] in ("response", "result")
    return UserError(
        "Answers of a batch" if has_answers else "Requests of a batch",
        what=f"{name} contains the {'results' if has_answers else 'requests'} of a batch API in {holder!r}, "
        f"without the {'questions' if has_answers else 'answers'}.",
        why="A row needs both.",
        fix="Join requests and results by 'custom_id', into messages that end with the assistant's answer.",
    )


def _answers_in_items(name: str, values: _Values, prompt: str) -> UserError | None:
    """Return the error for rows whose answers are in the items of a list."""
    for column in dict.fromkeys(c for v in values for c in v):
        if column == prompt or not _mostly(values, lambda v: _answer_key(column, v.get(column)) is not None):  # noqa: B023
            continue
        key = next(filter(None, (_answer_key(column, v.get(column)) for v in values)), "")
        first = next(items[0] for v in values if (items := decoded(v.get(column))))
        if prompt_key := next((k for k in PROMPTS if isinstance(first, dict) and k in first), ""):
            fields = f"{{input: .{prompt_key}, output: .{key}}}"
            return UserError(
                "Several examples per row",
                what=f"{name} has several examples per row, in the list {column!r}.",
                why="Each row must be one conversation.",
                fix=f"Write one row per example: jq -c '{{instruction: .{prompt}}} + (.{column}[] | "
                f"{fields})'.",
            )
        return UserError(
            "Better and worse answers are mixed",
            what=f"{name} has a list of answers in each row, in {column!r}.",
            why="Some of the answers may be worse ones, which must not be learned.",
            fix="Convert the file: keep the better answer of each row, as columns prompt and completion; or "
            "the better and a worse one, as prompt, chosen and rejected.",
        )
    return None


def _answer_key(column: str, value: Any) -> str | None:
    """Return the key of the answer in the items of a list; empty if the items are texts, None if they are not
    answers.

    Texts are answers if the column's name says so, or if there are several and each has several words, unlike
    tags.
    """
    items = decoded(value)
    keys = turn_keys(items)
    if not isinstance(items, list) or not items or (keys is not None and keys not in EXCHANGES):
        return None
    if all(isinstance(item, str) for item in items):
        have_words = len(items) > 1 and all(len(item.split()) > 1 for item in items)
        is_answer = have_words or _is_named_answer(column)
        return "" if is_answer else None
    if not all(isinstance(item, dict) for item in items):
        return None
    return next((key for key in _ANSWERS if all(isinstance(item.get(key), str) for item in items)), None)


def _is_named_answer(column: str) -> bool:
    return column.lower().removesuffix("s") in _ANSWERS


def _side_by_side(columns: Sequence[str]) -> str:
    """Return a description of two numbered answers and the column that says which is better."""
    verdict = next((c for c in columns if _VERDICT.fullmatch(c.lower())), "")
    stems: dict[str, list[str]] = {}
    for column in columns:
        if match := _NUMBERED.fullmatch(column.lower()):
            stems.setdefault(match[1], []).append(column)
    answers = next((same for same in stems.values() if len(same) > 1), [])
    if not answers or not verdict:
        return ""
    both = " and ".join(map(repr, answers[:2]))
    return f"has several answers per row, in {both}; {verdict!r} says which is better."


def _ranked(columns: Sequence[str], values: _Values, mapping: Mapping[str, str]) -> str:
    for column in columns:
        for value in values:
            items = decoded(value.get(column))
            if not isinstance(items, list) or len(items) < 2 or not isinstance(items[0], dict):
                continue
            rank = next((key for key in _RANKS if key in items[0]), "")
            if _is_named_answer(column) and _scores_differ(items):
                rank = rank or "score"
            if rank and not turn_keys(items) and column not in mapping.values():
                return f"has several answers per row, in {column!r}; {rank!r} says how good each of them is."
    return ""


def _scores_differ(items: Sequence[Any]) -> bool:
    scores = [item["score"] for item in items if isinstance(item, dict) and "score" in item]
    return len(scores) == len(items) and any(score != scores[0] for score in scores)


def _steps(values: _Values) -> str:
    stepwise = _mostly(
        values,
        lambda v: (
            isinstance(v.get("completions"), list)
            and isinstance(v.get("labels"), list)
            and bool(v["labels"])
            and all(isinstance(one, bool) for one in v["labels"])
        ),
    )
    return "rates an answer step by step: 'labels' says which of 'completions' are right." if stepwise else ""


def _mostly(values: _Values, fits: Any) -> bool:
    return bool(values) and 2 * sum(map(bool, map(fits, values))) > len(values)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _is_segments(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and {"label", "text"} <= value[0].keys()
    )


_MARKS = ("### Human:", "### Instruction:", "\n\nHuman:", "[INST]", "<|im_start|>", "USER:")
"""Markers that begin a question in conversations that are already rendered as one text."""


PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
"""Names of columns that hold a question or a task, whatever the name of the answer's column is."""


_TREE = ("parent_id", "message_tree_id", "message_id")


def single_turns(values: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return why rows are single turns of conversations rather than texts; empty if they are not."""
    role = next((c for c in columns if c.lower() in ROLE_KEYS), "")
    if not role or not any(c in columns for c in _TREE):
        return ""
    turns = sum(is_role(value.get(role)) for value in values)
    return f"Each row is one turn, with its role in {role!r}." if 2 * turns >= max(1, len(values)) else ""


def written_out(texts: Sequence[Any]) -> str:
    """Return the marker that shows that most texts are whole conversations; empty if they are not."""
    strings = [text for text in texts if isinstance(text, str)]
    common_mark = Counter(mark for text in strings for mark in _MARKS if mark in text).most_common(1)
    return common_mark[0][0].strip() if common_mark and 2 * common_mark[0][1] >= len(strings) else ""


def mapping_hint(values: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[str, str]:
    """Suggest how to map these columns by hand, with their own names if their parts can be guessed.

    Returns the fix and the error code, which is :data:`UNMAPPED_COLUMNS` if mapping helps.
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
    return f"Map the columns to the parts of a sample, as in {example}.", UNMAPPED_COLUMNS


def has_words(values: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Return whether most rows have several words in a column, rather than a name, a tag or a number."""
    count = sum(isinstance(v.get(column), str) and len(v[column].split()) > 1 for v in values)
    return 2 * count >= max(1, len(values))


def _is_text(values: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Return whether most rows have words in a column, not numbers or ids."""
    string_count = sum(isinstance(v.get(column), str) and not v[column].isdigit() for v in values)
    return 2 * string_count >= max(1, len(values)) and not column.lower().endswith("id")


UNMAPPED_COLUMNS = "unmapped-columns"
"""Error code for rows that can be used once their columns are mapped by hand."""
