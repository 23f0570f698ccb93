"""What a box says of itself arrives as it was: values as JSON, and back."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw, ValidationError

from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.cli import store
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError
from qlora_tui.remote.link import _with_paths
from qlora_tui.remote.messages import Call, Reply, from_json, to_json
from qlora_tui.remote.mirror import Mirror
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.notify import RunNotification
from qlora_tui.runs.status import Status
from qlora_tui.tui.system_monitor import BoxMonitor
from qlora_tui.tui.system_status import Host, RunningExport, SystemStatus
from tests.support.polling import wait_for


def test_the_status_of_a_box_arrives_whole() -> None:
    gpu = GpuDevice(0, "NVIDIA GeForce RTX 4090", "GPU-1", 24 << 30, "8.9", "580")
    news = RunNotification(
        event="finished", run="a", name="a", text="a is finished.", step=1, total_steps=1, best_loss=None
    )
    said = SystemStatus(
        is_known=True,
        gpu=gpu,
        gpu_metrics=GpuMetrics(at=1.0, index=0, memory_used_bytes=5, utilization_percent=99),
        gpu_problem=UserError("a", what="b", fix="c"),
        no_gpu=GpuUnavailableError(GpuUnavailableReason.LOST, "why"),
        active=RunDir(Path("/there/runs/a")),
        active_status=Status(state="running", at=1.0, step=3, hold=Hold(cause="hours")),
        also_active=(RunDir(Path("/there/runs/c")),),
        also_active_statuses=(Status(state="running", at=1.0, step=4),),
        other_gpus=(gpu,),
        other_gpu_metrics=(None,),
        waiting_ids=("b",),
        exports=(RunningExport("a", "Q8_0"),),
        ended_runs=(news,),
        host=Host(1, 2, None),
    )
    link: Any = SimpleNamespace(
        machine_states=lambda: [to_json(said)],
        here=lambda encoded: bytes(encoded).replace(b"/there", b"/here"),
        box=SimpleNamespace(name="box"),
        problem=None,
        silent_s=0.0,
        sending="",
    )
    heard = BoxMonitor(link).poll_and_recover()
    assert heard.active == RunDir(Path("/here/runs/a"))
    assert (heard.gpu, heard.gpu_metrics, heard.host) == (gpu, said.gpu_metrics, said.host)
    assert (heard.active_status, heard.exports, heard.ended_runs) == (
        said.active_status,
        said.exports,
        said.ended_runs,
    )
    assert heard.no_gpu is not None
    assert heard.trains_on == said.trains_on == "none"
    assert (heard.no_gpu.why, heard.box) == ("why", "box")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MissingFilesError("a", what="b", fix="c"), MissingFilesError),
        # What it adds is not sent.
        (InvalidRecipeError([]), UserError),
    ],
)
def test_errors_keep_their_words(error: UserError, kind: type[UserError]) -> None:
    arrived = from_json(to_json(error), UserError)
    assert (type(arrived), arrived.fields()) == (kind, error.fields())


def test_a_class_that_is_not_an_error_of_this_program_is_not_made() -> None:
    fields = UserError("a", what="b").fields()
    for name in ("os:system", "qlora_tui.remote.ssh:Box", "qlora_tui.no:Such"):
        record = to_json({"class": name, "fields": fields, "made_of": []})
        assert type(from_json(record, UserError)) is UserError
    for wrong in (1, {}, {"class": "", "fields": {"x": 1}, "made_of": []}, {"class": [], "made_of": 1}):
        with pytest.raises(ValidationError):
            from_json(to_json(wrong), UserError)


def test_the_app_refuses_a_gpu_of_another_box(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "box", "--gpu", "1"]) == 2
    assert "--gpu cannot be used for the app with --host" in capsys.readouterr().err


def test_a_request_that_is_repeated_while_it_runs_waits_for_its_result(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, go = list[str](), threading.Event()

    def reply(call: Call) -> Reply:
        calls.append(call.id)
        go.wait(20)
        return Reply(call.id)

    monkeypatch.setattr(store, "_reply", reply)
    call = Call("a1", "qlora_tui.runs.actions:stop", Raw(b"{}"), True)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(store._once, call, threading.Event()) for _ in range(2)]
        wait_for(lambda: calls)
        app_gone = threading.Event()
        app_gone.set()
        with pytest.raises(InterruptedError):
            store._once(call, app_gone)
        go.set()
        assert [each.result().id for each in both] == ["a1", "a1"]
    assert calls == ["a1"]


def test_a_request_is_not_done_twice_though_its_outcome_could_not_be_kept(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()

    def reply(call: Call) -> Reply:
        calls.append(call.id)
        monkeypatch.setattr(store, "_write_record", full)
        return Reply(call.id)

    def full(handle: int, record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_reply", reply)
    call = Call("a1", "qlora_tui.runs.actions:stop", Raw(b"{}"), True)
    assert not store._once(call, threading.Event()).failed
    assert b"may have been carried out" in bytes(store._once(call, threading.Event()).error)
    assert calls == ["a1"]


def test_the_copy_of_a_run_follows_what_is_there(private_home: Path) -> None:
    run = create_run(Recipe())
    copy = RunDir(run.path.parent.parent / "copy/runs" / run.id)
    files, mirror = store._RunFiles(()), Mirror(copy.path.parent.parent)

    def follow() -> None:
        files._changed_at.clear()
        for change in files.changes():
            mirror.apply(change)  # type: ignore[arg-type]

    for content in (b"one", b"one two", b"", b"x", b"xy"):
        run.log_path.write_bytes(content)
        follow()
        assert copy.log_path.read_bytes() == content
    # A file, then a folder of its name, then a file again.
    place, inside = run.path / "place", "a b'\"\n\x1b[31m/c"
    place.write_text("file")
    follow()
    place.unlink()
    (place / inside).parent.mkdir(parents=True)
    (place / inside).write_text("inside")
    follow()
    assert (copy.path / "place" / inside).read_text() == "inside"
    shutil.rmtree(place)
    follow()
    assert not (copy.path / "place").exists() and copy.path.is_dir()
    place.write_text("file")
    follow()
    assert (copy.path / "place").read_text() == "file"


def test_paths_are_those_of_the_other_side() -> None:
    said = b'{"/m/runs/a": ["/m", "/mm/x", "see /m/x", "/m/data.jsonl", 1]}'
    there = _with_paths(said, {"/m": "/box", "/m/data.jsonl": "/box/uploads/1/data.jsonl"})
    assert json.loads(bytes(there)) == {
        "/box/runs/a": ["/box", "/mm/x", "see /m/x", "/box/uploads/1/data.jsonl", 1]
    }
