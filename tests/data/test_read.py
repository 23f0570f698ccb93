from __future__ import annotations

import bz2
import errno
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

from qlora_tui.data.problems import BAD_ROWS
from qlora_tui.data.read import kind_of, rows
from qlora_tui.data.sources import every_source, files_of, open_source, paths_of
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source

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

NUMBERED = b"".join(b'{"a": %d}\n' % number for number in range(60_000))


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
    table = pyarrow.table({"text": ["x", "y", "z"], "label": [1, 0, -1]})
    info = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": info}), tmp_path / "named.parquet"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    twice = pyarrow.table([[1], [2]], names=["a", "a"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    assert values(tmp_path / "twice.parquet") == [{"a": 1, "a.1": 2}]
    assert values(tmp_path / "named.parquet") == [
        {"text": "x", "label": "good"},
        {"text": "y", "label": "bad"},
        {"text": "z", "label": None},
    ]
    assert values(tmp_path / "rows.parquet") == ROWS


@pytest.mark.slow
def test_an_arrow_stream_without_its_end_is_refused(tmp_path: Path) -> None:
    import pyarrow

    path, table = tmp_path / "rows.arrow", pyarrow.table({"a": [1, 2]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    assert values(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="no end-of-stream marker"):
        list(rows(path))


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
        ('[\n{"a": 1}\n]\n[{"a": 2}]', 4),
        ('{"a": 1}\n{"a": oops}\n{"a": 3}', 2),
        ('{"data": [{"a": 1}],\n "rows": [{"a": 2}]}', 1),
        ("[" * 100_000, 1),
    ],
)
def test_broken_json_is_an_error_of_the_file(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        list(rows(path))
    assert f"bad.json: Line {line}: " in caught.value.what
    assert caught.value.code not in BAD_ROWS


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("latin.jsonl", 3),
        ("latin.json", 3),
        ("lines.json", 3),
        ("latin.csv", 4),
        ("latin.csv.gz", 4),
        ("latin.tsv", 4),
        ("latin.txt", 5),
    ],
)
@pytest.mark.parametrize("damage", [b"\xfc", b"\x00"], ids=["latin-1", "nul"])
def test_an_undecodable_byte_costs_only_its_row(tmp_path: Path, name: str, line: int, damage: bytes) -> None:
    texts = ["a", "b", "?", "d", "e"]
    layout = {
        ".json": "[\n" + ",\n".join(f'{{"text": "{text}"}}' for text in texts[1:]) + "\n]",
        ".csv": "text,n\n" + "".join(f'"{text}",1\n' for text in texts),
        ".tsv": "text\tn\n" + "".join(f"{text}\t1\n" for text in texts),
        ".txt": "\n\n".join(texts),
    }
    by_line = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    kind = next((end for end in layout if end in name and name != "lines.json" and ".jsonl" not in name), "")
    content = layout.get(kind, by_line).encode().replace(b"?", damage)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    if ".json" in name and damage == b"\x00" and not name.endswith(".jsonl"):
        with pytest.raises(UserError, match=f"Line {line}: "):  # where a string ends is unknown
            list(rows(path))
        return
    read_rows = list(rows(path))
    assert [row.value["text"] for row in read_rows if not row.error] == [
        text for text in texts[kind == ".json" :] if text != "?"
    ]
    (bad,) = (row for row in read_rows if row.error)
    assert bad.kind == "bad-encoding"
    assert bad.error.startswith(f"Line {line}")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "lines.json", "rows.csv", "rows.tsv"])
def test_a_byte_put_anywhere_costs_one_row_or_the_file(tmp_path: Path, name: str) -> None:
    content, path = TEXTS[name].encode(), tmp_path / name
    refused = 0
    for position in range(len(content) + 1):
        path.write_bytes(content[:position] + b"\xff" + content[position:])
        try:
            read_rows = list(rows(path))
        except UserError:
            refused += 1
            continue
        bad = [row.number for row in read_rows if row.error]
        assert [row.value for row in read_rows if row.number not in bad] == [
            row for number, row in enumerate(ROWS, 1) if number not in bad
        ], position
        assert len(bad) == 1, position
    assert refused < len(content)


def test_an_undecodable_header_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("größe,a\n1,2\n".encode("latin-1"))
    with pytest.raises(UserError, match="iconv"):
        list(rows(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('q,a\nq1,a1\nq2,"a2\nq3,a3\n', "Line 3: a quote opens a value here, and is not closed"),
        ('q,a\n"q1\n",a1\n"q2\n","a2\n' + "q3,a3\n" * 99, "Line 5: a quote opens"),
        (
            'q,a\nq1,"a1\nq2,"a2"\nq3,a3\n',
            "Line 2: a quote opens a value here, and text follows the closing quote on line 3",
        ),
        ('q,a\nq1,"a"b\nq2,a2\n', "text follows the closing quote on line 2"),
        ('q,"a\nq1,a1\n', "Line 1: a quote opens"),
    ],
)
def test_a_quote_that_is_not_closed_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        list(rows(path))
    assert caught.value.title == "Not a table" and words in caught.value.what


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("names.csv", "a,a,,\n1,2,,\n", [{"a": "1", "a.1": "2", "": "", ".1": ""}]),
        ("quotes.csv", 'a,b\na 5" screen,"say ""hi"""\n', [{"a": 'a 5" screen', "b": 'say "hi"'}]),
        ("joined.csv", "a,b\n1,2\n\ufeffa,b\n3,4\n", [{"a": "1", "b": "2"}, None, {"a": "3", "b": "4"}]),
        ("spaces.csv", 'a,b\n"1", "2"\n 3, 4\n', [None, {"a": " 3", "b": " 4"}]),
        ("mac.csv", "a,b\n1,2\rx\n3,4\n", [None, {"a": "3", "b": "4"}]),
        ("joined.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("joined.json", '{"a": 1}\n\ufeff{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("torn.jsonl", '{"a": 1}\n{"a": ', [{"a": 1}, None]),
        ("glued.jsonl", '{"a": 1}{"a": 2}\n{"a": 3}', [None, {"a": 3}]),
        ("sets.json", '{"train": [{"a": 1}], "data": [{"a": 2}]}', [{"a": 1}]),
        (
            "one.json",
            json.dumps({"messages": [{"role": "user", "content": "a"}] * 2, "tools": [{}, {}]}),
            [{"messages": [{"role": "user", "content": "a"}] * 2, "tools": [{}, {}]}],
        ),
    ],
)
def test_nothing_of_an_odd_file_is_lost(
    tmp_path: Path, name: str, content: str, expected: list[object]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert [None if row.error else row.value for row in rows(path)] == expected


@pytest.mark.parametrize(
    ("header", "lines", "width"),
    [("q,a", [f"q{n},a{n}" for n in range(300)], 2), ("a\tb\tc", ["1\t2\t3"] * 9, 3)],
)
def test_rows_inside_one_value_are_reported_with_their_lines(
    tmp_path: Path, header: str, lines: list[str], width: int
) -> None:
    mark = "\t" if "\t" in header else ","
    path = tmp_path / ("rows.tsv" if mark == "\t" else "rows.csv")
    first, last = mark.join(["x"] * (width - 1)) + f'{mark}"12', lines[-1] + '"'
    path.write_text("\n".join([header, lines[0], first, *lines, last, lines[0]]))
    before, swallowing, after = rows(path)
    assert not before.warnings and not after.warnings
    ((kind, example),) = swallowing.warnings
    assert kind == "rows-in-value" and f"spans lines 3 to {4 + len(lines)}" in example


@pytest.mark.parametrize(
    "answer",
    [
        "Dear Ann,\n\nthanks, and see you.\nI bring wine,\nbread, cheese\nand a book.\n\nYours,\nBob",
        "Roses are red,\nviolets are blue,\nsugar is sweet,\nand so are you.\n" * 3,
        "1, 2\n3, 4\n5, 6",
        "def f(a, b):\n    return a\n\nprint(f(1, 2))\n" * 4,
    ],
)
def test_an_answer_of_several_lines_is_not_reported(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'q,a\nq1,"{answer}"\nq2,a2\n')
    assert [row.warnings for row in rows(path)] == [(), ()]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "rows.jsonl",
            '{"q": "1", "a": "x", "a": "y"}\n{"q": "\\"a\\": \\"a\\":", "a": "{\\"b\\":1}"}',
            ["'a'", ""],
        ),
        ("rows.json", '[{"q": "1", "a": {"b": 1, "b": 2}}, {"q": "1"}]', ["'b'", ""]),
        ("lines.json", '{"q": "1"}\n{"q": "1", "q": "2"}', ["", "'q'"]),
        ("held.json", '{"data": [{"q": "1"}], "data": [{"q": "2"}, {"q": "3"}]}', ["'data'", ""]),
    ],
)
def test_a_repeated_key_is_reported(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = [dict(row.warnings).get("repeated-key", "") for row in rows(path)]
    assert [bool(example) for example in found] == [bool(key) for key in expected]
    assert all(key in example for key, example in zip(expected, found, strict=True))


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
        ("junk.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"junk" * 9, "Damaged compressed file"),
        ("cut.jsonl.zst", zstandard.compress(NUMBERED)[:-9], "Damaged compressed file"),
        ("half.jsonl.zst", zstandard.compress(NUMBERED)[: -len(NUMBERED) // 50], "Damaged compressed file"),
        ("trailing.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0) + b"junk", "Damaged compressed file"),
        ("not.parquet", b"PAR1 but no more", "Cannot read the Parquet file"),
        ("table.csv", b"PK\x03\x04\x14\x00 an Excel workbook", "Not a text file"),
        ("rows.jsonl.bz2", bz2.compress(b'{"a": 1}\n'), "Not a text file"),
        ("rows.jsonl", b"PAR1 of another name", "Not a text file"),
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


FOLDER: dict[str, str] = {
    "b.jsonl": "",
    "license.csv": "",
    "sources.jsonl": "",
    "state.json": "[]",
    "sub/a.csv.gz": "",
    "sub/dataset_info.json": '{"text": "a row"}',
    "README.md": "left out",
    "dataset_info.json": '{"features": {}}',
    "info/dataset_info.json": '{"alpaca": {"file_name": "a.json"}}',
    "notes.pdf": "left out",
    "rows.jsonl.bz2": "left out",
    ".hidden.json": "left out",
    ".git/config.json": "left out",
    "test.json": "left out",
    "dev_blog.csv": "left out",
    "validation/rows.jsonl": "left out",
    "test_data/rows.jsonl": "left out",
    "heldout/rows.jsonl": "left out",
    "held-out.jsonl": "left out",
}


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    for name, content in FOLDER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path.parent / "elsewhere").mkdir()
    (tmp_path.parent / "elsewhere/linked.jsonl").write_text("")
    (tmp_path / "sub/around").symlink_to(tmp_path.parent)
    (tmp_path / "again").symlink_to(tmp_path / "elsewhere")
    files, note = files_of(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "again/linked.jsonl",
        "b.jsonl",
        "license.csv",
        "sources.jsonl",
        "state.json",
        "sub/a.csv.gz",
        "sub/dataset_info.json",
    ]
    assert note == (
        "not read: dev_blog.csv, held-out.jsonl, heldout/rows.jsonl, test.json, test_data/rows.jsonl "
        "and 1 more (named as validation or test); "
        ".git, .hidden.json (hidden); README.md, dataset_info.json, info/dataset_info.json (about the data); "
        "notes.pdf, rows.jsonl.bz2 (of an unknown kind); sub/around (a link to a folder that contains it)"
    )


@pytest.mark.parametrize(
    ("names", "validated"),
    [
        (("train.jsonl", "test.jsonl", "dev.jsonl"), ["dev.jsonl"]),
        (("train.jsonl", "test_data/a.jsonl"), ["test_data/a.jsonl"]),
        (("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"]),
    ],
)
def test_a_validation_folder_gives_the_files_named_so(
    tmp_path: Path, names: tuple[str, ...], validated: list[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (source,) = every_source(Data(validation_path=str(tmp_path)))
    paths, note = paths_of(source)
    assert [str(path.relative_to(tmp_path)) for path in paths] == validated
    assert ("not read: " in note) == (len(validated) < len(names))


def test_a_subfolder_that_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="locked: Permission denied"):
        patch.setattr(os, "scandir", refuse)
        files_of(tmp_path)


def test_a_link_to_a_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "more.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"more\.jsonl is a link to a file that does not exist"):
        files_of(tmp_path)


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


@pytest.mark.parametrize(
    ("name", "encoding", "named"),
    [
        ("rows.csv", "utf-16-le", "UTF-16LE"),
        ("rows.csv", "latin-1", "LATIN1"),
        ("rows.json", "utf-16-le", "UTF-16LE"),
        ("rows.jsonl", "utf-16-le", "UTF-16LE"),
    ],
)
def test_the_remedy_names_the_encoding_it_is_likely_in(
    tmp_path: Path, name: str, encoding: str, named: str
) -> None:
    path = tmp_path / name
    path.write_bytes("question,answer\nété,oui\n".encode(encoding))
    with pytest.raises(UserError) as caught:
        open_source(Source(path=str(path)), "refuse")
    assert f"iconv -f {named} -t UTF-8" in caught.value.fix


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        files_of(tmp_path / "pipe.jsonl")
    # A file of the kernel's has no size, and its end may never come.
    for path in (tmp_path / "pipe.jsonl", Path("/proc/version")):
        with pytest.raises(UserError, match="it is not a regular file"):
            list(rows(path))
