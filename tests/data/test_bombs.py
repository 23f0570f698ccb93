"""Files that describe far more than they hold are refused early, and never take the memory of the machine."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qlora_tui.data import bounds
from qlora_tui.data.bounds import (
    DEEPEST,
    LARGEST_ROW_BYTES,
    MAX_CHARACTERS,
    MAX_VALUES,
    MAX_VALUES_IN_LINE,
)
from qlora_tui.data.inspection import inspect
from qlora_tui.data.read import rows
from qlora_tui.data.row_index import row_at
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source
from tests.data.families import family

MIB = 1 << 20
OVER = LARGEST_ROW_BYTES // MIB + 1
PEAK = """
import sys
from pathlib import Path
from qlora_tui.cli import main
code = main(["data", "inspect", sys.argv[1]])
# Not ru_maxrss, which counts the process that started this one.
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)
sys.exit(code)
"""


def zst(path: Path, pieces: Iterator[bytes]) -> Path:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for piece in pieces:
            writer.write(piece)
    return path


def mebibytes(piece: bytes, start: bytes = b"", count: int = OVER) -> Iterator[bytes]:
    yield start
    for _ in range(count):
        yield piece * (MIB // len(piece))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        inspect(Source(path=str(path)), None)
    assert str(path) in refused.value.what
    assert refused.value.fix
    return refused.value.what


@pytest.mark.parametrize(
    ("name", "start", "piece", "place"),
    [
        ("line.jsonl.zst", b"{}\n", b"a", "line 2 is larger than 16 MiB"),
        ("line.txt.zst", b"", b"a", "line 1 is larger than 16 MiB"),
        ("paragraph.txt.zst", b"1\n\n", b"aaaaaaa\n", "that begins on line 3 is larger than 16 MiB"),
        ("cell.csv.zst", b'a,b\n1,2\n3,"', b"aaaaaaa\n", "row 2 is larger than 16 MiB"),
        ("cells.csv.zst", b"a,b\n1,2\n", b",", "line 3 is larger than 16 MiB"),
        ("cells.tsv.zst", b"a\tb\n1\t2\n", b'"\n"\t\t\t\t\t', "row 2 is larger than 16 MiB"),
    ],
)
@pytest.mark.slow
def test_a_row_over_the_bound_is_refused_with_its_place(
    tmp_path: Path, name: str, start: bytes, piece: bytes, place: str
) -> None:
    assert place in refusal(zst(tmp_path / name, mebibytes(piece, start)))


def test_a_long_line_under_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * OVER * MIB, 1))
    assert "line 1 is larger than 16 MiB" in refusal(path)


def test_a_file_that_expands_a_thousandfold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "UNQUESTIONED_BYTES", MIB)
    lines = mebibytes(b'{"instruction":"a","output":"b"}' + b" " * 4063 + b"\n", count=24)
    assert "more than 1,000 to 1" in refusal(zst(tmp_path / "rows.jsonl.zst", lines))


def test_a_text_that_compresses_well_is_read(tmp_path: Path) -> None:
    row = b'{"instruction":"' + b"a" * 1000 + b'","output":"b"}\n'
    path = zst(tmp_path / "rows.jsonl.zst", iter([row * 10_000]))
    assert path.stat().st_size < 10_000
    assert sum(1 for _ in rows(path)) == 10_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("many.jsonl", lambda: b"[" + b"[]," * MAX_VALUES_IN_LINE + b"1]"),
        ("many.json", lambda: b"[[" + b"1," * (MAX_VALUES + 1) + b"1]]"),
        ("deep.jsonl", lambda: b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1)),
        ("deep.json", lambda: b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1)),
        ("deeper.json", lambda: b"[" * MIB),
        ("deeper.jsonl", lambda: b"[" * MIB),
    ],
)
def test_too_many_or_too_deep_values_are_refused(
    tmp_path: Path, name: str, content: Callable[[], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    assert "Line 1" in refusal(path)


def test_rows_at_the_bounds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    depth, many = DEEPEST - 1, MAX_VALUES_IN_LINE - DEEPEST - 8
    deep = b'{"a":' * depth + b"[" + b"1," * many + b"1]" + b"}" * depth
    path.write_bytes(deep + b'\n{"text":"' + b"a" * (LARGEST_ROW_BYTES - 100) + b'"}\n')
    assert [row.error for row in rows(path)] == ["", ""]


def test_only_a_row_too_long_for_tokenizing_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    long = {"instruction": "a", "output": "b " * (MAX_CHARACTERS // 2)}
    path.write_text(json.dumps(long) + '\n{"instruction": "a", "output": "b"}\n')
    report = inspect(Source(path=str(path)), family("chatml"))
    (problem,) = (problem for problem in report.problems if problem.kind == "too-large")
    assert problem.rows == (1,)
    assert "2,000,000 at most" in problem.example
    assert report.counts.samples == 1


def test_one_row_of_a_long_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"a" * (LARGEST_ROW_BYTES + MIB))
    row = row_at(path, 2)
    assert row is not None and "larger than 16 MiB" in row.error


def _dictionary(values: int, size: int) -> Any:
    import pyarrow

    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * values, pyarrow.int32()), ["x" * size])
    return pyarrow.table({"text": text})


def _nulls() -> Any:
    import pyarrow

    offsets = pyarrow.array([0, 2_000_000_000], pyarrow.int32())
    return pyarrow.table({"text": pyarrow.ListArray.from_arrays(offsets, pyarrow.nulls(2_000_000_000))})


def _compressed() -> Any:
    import pyarrow

    return pyarrow.table({"text": ["x" * 500 * MIB]})


def _write(table: Any, path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd")
    else:
        zstd = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with (
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema, options=zstd) as writer,
        ):
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    ("name", "table", "says"),
    [
        ("dictionary.parquet", lambda: _dictionary(100_000, MIB), "more than 1,000 to 1"),
        ("dictionary.arrow", lambda: _dictionary(100_000, MIB), "more than 1,000 to 1"),
        ("nulls.arrow", _nulls, "takes more than 448 MiB"),
        ("compressed.arrow", _compressed, "takes more than 448 MiB"),
        ("long.parquet", lambda: _dictionary(256, 8 * MIB), "to"),
    ],
)
@pytest.mark.slow
def test_a_table_that_expands_endlessly_is_rejected_within_a_gigabyte(
    tmp_path: Path, name: str, table: Callable[[], Any], says: str
) -> None:
    path = _write(table(), tmp_path / name)
    assert path.stat().st_size < MIB
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert says in done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1000
