"""Damaged Arrow and Parquet files are read or refused; none ends the process that reads them."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.read import rows
from qlora_tui.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "300"))
"""For each kind of file."""
EXTREMES = (
    b"\xff\xff\xff\x7f",
    b"\xff" * 4,
    b"\0\0\0\x80",
    b"\x01\0\0\0",
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    bytes(8),
)


def seeds(kind: str) -> Iterator[bytes]:
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}]
    plain: list[dict[str, Any]] = [
        {
            "instruction": f"Frage {n} — 你好",
            "n": n,
            "tags": ["a", "b"] * n,
            "none": None,
            "bytes": b"\x00\x01",
        }
        for n in range(8)
    ]
    dictionary = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    for table in (
        pyarrow.Table.from_pylist(plain),
        pyarrow.Table.from_pylist([{"messages": turns}] * 5),
        pyarrow.table({"c": dictionary, "text": ["a", "b", None]}),
    ):
        for compression in (None, "zstd", "lz4"):
            sink = io.BytesIO()
            if kind == "parquet":
                pyarrow.parquet.write_table(table, sink, compression=compression or "none")
            else:
                options = pyarrow.ipc.IpcWriteOptions(compression=compression)
                with pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
                    writer.write_table(table)
            yield sink.getvalue()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """``content`` with one to four places changed, most of them lengths and offsets."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at, extreme = chance.randrange(len(data)), chance.choice(EXTREMES)
        match chance.randrange(5):
            case 0 | 1:
                data[at] = chance.randrange(256)
            case 2:
                data[at : at + len(extreme)] = extreme
            case 3:
                data[at : at + 8] = data[at + 8 : at + 16] * chance.randrange(3)
            case _:
                data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def read_damaged(kind: str, folder: Path) -> dict[str, int]:
    """How many of ``CASES`` damaged files were read, and how many refused."""
    outcomes = {"read": 0, "refused": 0}
    whole = list(seeds(kind))
    path = folder / f"rows.{kind}"
    for number in range(CASES):
        chance = random.Random(number)
        path.write_bytes(damaged(chance.choice(whole), chance))
        try:
            for _ in rows(path):
                pass
            outcomes["read"] += 1
        except UserError as problem:
            assert str(path) in problem.what
            assert problem.fix
            outcomes["refused"] += 1
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damaged_tables_are_read_or_refused_and_crash_nothing(tmp_path: Path, kind: str) -> None:
    # In a separate process: a crash there is a failure here.
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.test_hostile_tables", kind, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["read"] + outcomes["refused"] == CASES
    assert outcomes["read"] and outcomes["refused"]


if __name__ == "__main__":
    print(json.dumps(read_damaged(sys.argv[1], Path(sys.argv[2]))))


TRUNCATED_WHILE_READ = """
import os, sys
from pathlib import Path
from qlora_tui.data.read import rows
from qlora_tui.errors import UserError
path = Path(sys.argv[1])
try:
    for row in rows(path):
        if row.number == 1:
            os.truncate(path, path.stat().st_size // 2 + 1)
except UserError as refused:
    print(refused)
"""


def test_a_file_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "a.arrow"
    batch = pyarrow.record_batch({"text": ["word " * 2000] * 64})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        for _ in range(8):
            writer.write_batch(batch)
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED_WHILE_READ, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Cannot read the Arrow file" in done.stdout
