"""Exports that cannot end well: clear words, and nothing under the name that was asked for."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.export import export_job, gguf
from qlora_tui.export.forms import export_form
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.unfinished_files import draft_folder, publish_files, publish_new
from qlora_tui.publishing import unfinished_drafts
from qlora_tui.runs import exports
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.exports import (
    ExportRequest,
    Form,
    delete_export,
    output_path,
    read_exports,
    start_export,
)
from tests.export.export_sources import make_source
from tests.support.quick_start.fork_request import ForkRequest
from tests.support.quick_starts import ForkServer
from tests.support.trainer_processes import Trainers

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

FORMS = ("gguf", "ollama", "merge", "adapter")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ChatSource:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def run(source: ChatSource) -> RunDir:
    run = create_run(source.recipe)
    shutil.copytree(source.adapters["adapter"], run.adapter_dir)
    return run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports for Ollama go to ~/models; there is no Ollama."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")


@dataclass(frozen=True)
class Stopper:
    """Runs exports and stops them at a moment."""

    server: ForkServer
    moments: Path

    def run(
        self, what: Sequence[str] | Path, folder: Path, stop_at: int = -1, number: int = 0
    ) -> tuple[int, int]:
        """Run a command or a background export; return its exit code and its number of moments.

        It gets signal ``number`` at a moment: a file operation in ``folder``.
        """
        request = {
            **({"job": str(what)} if isinstance(what, Path) else {"arguments": what}),
            "moments": str(self.moments),
            "folder": str(folder),
            "stop_at": stop_at,
            "number": number,
        }
        with Path(os.devnull).open("r+b") as nothing:
            code = ForkRequest(
                str(self.server.socket),
                "tests.export.stopped_export",
                [json.dumps(request)],
                [nothing.fileno()] * 3,
            ).wait()
        return code, self.moments.stat().st_size


@pytest.fixture
def stopper(trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Stopper:
    trainers.server.wait_until_ready()
    return Stopper(trainers.server, tmp_path_factory.mktemp("moments") / "count")


def request_for(form: Form, folder: Path) -> tuple[ExportRequest, Path]:
    """A request of a form that writes into ``folder``, and the path that it writes."""
    if form == "ollama":
        request = ExportRequest(form=form, out="tiny", file_type="Q8_0")
    else:
        name = "model.gguf" if form == "gguf" else "model"
        request = ExportRequest(
            form=form, out=str(folder / "models" / name), file_type="Q4_K_M" if form == "gguf" else ""
        )
    out = output_path(request)
    assert out is not None
    return request, out


def export(form: Form, run: RunDir, source: ChatSource, folder: Path) -> Path:
    request, out = request_for(form, folder)
    export_form(run, request, source, "adapter", lambda words: None)
    return out


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of each file in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_export_leaves_nothing_half_and_the_next_completes(
    run: RunDir, stopper: Stopper, tmp_path: Path, form: Form
) -> None:
    out = request_for(form, tmp_path)[1]
    command = {
        "gguf": ("gguf", run.id, str(out), "--quant", "Q4_K_M"),
        "ollama": ("ollama", run.id, "tiny", "--dir", str(out)),
    }.get(form, (form, run.id, str(out)))
    arguments = ("export", *command)
    out.parent.mkdir(exist_ok=True)  # Making it is a moment of the first export only.
    code, moments = stopper.run(arguments, out.parent)
    assert code == 0 and moments > 10
    whole = content(out)
    remove(out)
    middle = [moments // 2] if form == "gguf" else []  # which the others share
    for moment in (*middle, random.randrange(1, moments + 1)):
        code, _ = stopper.run(arguments, out.parent, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL
        if out.exists():
            assert content(out) == whole
            remove(out)
        # What is listed is deleted by the next run, or by the next export.
        assert set(out.parent.glob(".*")) <= set(unfinished_drafts())
        assert stopper.run(arguments, out.parent)[0] == 0
        assert content(out) == whole and not list(out.parent.glob(".*"))
        remove(out)


def test_ctrl_c_leaves_nothing_or_all(run: RunDir, stopper: Stopper, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("export", "gguf", run.id, str(out), "--quant", "F16,Q4_K_M")
    _, moments = stopper.run(arguments, tmp_path)
    whole = content(out)
    for moment in (random.randrange(moments // 2, moments - 1), moments - 1):
        shutil.rmtree(out)
        assert stopper.run(arguments, tmp_path, moment, signal.SIGINT)[0] == 130
        out.mkdir(exist_ok=True)
        assert content(out) in ({}, whole)
        assert not list(tmp_path.glob(".*.part"))


def test_a_cancel_in_the_proof_leaves_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def report(words: str) -> None:
        said.append(words)
        if "in llama.cpp to get its answers" in words and "row 1 of" in words:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)
    monkeypatch.setattr(export_job, "_reporter", lambda folder, status: report)
    request, out = request_for("gguf", tmp_path)
    export_job.run_job(start_export(run, request).folder)
    (export,) = read_exports(run)
    assert (export.status.state, export.status.paths) == ("canceled", ())
    assert "row 1 of" in said[-1] and not list(out.parent.iterdir())
    commands = [child.cmdline() for child in psutil.Process().children()]
    assert not any("qlora_tui.export.llama_cpp.worker" in command for command in commands)
    delete_export(export)
    assert not read_exports(run)


def test_a_cancel_says_what_it_left_at_every_moment(
    run: RunDir, stopper: Stopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)
    request, out = request_for("adapter", tmp_path)
    _, moments = stopper.run(start_export(run, request).folder, out.parent)
    whole = content(out)
    states = set()
    for moment in range(1, moments + 1):
        remove(out)
        stopper.run(start_export(run, request).folder, out.parent, moment, signal.SIGTERM)
        status = read_exports(run)[0].status
        states.add((status.state, bool(status.paths)))
        assert not list(out.parent.glob(".*"))
        assert out.exists() == bool(status.paths)
        if not out.exists():
            out.mkdir()
        else:
            assert content(out) == whole
    assert ("canceled", False) in states and ("canceled", True) in states
    assert not {state for state, _ in states} - {"canceled", "finished"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form, size", [*((form, 1 << 10) for form in FORMS), ("gguf", 300 << 10)])
def test_a_file_that_cannot_be_written_is_explained(
    run: RunDir, source: ChatSource, tmp_path: Path, form: Form, size: int
) -> None:
    with (
        largest_file(size),
        pytest.raises(UserError, match=r"could not be|limit on file sizes") as failed,
    ):
        export(form, run, source, tmp_path)
    assert failed.value.fix
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_fills_up_is_explained(
    run: RunDir, source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    def full(*arguments: object) -> None:
        # As shutil does, it names what it copies.
        raise OSError(errno.ENOSPC, "No space left on device", *map(str, arguments[:1]))

    monkeypatch.setattr(gguf, "write_gguf", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device") as failed:
        export(form, run, source, tmp_path)
    assert failed.value.what == f"{request_for(form, tmp_path)[1]}: No space left on device."
    assert failed.value.fix == "Free some space, or write to another folder."
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_cannot_be_written_to_is_named(
    run: RunDir, source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    (tmp_path / "models").mkdir()
    make_folder = os.mkdir

    def refuse(path: str, mode: int = 0o777) -> None:
        if Path(path).parent == tmp_path / "models":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make_folder(path, mode)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied") as failed:
        export(form, run, source, tmp_path)
    assert failed.value.what == f"{tmp_path / 'models'}: Permission denied."
    assert "write to another folder" in failed.value.fix


@pytest.mark.parametrize("form", FORMS)
def test_two_exports_to_one_name_do_not_meet(
    run: RunDir, source: ChatSource, tmp_path: Path, form: Form
) -> None:
    out = request_for(form, tmp_path)[1]
    with (
        draft_folder(out) as draft,
        pytest.raises(UserError, match="being written by another export"),
    ):
        export(form, run, source, tmp_path)
    assert not draft.exists() and not list(out.parent.iterdir())


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
    source = make_source(tmp_path, model_type="gptj")
    said: list[str] = []
    with pytest.raises(UserError, match="cannot be exported as GGUF") as refused:
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


def test_an_existing_file_is_never_replaced(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    assert main(["export", "gguf", run.id, str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.parametrize("form", ["gguf", "merge"])
def test_a_run_without_an_adapter_is_refused(
    source: ChatSource, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(source.recipe)
    assert main(["export", form, run.id, str(tmp_path / "out.gguf")]) == 1
    assert "No adapter" in capsys.readouterr().err


def test_a_folder_that_appeared_meanwhile_is_left_alone(tmp_path: Path) -> None:
    draft, final = tmp_path / "draft", tmp_path / "final"
    draft.mkdir()
    final.mkdir()
    (final / "mine").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        publish_new(draft, final)
    assert (final / "mine").read_text() == "mine"


def test_of_several_files_all_or_none_get_their_names(tmp_path: Path) -> None:
    finals = {tmp_path / f"draft-{number}": tmp_path / f"final-{number}" for number in range(3)}
    for draft in finals:
        draft.write_text("new")
    (tmp_path / "final-1").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        publish_files(finals)
    assert (tmp_path / "final-1").read_text() == "mine"
    assert not (tmp_path / "final-0").exists() and not (tmp_path / "final-2").exists()


def test_a_file_of_another_program_outlives_a_failed_export(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("mine")
    with pytest.raises(FileNotFoundError):
        publish_files({tmp_path / "lost-draft": tmp_path / "final"})
    assert (tmp_path / "final").read_text() == "mine"
