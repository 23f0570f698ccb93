"""Exports that cannot end well: clear words, and nothing under the name that was asked for."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.export import gguf_export
from qlora_tui.export.gguf_export import export_gguf
from qlora_tui.export.unfinished_files import draft_folder, publish_file, publish_new
from qlora_tui.runs.directory import RunDir, create_run
from tests.export.export_sources import make_source

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ChatSource:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def run(source: ChatSource) -> RunDir:
    run = create_run(source.recipe)
    shutil.copytree(source.adapters["adapter"], run.adapter_dir)
    return run


class Forkserver:
    """Runs ``qlora-tui`` and stops it where its progress has come to a line."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.export.export_forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def run(self, *arguments: str, stop_at: int = -1, number: int = 0) -> tuple[int, list[str]]:
        """Run a command; return its exit code and progress. It gets signal ``number`` after a line."""
        assert self._process.stdin
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "stop_at": stop_at,
            "number": number,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, lines = json.loads(self._read())
        return code, lines

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def forkserver() -> Iterator[Forkserver]:
    server = Forkserver()
    yield server
    server.close()


def hidden(folder: Path) -> list[Path]:
    return list(folder.glob(".*")) if folder.exists() else []


def test_kills_at_random_moments_leave_no_unfinished_file(
    run: RunDir, forkserver: Forkserver, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "model.gguf"
    arguments = ("export", "gguf", run.id, str(out), "--quant", "Q4_K_M")
    code, progress = forkserver.run(*arguments)
    assert code == 0 and len(progress) > 15, progress
    whole = out.read_bytes()
    out.unlink()
    left = 0
    for _ in range(KILLS):
        moment = random.randrange(1, len(progress) - 2)
        code, _ = forkserver.run(*arguments, stop_at=moment, number=signal.SIGKILL)
        assert code == -signal.SIGKILL and not out.exists()
        assert len(hidden(out.parent)) <= 1
        left += len(hidden(out.parent))
    assert left
    assert forkserver.run(*arguments)[0] == 0
    assert out.read_bytes() == whole and not hidden(out.parent)


def test_ctrl_c_leaves_nothing(run: RunDir, forkserver: Forkserver, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("export", "gguf", run.id, str(out), "--quant", "F16,Q4_K_M")
    code, progress = forkserver.run(*arguments, stop_at=12, number=signal.SIGINT)
    assert (code, len(progress)) == (130, 12)
    assert not out.exists() and not hidden(tmp_path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("size", [1 << 10, 300 << 10])
def test_a_file_that_cannot_be_written_is_explained(
    source: ChatSource, tmp_path: Path, kind: str, size: int
) -> None:
    with largest_file(size), pytest.raises(UserError, match=r"could not be|limit on file sizes") as failed:
        export_gguf(source, "adapter", tmp_path / "out" / "model.gguf", [kind])
    assert failed.value.fix
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_fills_up_is_explained(
    source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_export, "write_gguf", full)
    with pytest.raises(UserError, match="No space left on device") as failed:
        export_gguf(source, "adapter", tmp_path / "out" / "model.gguf", ["F16"])
    assert "Free some space" in failed.value.fix
    assert not list((tmp_path / "out").iterdir())


def test_too_little_space_is_noticed_before_anything_is_computed(
    source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said: list[str] = []
    with pytest.raises(UserError, match="Not enough disk space"):
        export_gguf(source, "adapter", tmp_path / "out", ["F16"], on_status=said.append)
    assert not said and not (tmp_path / "out").exists()


def test_a_family_without_a_table_is_refused_at_once(tmp_path: Path) -> None:
    source = make_source(tmp_path, model_type="cohere")
    said: list[str] = []
    with pytest.raises(UserError, match="This family cannot be exported") as refused:
        export_gguf(source, "adapter", tmp_path / "out.gguf", ["F16"], on_status=said.append)
    assert "export merge" in refused.value.fix and not said


def test_a_base_that_is_gone_is_named(source: ChatSource, tmp_path: Path) -> None:
    gone = replace(source, recipe=replace(source.recipe, model=replace(source.recipe.model, id="/no/model")))
    with pytest.raises(UserError, match="/no/model"):
        export_gguf(gone, "adapter", tmp_path / "out.gguf", ["F16"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_explained(source: ChatSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory|could not be written|exists"):
        export_gguf(source, "adapter", tmp_path / "file" / "model.gguf", ["F16"])


@pytest.mark.parametrize("form", ["gguf", "lora"])
def test_an_existing_file_is_never_replaced(
    run: RunDir, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    assert main(["export", form, run.id, str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.parametrize("form", ["gguf", "lora"])
def test_a_run_without_an_adapter_is_refused(
    source: ChatSource, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(source.recipe)
    assert main(["export", form, run.id, str(tmp_path / "out.gguf")]) == 1
    assert "No adapter yet" in capsys.readouterr().err


def test_a_second_export_to_a_name_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with draft_folder(out) as draft:
        (draft / "part").touch()
        with pytest.raises(UserError, match="being written by another export"), draft_folder(out):
            pass
        assert (draft / "part").exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appeared_meanwhile_is_left_alone(tmp_path: Path) -> None:
    draft, final = tmp_path / "draft", tmp_path / "final"
    draft.mkdir()
    final.mkdir()
    (final / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        publish_new(draft, final)
    assert (final / "mine").read_text() == "mine"


def test_a_file_that_appeared_meanwhile_is_left_alone(tmp_path: Path) -> None:
    draft, final = tmp_path / "draft", tmp_path / "final"
    draft.write_text("new")
    final.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        publish_file(draft, final)
    assert final.read_text() == "mine"
