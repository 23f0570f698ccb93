"""Chat templates by third parties are bounded in time and memory, and their errors are explained.

Tokenizers by third parties that take unbounded memory or time are rejected with an explanation.

Damaged Arrow and Parquet files are read or refused; none ends the process that reads them.

Files that describe far more than they hold are refused early, and never take the memory of the machine.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from qlora_tui.data import chat_template, read, text_reader
from qlora_tui.data import row as bounds
from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError
from qlora_tui.data.confined import Confined
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.inspection import inspect
from qlora_tui.data.read import row_at, rows
from qlora_tui.data.render import prompt_ids, render
from qlora_tui.data.row import (
    DEEPEST,
    LARGEST_ROW_BYTES,
    MAX_CHARACTERS,
    MAX_VALUES,
    MAX_VALUES_IN_LINE,
)
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tokenizer_files import LONGEST_TOKEN, MAX_BYTES, check_tokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Source
from tests.data.families import CHATML, family, tokenizer_for, tokenizer_json

pytestmark = pytest.mark.slow

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{show}"
)
SLOW = {
    "loops": ENDLESS,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{{ ([range(99999)] * 99999) | map('sum') | sum }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "sum of lists": "{{ ([[0] * 2000] * 20000) | sum(start=[]) | length }}",
    "comparison": "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "hash": "{% set ns = namespace(a=(0,)) %}{% for i in range(60) %}"
    "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
}
LARGE = {
    "width of %": "{{ '%0999999999d' % 1 }}",
    "width of a filter": "{{ '%0999999999d' | format(1) }}",
    "width of format": "{{ '{:0999999999d}'.format(1) }}",
    "sum of texts": GROWING.format(start="'ab'", step="ns.x + ns.x", show="{{ ns.x }}"),
    "joined texts": GROWING.format(start="'ab'", step="ns.x ~ ns.x", show="{{ ns.x }}"),
    "repeated text": "{{ 'a' * 9999999999 }}",
    "repeated list": "{{ [1] * 9999999999 }}",
    "lists in lists": GROWING.format(start="[1]", step="[ns.x, ns.x]", show="{{ ns.x }}"),
    "json of lists": GROWING.format(start="[1]", step="[ns.x, ns.x]", show="{{ ns.x | tojson }}"),
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "center": "{{ 'a' | center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "tabs": "{{ '\t'.expandtabs(9999999999) }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "indent of json": "{{ messages | tojson(indent=999999999) }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "join": "{{ ('a' * 99999) | join('b' * 99999) }}",
    "batch": "{{ [1] | batch(9999999999, 1) | list | length }}",
}
FAILING = {
    "of a variable": "{{ nothing.at.all }}",
    "of an index": "{{ messages[9].content }}",
    "of a call": "{{ messages() }}",
    "of recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "of its own": "{{ raise_exception('no') }}",
    "of half a character": "{{ messages[0].content ~ '\\ud800' }}",
}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[Confined]:
    """End a rendering after a tenth of a second, which is what the test then takes, or at 32 MiB."""
    child = Confined("qlora_tui.data.chat_template", cpu_s=0.1, memory_bytes=32 << 20)
    monkeypatch.setattr(chat_template, "_renderer", child)
    yield child
    child.close()


def refusal_of_template(text: str) -> str:
    """Why the template gives nothing, compiled or rendered."""
    try:
        with pytest.raises(RowRejectedError) as refused:
            ChatTemplate(text, {}).render(TURNS)
        return refused.value.reason
    except TemplateCompileError as broken:
        return str(broken)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", SLOW)
def test_a_template_without_end_is_stopped(name: str) -> None:
    assert "takes more than 0.1 seconds" in refusal_of_template(SLOW[name])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_takes_all_memory_is_stopped(name: str) -> None:
    assert re.search("takes more than|Error", refusal_of_template(LARGE[name]))


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_told_in_words(name: str) -> None:
    assert refusal_of_template(FAILING[name]).startswith("The template ")


def test_a_template_that_was_stopped_is_not_tried_again(
    brief: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = ChatTemplate(SLOW["loops"], {})
    with pytest.raises(RowRejectedError):
        endless.render(TURNS)
    monkeypatch.setattr(brief, "call", None)
    for tried in (endless, endless.with_variables({"enable_thinking": False})):
        with pytest.raises(RowRejectedError, match="takes more than"):
            tried.render(TURNS)


def test_a_template_that_exhausts_memory_thrice_is_not_tried_again(
    brief: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, reasons = ChatTemplate("{{ 'a' * 9999999999 }}", {}), set()
    for number in range(4):
        if number == 3:
            monkeypatch.setattr(brief, "call", None)
        with pytest.raises(RowRejectedError) as refused:
            template.render(TURNS)
        reasons.add(refused.value.reason)
    assert reasons == {"The template takes more than 32 MiB for one conversation."}


def test_other_templates_are_rendered_after_one_was_killed(brief: Confined) -> None:
    good = ChatTemplate(CHATML, {})
    expected, first_pid = good.render(TURNS), brief.pid
    refusal_of_template(SLOW["loops"])
    assert good.render(TURNS) == expected
    assert brief.pid not in (None, first_pid)


def test_threads_take_turns(brief: Confined) -> None:
    good = ChatTemplate(CHATML, {})
    threads = [threading.Thread(target=refusal_of_template, args=(SLOW["loops"],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    rendered = {good.render(TURNS) for _ in range(100)}
    for thread in threads:
        thread.join()
    assert len(rendered) == 1


@pytest.mark.parametrize("text", ["hello", "{{ bos_token }}", "{% for m in messages %}{% endfor %}"])
def test_a_template_that_ignores_its_messages_is_refused_in_words(text: str) -> None:
    tokenizer = tokenizer_for(text)
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
    with pytest.raises(RowRejectedError, match="omits the assistant's turns"):
        render(conversation, tokenizer)
    prompt_ids([Message("user", "Hi")], tokenizer)


def replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def normalizers(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


BOMB = [replace("e", "e" * 1000)] * 3
EXPANDS = "one character into more than 16"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": (normalizers(*BOMB), EXPANDS),
    "normalizer in words": (normalizers(*[replace("e", "ee")] * 30), EXPANDS),
    "nested normalizer": (normalizers(*normalizers(*BOMB).values()), EXPANDS),
    "replacement by a pattern": (
        normalizers({"type": "Replace", "pattern": {"Regex": ""}, "content": "e" * 100}),
        EXPANDS,
    ),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": BOMB}}, EXPANDS),
    "steps": (normalizers(*[{"type": "NFC"}] * 100), "more than 64 steps"),
    "pattern": ({"pre_tokenizer": split("(x+x+)+y")}, "retry-limit-in-match over"),
}


def tokenizer(folder: Path, **changes: Any) -> ChatTokenizer:
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer_json()), **changes}))
    return ChatTokenizer.from_folder(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_without_bounds_is_refused_in_words(name: str, tmp_path: Path) -> None:
    changes, reason = HOSTILE[name]
    with pytest.raises(UserError) as refused:
        tokenizer(tmp_path, **changes)
    assert reason in refused.value.what


def test_a_token_of_absurd_length_is_refused(tmp_path: Path) -> None:
    content = json.loads(tokenizer_json())
    content["model"]["vocab"]["x" * (LONGEST_TOKEN + 1)] = len(content["model"]["vocab"])
    with pytest.raises(UserError, match="Broken tokenizer") as refused:
        tokenizer(tmp_path, model=content["model"])
    assert "a token of more than 4,096 characters" in refused.value.what


def test_a_tokenizer_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError) as refused:
        ChatTokenizer.from_folder(tmp_path)
    assert "larger than 64 MiB" in refused.value.what


def test_a_tokenizer_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":' * 10_000)
    with pytest.raises(UserError, match="Broken tokenizer"):
        ChatTokenizer.from_folder(tmp_path)


def test_the_steps_of_real_tokenizers_are_within_the_bounds() -> None:
    llama = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]
    albert = [replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}]
    for steps in (llama, albert):
        content = {**json.loads(tokenizer_json()), "normalizer": {"type": "Sequence", "normalizers": steps}}
        assert check_tokenizer(content) <= 2


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


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damaged_tables_are_read_or_refused_and_crash_nothing(tmp_path: Path, kind: str) -> None:
    # In a separate process: a crash there is a failure here.
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.test_hostile", kind, str(tmp_path)],
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


MIB = 1 << 20
PEAK = """
import sys
from pathlib import Path
from qlora_tui.cli import main
codes = {main(["data", "inspect", path]) for path in sys.argv[1:]}
# Not ru_maxrss, which counts the process that started this one.
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)
sys.exit(codes != {1})
"""


def zst(path: Path, pieces: Iterator[bytes]) -> Path:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for piece in pieces:
            writer.write(piece)
    return path


def mebibytes(piece: bytes, start: bytes = b"", *, count: int) -> Iterator[bytes]:
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
        ("line.jsonl.zst", b"{}\n", b"a", "line 2 is larger than 2 MiB"),
        ("line.txt.zst", b"", b"a", "line 1 is larger than 2 MiB"),
        ("paragraph.txt.zst", b"1\n\n", b"aaaaaaa\n", "that begins on line 3 is larger than 2 MiB"),
        ("cell.csv.zst", b'a,b\n1,2\n3,"', b"aaaaaaa\n", "row 2 is larger than 2 MiB"),
        ("cells.csv.zst", b"a,b\n1,2\n", b",", "line 3 is larger than 2 MiB"),
        ("cells.tsv.zst", b"a\tb\n1\t2\n", b'"\n"\t\t\t\t\t', "row 2 is larger than 2 MiB"),
    ],
)
def test_a_row_over_the_bound_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: bytes, piece: bytes, place: str
) -> None:
    for module in (bounds, read, text_reader):
        monkeypatch.setattr(module, "LARGEST_ROW_BYTES", 2 * MIB)
    assert place in refusal(zst(tmp_path / name, mebibytes(piece, start, count=3)))


def test_a_long_line_under_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * (LARGEST_ROW_BYTES + MIB), 1))
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
    assert "the limit is 2,000,000" in problem.example
    assert report.counts.samples == 1


def test_one_row_of_a_long_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"a" * (LARGEST_ROW_BYTES + MIB))
    row = row_at(path, 2)
    assert row is not None and "larger than 16 MiB" in row.error


def _texts(values: int, size: int) -> Any:
    """The same text many times, of which a file holds one."""
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * values, pyarrow.int32()), ["x" * size])


def _in_one_row() -> Any:
    import pyarrow

    return pyarrow.ListArray.from_arrays(pyarrow.array([0, 2000], pyarrow.int32()), _texts(2000, MIB))


EXPANDING: dict[str, tuple[Callable[[], Any], str]] = {
    "rows.parquet": (lambda: _texts(100_000, MIB), "more than 1,000 to 1"),
    "one-row.arrow": (_in_one_row, "takes more than 448 MiB"),
    "compressed.arrow": (lambda: ["x" * 500 * MIB], "takes more than 448 MiB"),
}


def test_tables_that_expand_endlessly_are_rejected_within_a_gigabyte(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    zstd = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    for name, (column, _) in EXPANDING.items():
        table = pyarrow.table({"text": column()})
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(table, tmp_path / name, compression="zstd")
        else:
            with pyarrow.ipc.new_stream(tmp_path / name, table.schema, options=zstd) as writer:
                writer.write_table(table)
        assert (tmp_path / name).stat().st_size < MIB
    paths = [tmp_path / name for name in EXPANDING]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusals = done.stderr.split("qlora-tui: ")[1:]
    for path, (_, says), refused in zip(paths, EXPANDING.values(), refusals, strict=True):
        assert str(path) in refused and says in refused
    assert int(done.stdout.splitlines()[-1]) < 1000
