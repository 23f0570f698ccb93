"""``qlora-tui export`` and the process of a background export."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.cli.export import _types
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.export import export_job, forms
from qlora_tui.export.gguf import check_file_types
from qlora_tui.export.unfinished_files import require_space
from qlora_tui.runs import exports
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.exports import Export, ExportRequest, lock_path, read_exports, start_export
from qlora_tui.tui.screens.runs.export_dialog import export_detail
from tests.support.polling import while_it_sleeps

pytestmark = pytest.mark.slow


def test_merging_a_run_twice_is_a_usage_error(
    tiny_source: ChatSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    out = tmp_path / "merged"
    assert main(["export", "merge", run.id, str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    check = said.pop("check")
    assert said.pop("base")["chosen"] == "dequantized"
    assert check["agrees"] and check["same_choices"] == check["tokens"] > 8
    assert said == {
        "folder": str(out),
        "bytes": sum(f.stat().st_size for f in out.iterdir()),
        "changed_weights": 14,
        "unchecked_because": "",
    }
    assert main(["export", "merge", run.id, str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("bound", ["-1", "0", "nan", "inf", "near"])
def test_a_bound_that_is_no_bound_is_a_usage_error(bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "gguf", "last", "out.gguf", "--within", bound])
    assert ended.value.code == 2
    assert "must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("types", "error"), [("auto,Q8_0", "auto alone"), ("q4_k_m, q9", "q9 is not a type"), ("Auto,auto", "")]
)
def test_types_are_read_in_any_case(types: str, error: str) -> None:
    kinds = _types(types).split(",")
    if not error:
        assert kinds == ["auto", "auto"]
        return
    with pytest.raises(UserError) as refused:
        check_file_types([kind for kind in kinds if kind != "Q4_K_M"])
    assert error in str(refused.value) and len(kinds) == 2


def test_a_file_system_without_a_size_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    require_space(tmp_path / "out", 10, "The file")


def test_a_refused_type_ends_the_command_with_an_error(
    tiny_source: ChatSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    result = ExportRequest(form="gguf", out="m.gguf")
    written = forms.Written(
        result=result, sizes={"m.gguf": 7}, summary="", command="", problem="Q2_K: too far."
    )
    monkeypatch.setattr(forms, "export_form", lambda *arguments: written)
    assert main(["export", "gguf", run.id, str(tmp_path), "--quant", "Q8_0,Q2_K"]) == 1
    output = capsys.readouterr()
    assert "m.gguf: 7 bytes" in output.out and "Refused: Q2_K: too far." in output.err


WRITTEN = forms.Written(
    result=ExportRequest(form="gguf", out="/models/m.gguf"),
    sizes={"/models/m.gguf": 7},
    summary="It is near.",
    command="run it",
)


@pytest.fixture
def run(tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(exports, "start_detached", lambda *args, **how: None)
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    return run


def start(run: RunDir) -> Export:
    return start_export(run, ExportRequest(form="gguf", out=str(run.path / "m.gguf"), file_type="F16"))


def do_job(
    export: Export, monkeypatch: pytest.MonkeyPatch, work: Callable[[Callable[[str], None]], None]
) -> None:
    """Run a job whose export is ``work``, which gets the function that takes its progress."""

    def export_form(
        run: RunDir, request: object, source: object, name: str, on_status: Callable[[str], None]
    ) -> forms.Written:
        work(on_status)
        return WRITTEN

    monkeypatch.setattr(forms, "export_form", export_form)
    export_job.run_job(export.folder)


def activity(run: RunDir) -> str:
    return read_exports(run)[0].status.activity


def test_the_last_words_of_an_export_are_always_shown(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def work(on_status: Callable[[str], None]) -> None:
        for words in ("Writing: 90%", "Writing: 100%", "Running the file"):
            on_status(words)
            shown.append(activity(run))

    do_job(start(run), monkeypatch, work)
    assert shown == ["Writing: 90%", "Writing: 100%", "Running the file"]
    status = read_exports(run)[0].status
    assert (status.state, status.paths) == ("finished", tuple(WRITTEN.sizes))


def test_a_job_waits_while_a_reader_probes_its_lock(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    export = start(run)
    lock_path(export.folder).touch()
    reader = os.open(lock_path(export.folder), os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    while_it_sleeps(monkeypatch, lambda: fcntl.flock(reader, fcntl.LOCK_UN))
    do_job(export, monkeypatch, lambda on_status: None)
    os.close(reader)
    assert read_exports(run)[0].status.state == "finished"


def test_a_cancel_after_the_file_has_its_name_names_it(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(on_status: Callable[[str], None]) -> None:
        (run.path / "m.gguf").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    do_job(start(run), monkeypatch, work)
    status = read_exports(run)[0].status
    assert (status.state, status.paths) == ("canceled", (str(run.path / "m.gguf"),))


def test_a_disk_error_is_no_internal_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(on_status: Callable[[str], None]) -> None:
        (run.path / "gone").read_bytes()

    do_job(start(run), monkeypatch, work)
    status = read_exports(run)[0].status
    assert status.state == "failed"
    assert status.problem.startswith(f"The export could not be written: {run.path / 'gone'}: No such file")


def test_a_job_with_a_refused_type_names_what_is_there(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    export = start(run)
    written = replace(WRITTEN, problem="Q2_K: too far.")
    monkeypatch.setattr(forms, "export_form", lambda *arguments: written)
    export_job.run_job(export.folder)
    (after,) = read_exports(run)
    assert after.status.state == "failed" and after.status.paths == ("/models/m.gguf",)
    assert "Q2_K: too far.\nWritten: /models/m.gguf" in export_detail(after)
