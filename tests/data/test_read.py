from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.data.read import files_of, kind_of, rows
from qlora_tui.data.sources import open_source
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source

ROWS = [{"prompt": f"Frage {n} — 你好", "completion": "a\nb"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SEPARATED = "\n".join(["prompt{0}completion", *(f'"Frage {n} — 你好"{{0}}"a\nb"' for n in range(3))])

TEXTS: dict[str, str] = {
    "rows.json": json.dumps(ROWS, indent=2),
    "one-line.json": json.dumps(ROWS, ensure_ascii=False),
    "lines.json": LINES,
    "held.json": json.dumps({"version": "1", "data": ROWS}),
    "columns.json": json.dumps(
        {"prompt": [r["prompt"] for r in ROWS], "completion": [r["completion"] for r in ROWS]}
    ),
    "rows.jsonl": LINES,
    "blank-lines.ndjson": "\n" + LINES.replace("\n", "\n\n"),
    "windows.jsonl": LINES.replace("\n", "\r\n"),
    "rows.csv": SEPARATED.format(","),
    "german.csv": SEPARATED.format(";"),
    "rows.tsv": SEPARATED.format("\t"),
}


def values(path: Path) -> list[object]:
    read_rows = list(rows(path))
    assert not any(row.error for row in read_rows), read_rows
    return [row.value for row in read_rows]


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode())
    assert values(path) == ROWS


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".zst", zstandard.compress),
        (".zst", lambda b: zstandard.compress(b[:9]) + zstandard.compress(b[9:])),
    ],
    ids=["gzip", "zstd", "zstd-frames"],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_compressed_files_read_like_plain_ones(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(TEXTS[name].encode()))
    assert values(path) == ROWS


def test_a_byte_order_mark_is_not_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS["rows.csv"].encode())
    assert values(path) == ROWS


@pytest.mark.slow
def test_parquet_gives_the_same_rows_and_names_its_labels(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    features = {"label": {"_type": "ClassLabel", "names": ["bad", "good"]}}
    table = pyarrow.table({"text": ["x", "y"], "label": [1, 0]})
    info = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": info}), tmp_path / "named.parquet"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert values(tmp_path / "named.parquet") == [
        {"text": "x", "label": "good"},
        {"text": "y", "label": "bad"},
    ]
    assert values(tmp_path / "rows.parquet") == ROWS


def test_text_files_give_paragraphs_with_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("\nfirst\nline\n\n\nsecond\n")
    assert [(row.number, row.value) for row in rows(path)] == [
        (2, {"text": "first\nline"}),
        (6, {"text": "second"}),
    ]


def test_a_json_array_larger_than_a_chunk_streams_whole(tmp_path: Path) -> None:
    big = [{"text": "é" * 997, "n": n, "last": 1.5e3} for n in range(3000)]
    path = tmp_path / "big.json"
    path.write_text(json.dumps(big, ensure_ascii=False))
    assert values(path) == big


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), json_values, min_size=1, max_size=3), min_size=1, max_size=5
    ),
    st.integers(1, 40),
    st.sampled_from(["array", "indented", "lines"]),
    st.booleans(),
)
def test_json_is_read_alike_wherever_the_chunks_end(
    values: list[dict[str, Any]], chunk_bytes: int, style: str, ascii_only: bool
) -> None:
    if style == "lines":
        text = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    else:
        text = json.dumps(values, indent=2 if style == "indented" else None, ensure_ascii=ascii_only)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "rows.json"
        path.write_bytes(text.encode())
        patch.setattr("qlora_tui.data.text_reader.CHUNK_BYTES", chunk_bytes)
        read_rows = list(rows(path))
    if style == "lines" and len(values) == 1:
        return  # one object may hold the rows of the whole file
    assert [row.value for row in read_rows] == values
    assert [row.number for row in read_rows] == list(range(1, len(values) + 1))


def test_one_row_larger_than_several_chunks_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    path.write_text(json.dumps([{"text": "x" * 5_000_000}, {"text": "y"}]))
    assert [len(row.value["text"]) for row in rows(path)] == [5_000_000, 1]


def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*(['{"text": "ok"}'] * 6), '{"text": oops}', '{"text": "ok"}']))
    read_rows = list(rows(path))
    assert [row.number for row in read_rows if row.error] == [7]
    assert read_rows[6].kind == "bad-json"
    assert "Line 7" in read_rows[6].error
    assert len(read_rows) == 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3),
        ('[\n{"a": 1},\n{"a": 2}', 3),
        ('[\n{"a": 1},\n]', 3),
        ('[\n{"a": "never ends', 2),
        ("[" * 100_000, 1),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    last = list(rows(path))[-1]
    assert last.kind == "bad-json"
    assert last.error.startswith(f"Line {line} ")


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.json", "latin.csv", "latin.txt"])
def test_latin_1_is_reported_with_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    good = {"latin.json": '[\n{"text": "a"},\n', "latin.csv": "text\na\n"}.get(name, '{"text": "a"}\n\n')
    path.write_bytes(good.encode() + '{"text": "Grüße"}'.encode("latin-1"))
    read_rows = list(rows(path))
    assert read_rows[-1].kind == "bad-encoding"
    assert read_rows[-1].error.startswith("Line 3: byte 0xfc")


def test_a_csv_row_with_too_many_values_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ragged.csv"
    path.write_text("a,b\n1,2\n1,2,3\n4,5\n")
    read_rows = list(rows(path))
    assert [row.kind for row in read_rows] == ["", "bad-row", ""]
    assert read_rows[1].error == "Row 2, line 3: 3 values for 2 columns."


@pytest.mark.parametrize(
    ("name", "content", "title"),
    [
        ("empty.jsonl", b"", "Empty file"),
        ("empty.parquet", b"", "Empty file"),
        ("wide.csv", "a,b".encode("utf-16"), "Not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:-20], "Damaged compressed file"),
        ("cut.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"junk" * 9, "Damaged compressed file"),
        ("not.parquet", b"PAR1 but no more", "Cannot read the Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: bytes, title: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(rows(path))
    assert caught.value.title == title
    assert str(path) in caught.value.what
    assert caught.value.fix


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such data"):
        files_of(tmp_path / "nowhere.jsonl")


def test_a_folder_yields_data_files_except_held_out_ones(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "sub/a.csv.gz",
        "README.md",
        "train-validation.json",
        "notes.pdf",
        ".hidden.json",
        "test.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    files, note = files_of(tmp_path)
    assert [p.name for p in files] == ["b.jsonl", "a.csv.gz"]
    assert "test.json" in note


def test_a_folder_without_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No data in the folder"):
        files_of(tmp_path)


def test_kinds_go_by_the_end_of_the_name() -> None:
    names = {
        "a.JSONL": "jsonl",
        "a.json.zst": "json",
        "a.txt.gz": "text",
        "a.parquet": "parquet",
        "a.bin": "",
    }
    assert {name: kind_of(Path(name)) for name in names} == names


@pytest.mark.parametrize(("encoding", "named"), [("utf-16-le", "UTF-16LE"), ("latin-1", "LATIN1")])
def test_the_remedy_names_the_encoding_it_is_likely_in(tmp_path: Path, encoding: str, named: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\nété,oui\n".encode(encoding))
    with pytest.raises(UserError) as caught:
        open_source(Source(path=str(path)), "refuse")
    assert f"iconv -f {named} -t UTF-8" in caught.value.fix


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        files_of(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="it is not a regular file"):
        list(rows(tmp_path / "pipe.jsonl"))
