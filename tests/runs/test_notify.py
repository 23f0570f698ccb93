"""A webhook and a command hear how a run ended, with no terminal anywhere; and cannot harm it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_tui import paths
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions, notify
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, Failed, Finished, RunEnded, Stopped
from qlora_tui.runs.notify import RunNotification, notification_for
from qlora_tui.runs.status import read_status
from qlora_tui.settings import config_path
from tests.runs.conftest import let_go
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow


@dataclass
class Listener:
    """A webhook on this machine, and the requests it received."""

    address: str = ""
    answer: int = 200
    silent: bool = False
    """Takes the request and never answers."""
    heard: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def listening(**how: Any) -> Iterator[Listener]:
    listener = Listener(**how)
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            listener.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if listener.silent:
                over.wait()
                return
            self.send_response(listener.answer)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        listener.address = f"http://127.0.0.1:{server.server_port}/secret-part"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield listener
        finally:
            over.set()
            server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def wish(text: str) -> None:
    config_path().write_text(f"[notify]\n{text}\n")


def runners_log() -> str:
    return (paths.state_dir() / "runner.log").read_text()


@pytest.mark.usefixtures("played_trainer")
def test_a_webhook_and_a_command_hear_of_a_finished_run(recipe: Recipe, tmp_path: Path) -> None:
    with listening() as hook:
        wish(f"webhook = '{hook.address}'\ncommand = '''echo \"$QLORA_TUI_TEXT\" > {tmp_path}/told'''")
        run = actions.submit(replace_setting(recipe, "name", "plain"))
        wait_for(lambda: hook.heard)
        body = hook.heard[0]
    assert (tmp_path / "told").read_text() == f"{run.id} is finished.\n"
    assert body["event"] == "finished"
    assert body["run"] == body["name"] == run.id
    assert body["text"] == f"{run.id} is finished."
    assert str(paths.state_dir()) not in json.dumps(body)


@pytest.mark.usefixtures("played_trainer")
def test_a_failing_webhook_is_logged_without_its_secret(
    recipe: Recipe,
) -> None:
    with listening(answer=500) as hook:
        wish(f"webhook = '{hook.address}'\ncommand = 'exit 3'")
        crashed = actions.submit(replace_setting(recipe, "name", "crashes"))
        wait_for(lambda: "answered 500" in runners_log())
    assert "notify.command exited with code 3" in runners_log()
    assert "secret-part" not in runners_log()
    assert hook.heard[0]["event"] == "failed"
    assert "ended without a message" in hook.heard[0]["text"]
    assert read_status(crashed).state == "failed"


@pytest.mark.usefixtures("played_trainer")
def test_a_webhook_that_never_answers_holds_up_no_run(recipe: Recipe) -> None:
    with listening(silent=True) as hook:
        wish(f"webhook = '{hook.address}'")
        first, second = (actions.submit(replace_setting(recipe, "name", "plain")) for _ in range(2))
        wait_for(lambda: len(hook.heard) == 2)
        assert read_status(first).state == read_status(second).state == "finished"


@pytest.mark.usefixtures("played_trainer")
def test_a_redirected_webhook_is_named_and_not_followed(recipe: Recipe) -> None:
    with listening(answer=301) as hook:
        wish(f"webhook = '{hook.address}'")
        actions.submit(replace_setting(recipe, "name", "plain"))
        wait_for(lambda: "answered 301" in runners_log())
    assert len(hook.heard) == 1


def test_a_command_that_hangs_ends_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "COMMAND_S", 0.5)
    news = RunNotification(
        event="finished", run="r", name="r", text="r is finished.", step=1, total_steps=1, best_loss=None
    )
    said = notify._command(f"echo $$ > {tmp_path / 'group'}; sleep 600 | cat; true", news)
    assert "did not end" in said
    group = int((tmp_path / "group").read_text())

    def gone() -> bool:
        members = [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE]
        return not any(os.getpgid(p.pid) == group for p in members if psutil.pid_exists(p.pid))

    wait_for(gone)


@pytest.mark.usefixtures("played_trainer")
def test_a_run_that_ended_without_runner_is_reported_once_later(recipe: Recipe) -> None:
    with listening() as hook:
        wish(f"webhook = '{hook.address}'")
        run = actions.submit(replace_setting(recipe, "name", "waits"))
        wait_for(lambda: read_status(run).state == "running")
        os.kill(int((paths.state_dir() / "runner.lock").read_text()), signal.SIGKILL)
        let_go(run)
        wait_for(lambda: read_status(run).state == "finished")
        assert hook.heard == []
        later = actions.submit(replace_setting(recipe, "name", "plain"))
        wait_for(lambda: len(hook.heard) >= 2)
    assert sorted(body["run"] for body in hook.heard) == sorted((run.id, later.id))
    assert not run.unreported_path.exists() and not later.unreported_path.exists()


@pytest.mark.usefixtures("played_trainer")
def test_a_retry_is_no_news(recipe: Recipe) -> None:
    with listening() as hook:
        wish(f"webhook = '{hook.address}'")
        wanting = replace_setting(recipe, "name", "needs memory")
        actions.submit(replace_setting(wanting, "training.micro_batch_size", 2))
        wait_for(lambda: hook.heard)
    assert [body["event"] for body in hook.heard] == ["finished"]


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (
            Finished(at=1.0, step=9, seconds=1.0, tokens_per_s=1.0),
            "is finished: best validation loss 1.210 at step 6.",
        ),
        (Failed(at=1.0, title="The loss is not a number", what="x"), "failed: The loss is not a number."),
        (Stopped(at=1.0, step=9), None),
    ],
)
def test_what_is_told_of_an_ending(run: RunDir, ending: RunEnded, text: str | None) -> None:
    with EventWriter(run.events_path) as log:
        for step, loss in ((3, 1.5), (6, 1.21), (9, 1.3)):
            log.append(Evaluated(at=1.0, step=step, loss=loss))
        log.append(ending)
    news = notification_for(run)
    assert (news.text if news else None) == (text and f"{run.id} {text}")


def news() -> RunNotification:
    return RunNotification(
        event="finished", run="owls", name="owls", text="", step=1, total_steps=1, best_loss=None
    )


@pytest.mark.parametrize(
    "address", ["http://[::1/secret", "http://host:port/secret", "http:///secret", "http://host:99999/secret"]
)
def test_an_address_that_is_none_is_said_without_its_secret(address: str) -> None:
    said = notify._webhook(address, news())
    assert "notify.webhook" in said and "not valid" in said and "secret" not in said


def test_an_address_with_other_letters_is_sent_to() -> None:
    with listening() as hook:
        assert notify._webhook(f"{hook.address}/grüße?für=owl%20s", news()) == ""
        assert [heard["run"] for heard in hook.heard] == ["owls"]
