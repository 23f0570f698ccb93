"""An app's link to a box behind a real sshd: what it shows, and what it asks for, whatever the line does."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest

from qlora_tui import paths
from qlora_tui.catalog.local_models import list_local_models
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.cli import store
from qlora_tui.data.dataset_report import Report
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import InspectData
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.remote import calls, uploads
from qlora_tui.remote import link as links
from qlora_tui.remote.link import Link
from qlora_tui.remote.messages import Call, Piece
from qlora_tui.remote.mirror import Mirror
from qlora_tui.remote.ssh import Box
from qlora_tui.runs import actions, control, run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.doctor import CheckKind, check_system
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.expected_time import forecast
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.run_queue import mark_not_queued
from qlora_tui.runs.status import Status, read_status, write_status
from qlora_tui.tui.system_status import SystemStatus
from tests.remote.sshd import FakeBox
from tests.support.polling import wait_for
from tests.support.step_events import a_step

pytestmark = pytest.mark.slow
RECIPE = Recipe(model=Model(id="org/model"), data=Data(sources=(Source(path="rows.jsonl"),)), name="alpha")


def on_box(box: FakeBox, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Create a run on the box."""
    here = str(paths.state_dir().parent)
    monkeypatch.setenv("XDG_STATE_HOME", str(box.state_home))
    run = create_run(RECIPE)
    mark_not_queued(run, "Not queued.")
    monkeypatch.setenv("XDG_STATE_HOME", here)
    return run


@pytest.fixture
def run_there(box: FakeBox, monkeypatch: pytest.MonkeyPatch, private_home: Path) -> RunDir:
    return on_box(box, monkeypatch)


@pytest.fixture
def link(run_there: RunDir, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_STATE_HOME", str(links.mirror_home("box")))
    link = Link(Box("box", asks=False), paths.state_dir())
    link.open()
    calls.use(link)
    yield link
    calls.use(None)
    link.close()


def test_runs_of_the_box_are_read_here(link: Link, run_there: RunDir) -> None:
    (run,) = all_runs()
    assert (run.id, run.recipe().name) == (run_there.id, "alpha")
    assert read_status(run).state == "stopped"
    (run_there.path / "adapter").mkdir()
    (run_there.path / "adapter/adapter_model.safetensors").write_bytes(b"x" * 100_000)
    log = EventWriter(run_there.events_path)
    log.append(a_step(1))
    weights = run.adapter_dir / "adapter_model.safetensors"
    wait_for(lambda: run.events_path.read_bytes() == run_there.events_path.read_bytes(), seconds=20)
    wait_for(weights.exists, seconds=20)
    assert (weights.stat().st_size, weights.stat().st_blocks) == (100_000, 0)


def test_what_is_asked_for_is_done_on_the_box(
    link: Link, run_there: RunDir, box: FakeBox, tmp_path: Path
) -> None:
    (run,) = all_runs()
    actions.rename(run, "better")
    assert run_there.name == "better"
    wait_for(lambda: run.name == "better", seconds=20)
    with pytest.raises(UserError, match="run"):
        actions.rename(run, "x" * 200)
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"text": "hello"}\n')
    new = actions.submit(msgspec.structs.replace(RECIPE, data=Data(sources=(Source(path=str(rows)),))))
    assert new.path.parent == run.path.parent
    source = RunDir(run_there.path.with_name(new.id)).recipe().data.sources[0].path
    assert source.startswith(str(box.state_home)) and Path(source).read_text() == rows.read_text()
    wait_for(lambda: new.id in {each.id for each in all_runs()}, seconds=20)
    run_queue.cancel(new)
    actions.move_to_trash(run)
    wait_for(lambda: run.id not in {each.id for each in all_runs()}, seconds=20)
    assert [trashed.run.id for trashed in actions.trashed_runs()] == [run.id]


def test_a_box_chooses_no_files_of_this_machine(
    link: Link, run_there: RunDir, box: FakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, rows = tmp_path / "id_ed25519", tmp_path / "rows.jsonl"
    for file in (secret, rows):
        file.write_text("private")
    recipe = run_there.recipe_path.read_text()
    atomic_write(run_there.recipe_path, recipe.replace("rows.jsonl", str(secret)).encode())
    (run,) = all_runs()
    wait_for(lambda: run.recipe().data.sources[0].path == str(secret), seconds=20)
    taken = run.recipe()
    # This box has the files of this machine, so that the run's data are those here.
    link.send_data(taken)
    secret.write_text("private, changed")
    with monkeypatch.context() as patch:
        patch.setattr(link, "call", lambda *_, **__: uploads.data_hash(str(rows)))
        with pytest.raises(UserError, match="is different"):
            link.send_data(taken)
    assert not list(box.state_home.rglob("id_ed25519"))
    link.send_data(Source(path=str(rows)))
    assert list(box.state_home.rglob("rows.jsonl"))


def test_nothing_is_lost_or_done_twice_while_the_line_is_cut(
    link: Link, run_there: RunDir, box: FakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(links, "_UNCONFIRMED_S", 60.0)
    (run,) = all_runs()
    is_over, seed, cuts = threading.Event(), random.randrange(10**6), []
    write_status(run_there, Status(state="running", at=time.time(), process=process_identity()))
    dice, log = random.Random(seed), EventWriter(run_there.events_path)

    def cut() -> None:
        while not is_over.wait(dice.uniform(0.5, 4.0)):
            cuts.append(box.cut())

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        for number in itertools.takewhile(lambda n: n < 10 or sum(cuts) < 3, itertools.count(1)):
            log.append(a_step(number))
            ask(run, number)
    finally:
        is_over.set()
        cutter.join()
    wait_for(lambda: run.events_path.read_bytes() == run_there.events_path.read_bytes(), seconds=30)
    asked = [request.value for request in control.take_requests(run_there)]
    assert asked == list(range(1, len(asked) + 1)) and len(asked) >= 9, seed


def ask(run: RunDir, value: float) -> None:
    """Ask for a learning rate until the line is there to ask."""
    while True:
        try:
            return control.send_request(run, "set_learning_rate", value)
        except UserError as error:
            assert "does not answer" in error.title


def test_a_request_without_an_answer_is_carried_out_later_and_reported(
    link: Link, run_there: RunDir, box: FakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "LATE_S", 1.5)
    monkeypatch.setattr(links, "_UNCONFIRMED_S", 0.5)
    (run,) = all_runs()
    box.cut(signal.SIGSTOP)
    with pytest.raises(UserError, match="has not confirmed"):
        actions.rename(run, "late")
    box.cut(signal.SIGCONT)
    assert wait_for(lambda: list(link.late_replies), seconds=30) == [
        "The request that was not confirmed has been carried out."
    ]
    assert run_there.name == "late"


def test_a_killed_store_is_started_again(link: Link, run_there: RunDir, box: FakeBox) -> None:
    (run,) = all_runs()
    (store,) = box.processes("-m qlora_tui store stream")
    os.kill(store, signal.SIGKILL)
    wait_for(lambda: not link.is_connected, seconds=20)
    wait_for(lambda: link.is_connected, seconds=20)
    actions.rename(run, "later")
    assert run_there.name == "later"


def test_a_full_disk_here_is_not_said_to_be_a_silent_box(
    link: Link, run_there: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(mirror: Mirror, message: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(paths.state_dir()))

    monkeypatch.setattr(links, "_LONGEST_WAIT_S", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "apply", full)
        EventWriter(run_there.events_path).append(a_step(1))
        wait_for(lambda: link.problem and "No space" in link.problem.title, seconds=30)
    (run,) = all_runs()
    wait_for(lambda: run.events_path.read_bytes() == run_there.events_path.read_bytes(), seconds=30)


def test_an_outcome_that_is_not_known_is_said(private_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("abc", "qlora_tui.runs.actions:no_such", msgspec.Raw(b"{}"), True)
    first = store._once(call, threading.Event())
    assert b"bug" in bytes(first.error) and store._once(call, threading.Event()) == first
    # Killed after the beginning, or with half an outcome written.
    for number, record in enumerate((b'{"reply":null}', b'{"reply":{"type":"rep')):
        (store._requests_dir() / f"d{number}.json").write_bytes(record)
        again = store._once(msgspec.structs.replace(call, id=f"d{number}"), threading.Event())
        assert b"may have been carried out" in bytes(again.error)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "run/../../x", ".coming-x/y"])
def test_a_box_cannot_write_out_of_the_copy(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="outside its runs"):
        Mirror(tmp_path).apply(Piece(path, 0, b"x", 0, 1))


def test_a_box_cannot_make_a_log_of_holes(tmp_path: Path) -> None:
    Mirror(tmp_path).apply(Piece("run/events.jsonl", 1 << 40, b"x", 0, 1))
    assert (tmp_path / "runs/.coming-run/events.jsonl").read_bytes() == b"x"


def test_checks_and_engine_are_those_of_the_box(link: Link, box: FakeBox, tmp_path: Path) -> None:
    folder = box.folder / "huggingface/hub/models--org--model/snapshots/1"
    folder.mkdir(parents=True)
    shutil.copy(
        Path(__file__).parents[1] / "configs/HuggingFaceTB__SmolLM2-135M.json", folder / "config.json"
    )
    (model,) = list_local_models((Path("~/models"),))
    assert model.path == folder
    assert isinstance(model.refusal, MissingFilesError)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    source = Source(path=str(rows))
    recipe = msgspec.structs.replace(RECIPE, data=Data(sources=(source,)))
    machine = SystemStatus(no_gpu=GpuUnavailableError(GpuUnavailableReason.NO_DRIVER)).machine
    checks = preflight(recipe, machine, 0.0, forecast(recipe, machine))
    assert {CheckKind.MODEL, CheckKind.DATA, CheckKind.DISK} <= {check.kind for check in checks}
    assert str(box.state_home) in next(check.text for check in checks if check.kind is CheckKind.DISK)
    assert check_system()[0].kind is CheckKind.PYTHON

    async def inspect() -> Report | None:
        async with EngineClient() as engine:
            return await engine.ask(InspectData(source=source, data=recipe.data)).result()

    report = asyncio.run(inspect())
    assert report is not None
    assert report.files[0].path == str(rows)
