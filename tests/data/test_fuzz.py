"""Thousands of broken files: each is read, or refused with a row and a reason; none is a traceback."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qlora_tui.data.inspection import inspect
from qlora_tui.data.problems import CHECKS
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source
from tests.data.families import family

PAIRS = [{"instruction": f"Frage {n} — 你好\n", "input": "", "output": f'a\t{n} "x"'} for n in range(6)]
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "é"}]},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "ok", "weight": 0.5},
        ],
        "tools": '[{"name": "f"}]',
    },
]
SHARED = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
] * 3


MUTATIONS = int(os.environ.get("MUTATIONS", "300"))
"""Of each seed; the environment may ask for more, which begin with the same ones."""


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode()


SEEDS: dict[str, bytes] = {
    "pairs.jsonl": lines(PAIRS),
    "chats.jsonl": lines(CHATS * 2),
    "pairs.json": json.dumps(PAIRS, indent=1).encode(),
    "held.json": json.dumps({"data": SHARED}).encode(),
    "shared.json": json.dumps(SHARED, ensure_ascii=False).encode(),
    "rows.csv": b'text,label\n"a, ""b""",0\nc,1\n"long\nline",0\n',
    "rows.tsv": "question\tanswer\nq é\ta\nq2\ta2\n".encode(),
    "poem.txt": "one\ntwo — é\n\nthree\n".encode(),
    "pairs.jsonl.gz": gzip.compress(lines(PAIRS), mtime=0),
    "pairs.json.zst": zstandard.compress(json.dumps(PAIRS).encode()),
    "no-suffix": lines(PAIRS),
}
FRAGMENTS = (
    *(
        b'{"',
        b'"}',
        b"[",
        b"]",
        b"{}",
        b"null",
        b"\\u0000",
        b"\\ud800",
        b"\xff\xfe",
        b"\x00",
        b'"',
        b",",
        b"\n",
    ),
    *(b"\r", b"1e999", b"-", b"NaN", b'"role"', b"\xef\xbb\xbf", b'"content": 3', b"<|im_end|>", b"[[[[[[[["),
    b"\xf4\x90\x80\x80",
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """``content`` with one to four kinds of damage."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        size = chance.choice((1, 1, 2, 5, 40))
        damage: dict[str, Callable[[], None]] = {
            "flip": lambda at=at: data.__setitem__(slice(at, at + 1), bytes([chance.randrange(256)])),  # type: ignore[misc]
            "drop": lambda at=at, size=size: data.__delitem__(slice(at, at + size)),  # type: ignore[misc]
            "insert": lambda at=at: data.__setitem__(slice(at, at), chance.choice(FRAGMENTS)),  # type: ignore[misc]
            "repeat": lambda at=at, size=size: data.__setitem__(slice(at, at), data[at : at + size] * 3),  # type: ignore[misc]
            "cut": lambda at=at: data.__delitem__(slice(at, len(data))),  # type: ignore[misc]
            "swap": lambda at=at: data.reverse() if chance.random() < 0.05 else data.extend(data[:at]),  # type: ignore[misc]
        }
        damage[chance.choice(list(damage))]()
    return bytes(data)


def check(path: Path, tokenizer: Any) -> str:
    """Look ``path`` over; return what came of it."""
    try:
        report = inspect(Source(path=str(path)), tokenizer)
    except UserError as problem:
        assert str(path) in problem.what, problem
        assert problem.title
        assert problem.fix
        return "refused"
    for finding in report.problems:
        assert finding.kind in CHECKS
        assert finding.rows
        assert all(row >= 1 for row in finding.rows)
        assert finding.example
    return "read"


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_are_read_or_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    path = tmp_path / name
    outcomes = set()
    for number in range(MUTATIONS):
        path.write_bytes(mutated(SEEDS[name], chance))
        try:
            outcomes.add(check(path, family("chatml") if number % 3 == 0 else None))
        except Exception as error:
            raise AssertionError(f"{name}: {path.read_bytes()!r}") from error
    assert outcomes == {"read", "refused"}


@pytest.mark.slow
def test_mutated_parquet_is_read_or_refused_with_a_reason(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    whole = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), whole)
    chance = random.Random(0)
    path = tmp_path / "rows.parquet"
    for _ in range(200):
        path.write_bytes(mutated(whole.getvalue(), chance))
        check(path, None)
