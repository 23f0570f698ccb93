"""Public data set shapes, each read exactly right or refused with its reason.

``public_shapes`` holds one file for each family of documents, one shape a line: the document that describes
it (``source``), a row or two in our own words (``rows``, or ``content`` where the bytes matter), and what is
expected. ``format`` and ``read`` are the format and, for each row, its conversation or why it has none;
``problems`` the rows by kind that an inspection names. ``stop`` is the title of the refusal of the file,
``says`` what stands in it; ``chosen`` is what is expected once ``data.preferences`` is ``"chosen"``.

A turn is written ``role: text``, or ``role (not trained): text``, or as an object of all that is not default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError, ToolCall
from qlora_tui.data.inspection import inspect
from qlora_tui.data.preferences import PAIRS, RATED
from qlora_tui.data.sources import conversations, open_source
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source

FOLDER = Path(__file__).parent / "public_shapes"
SHAPES = {
    shape["name"]: shape
    for path in sorted(FOLDER.glob("*.jsonl"))
    for shape in map(json.loads, path.read_text().splitlines())
}
_UNTESTED = ("one-row", "duplicate", "near-duplicate")
"""What an inspection says of any file of one or two rows."""


def written(shape: dict[str, Any], folder: Path) -> Source:
    """The file of a shape."""
    path = folder / shape.get("file", "rows.jsonl")
    if "content" in shape:
        path.write_text(shape["content"])
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(shape["rows"]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in shape["rows"]))
    return Source(path=str(path))


def message(expected: Any) -> Message:
    if isinstance(expected, dict):
        calls = tuple(ToolCall(**call) for call in expected.get("tool_calls", ()))
        return Message(**{**expected, "tool_calls": calls})
    role, _, content = expected.partition(": ")
    return Message(role.removesuffix(" (not trained)"), content, train=not role.endswith("(not trained)"))


def check_row(outcome: Conversation | RowRejectedError, expected: Any) -> None:
    if isinstance(expected, dict) and "refused" in expected:
        assert isinstance(outcome, RowRejectedError), outcome
        assert outcome.kind == expected["refused"]
        assert outcome.reason == expected.get("says", outcome.reason)
        return
    if isinstance(outcome, RowRejectedError):
        raise AssertionError(f"{outcome.kind}: {outcome.reason}")
    if isinstance(expected, list):
        expected = {"messages": expected}
    whole = Conversation(
        messages=tuple(map(message, expected.get("messages", ()))),
        tools=tuple(expected.get("tools", ())),
        text=expected.get("text", ""),
    )
    assert msgspec.structs.replace(outcome, source=0, row=0) == whole


def check_read(source: Source, data: Data, expected: dict[str, Any]) -> None:
    """That the file is in the format, and each row gives what is expected."""
    (file,), _ = open_source(source, data.preferences)
    assert file.detection.layout.format == expected["format"]
    outcomes = list(conversations(file))
    for (_, outcome), wanted in zip(outcomes, expected["read"], strict=True):
        check_row(outcome, wanted)
    numbers = list(range(1, len(outcomes) + 1))
    assert [row.number for row, _ in outcomes] == expected.get("numbers", numbers)
    problems = {p.kind: list(p.rows) for p in inspect(source, None, data).problems}
    assert {kind: rows for kind, rows in problems.items() if kind not in _UNTESTED} == expected.get(
        "problems", {}
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_is_read_right_or_refused(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    source = written(shape, tmp_path)
    if "stop" not in shape:
        for preferences in ("refuse", "chosen"):
            check_read(source, msgspec.convert({"preferences": preferences}, Data), shape)
        return
    with pytest.raises(UserError) as stopped:
        inspect(source)
    problem = stopped.value
    assert problem.title == shape["stop"]
    assert problem.fix
    for words in shape.get("says", ()):
        assert words in str(problem)
    if "chosen" in shape:
        assert ("--set data.preferences=chosen" in problem.fix) == (problem.code in (PAIRS, RATED))
        check_read(source, Data(preferences="chosen"), shape["chosen"])
    else:
        with pytest.raises(UserError, match=shape["stop"]):
            inspect(source, None, Data(preferences="chosen"))


def test_every_shape_names_where_it_is_documented() -> None:
    assert len(SHAPES) >= 60
    assert len(SHAPES) == sum(len(path.read_text().splitlines()) for path in FOLDER.glob("*.jsonl"))
    assert len({shape["source"] for shape in SHAPES.values()}) == len(SHAPES)
