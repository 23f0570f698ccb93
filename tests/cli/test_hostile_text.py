"""Whatever a file, a model, a run or a server calls itself, the terminal obeys only this program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.terminal import Terminal
from qlora_tui.catalog import hub
from qlora_tui.chat import repl
from qlora_tui.cli import subcommand
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.status import State
from tests.catalog.models import TINY, make_gguf, make_model
from tests.cli.conftest import Call
from tests.support.hostile import FOR_FILE_NAMES, POISON, poison_run, poisoned, raw
from tests.tui.fake_runs import FakeRun, write_fake_run

STATES: tuple[State, ...] = ("finished", "failed", "stopped", "lost")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> RunDir:
    state: State = getattr(request, "param", "failed")
    poisoned_run = write_fake_run(FakeRun(name="run", state=state, steps=20, total=20, nan={3}, health=True))
    poison_run(poisoned_run)
    return poisoned_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        poisoned({"instruction": "Name", "input": "", "output": "Ada"}),
        {"instruction": POISON, "output": 3},
        {"messages": [{"role": POISON, "content": POISON}]},
        {POISON: POISON},
    ]
    file = tmp_path / f"rows{FOR_FILE_NAMES}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _is_safe(call: Call, *words: str) -> str:
    """Call with and without ``--json``; what was said without."""
    as_json = call(*words, "--json")
    assert not raw(as_json.out + as_json.err)
    for line in as_json.out.splitlines():
        json.loads(line)
    said = call(*words)
    assert not raw(said.out + said.err)
    return said.out + said.err


@pytest.mark.parametrize("run", STATES, indirect=True)
@pytest.mark.parametrize("words", [("runs",), ("attach", "run"), ("attach", "run", "--plain")])
def test_a_poisoned_run_is_told_with_symbols(call: Call, run: RunDir, words: tuple[str, ...]) -> None:
    if "--plain" in words:
        said = call(*words)
        assert not raw(said.out + said.err)
        return
    assert "␛]52;c;" in _is_safe(call, *words)


@pytest.mark.parametrize("words", [("stop",), ("pause",), ("resume",), ("ask", "run", "checkpoint")])
def test_a_refusal_over_a_poisoned_run_is_safe(call: Call, run: RunDir, words: tuple[str, ...]) -> None:
    _is_safe(call, *(words if "run" in words else (*words, "run")))


def test_names_given_on_the_command_line_come_back_safe(call: Call) -> None:
    for words in (("attach", POISON), ("estimate", "--model", POISON), ("train", "--set", POISON), (POISON,)):
        said = call(*words)
        assert said.code
        assert not raw(said.out + said.err)


def test_rows_of_data_are_shown_with_symbols(call: Call, data: Path) -> None:
    assert "␛]52;c;" in _is_safe(call, "data", "inspect", str(data))
    _is_safe(call, "data", "inspect", str(data), "--format", POISON)


def test_json_decodes_to_the_very_characters(call: Call, data: Path) -> None:
    report = call("data", "inspect", str(data), "--json").json
    assert report["files"][0]["path"] == str(data)


def test_a_file_name_that_is_not_utf8_is_shown(call: Call, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\x9b2J\xff.jsonl"
    Path(os.fsdecode(name)).write_text('{"instruction": "a", "output": "b"}\n')
    _is_safe(call, "data", "inspect", os.fsdecode(name))


@pytest.mark.slow
def test_models_are_listed_with_symbols(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(place))
    folder = make_model(tmp_path / f"model{FOR_FILE_NAMES}", {**TINY, **poisoned({"torch_dtype": "float32"})})
    gguf = make_gguf(tmp_path / f"file{FOR_FILE_NAMES}.gguf", general__architecture="llama" + POISON)
    for path in (folder, gguf):
        _is_safe(call, "estimate", "--model", str(path))
    (folder / "config.json").write_text(json.dumps(poisoned(TINY)))
    _is_safe(call, "estimate", "--model", str(folder))
    _is_safe(call, "models")


def test_an_answer_of_the_hub_is_shown_with_symbols(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "id": "org/tiny",
        "tags": ["license:mit"],
        "config": {"model_type": "llama"},
        "lastModified": "2026",
    }
    monkeypatch.setattr(hub, "get_json", lambda path, query: [poisoned(entry)])
    assert "␛]52;c;" in _is_safe(call, "models", "tiny")


def test_an_answer_in_the_chat_is_shown_with_symbols(
    call: Call, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces(*args: Any, **settings: Any) -> Iterator[TextChunk]:
        yield from (TextChunk(piece) for piece in ("\x1b", "]52;c;x\x07", POISON, "👩\u200d", "👩"))

    monkeypatch.setattr(repl, "generate_once", pieces)
    said = _is_safe(call, "chat", "run", "--prompt", "Hi")
    assert "␛]52;c;" in said and "👩\u200d👩" in said


def test_own_sequences_pass_and_foreign_ones_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    with subcommand.visible_output():
        subcommand.write_control(sys.stdout, "\x1b[1m")
        print("a\x1b[2Jb")
    assert capsys.readouterr().out == "\x1b[1ma␛[2Jb\n"


@pytest.mark.slow
def test_on_a_real_terminal_nothing_foreign_is_obeyed(run: RunDir, data: Path) -> None:
    for words in (
        ["attach", "run", "--log"],
        ["data", "inspect", str(data)],
        ["data", "inspect", str(data), "--json"],
    ):
        with Terminal([sys.executable, "-m", "qlora_tui", *words]) as seen:
            while seen.program.poll() is None or seen.read(0):
                seen.read(0.1)
            assert len(seen.painted) > 200
            assert not raw(bytes(seen.painted).replace(b"\r\n", b"\n"))
