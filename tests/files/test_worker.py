"""Jobs in processes of their own: what they return, how they fail, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_tui import worker
from qlora_tui.errors import UserError
from qlora_tui.worker import JobStopped, Progress, Report, run_job, start_detached
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow

_HERE = "tests.files.test_worker"


def double(number: int, path: Path, config: dict[str, Any], report: Report) -> tuple[int, str, str]:
    print("a library prints")
    report(1, 2, "half")
    report(2, 2)
    return 2 * number, repr(path), repr(config)


def refuse() -> None:
    raise UserError("No", what="It does not.", why="Because.", fix="Do not.", code="no", exit_code=2)


def die(number: int) -> None:
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("wrong")


def end() -> None:
    os._exit(0)


def sleep(marker: Path) -> None:
    marker.touch()
    time.sleep(600)


def linger(marker: Path) -> int:
    def go_on() -> None:
        time.sleep(3)
        marker.touch()

    threading.Thread(target=go_on).start()
    return 1


def run(job: str, *arguments: object, **options: Any) -> Any:
    return run_job(f"{_HERE}:{job}", *arguments, title="Failed", subject="The process", **options)


def test_a_job_returns_its_result_and_says_how_far_it_is() -> None:
    said: list[Progress] = []
    path = Path(os.fsdecode(b"/a\xff b"))
    config = {"time_step_limit": [0.0, float("inf")], "name": "é\ud800"}
    result = run("double", 3, path, config, result=tuple[int, str, str], on_progress=said.append)
    assert result == (6, repr(path), repr(config))
    assert said == [Progress(1, 2, "half"), Progress(2, 2)]


def test_an_error_arrives_whole() -> None:
    with pytest.raises(UserError) as caught:
        run("refuse", result=type(None))
    assert caught.value.fields() == {
        "title": "No",
        "what": "It does not.",
        "why": "Because.",
        "fix": "Do not.",
        "code": "no",
        "exit_code": 2,
    }


@pytest.mark.parametrize(
    ("job", "arguments", "what", "why", "fix"),
    [
        ("die", (signal.SIGKILL,), "was killed by SIGKILL", "out of memory", "Close other programs"),
        ("die", (signal.SIGRTMIN + 2,), f"was killed by signal {signal.SIGRTMIN + 2}", "last words", "Wait."),
        ("fail", (), "ended with exit code 1", "ValueError: wrong", "Wait."),
        ("end", (), "ended without a result", "", "Wait."),
    ],
)
def test_a_process_without_a_result_is_an_error(
    job: str, arguments: tuple[object, ...], what: str, why: str, fix: str
) -> None:
    with pytest.raises(UserError, match="Failed") as caught:
        run(job, *arguments, result=type(None), fix="Wait.")
    assert what in caught.value.what and why in caught.value.why and fix in caught.value.fix


def test_a_silent_job_is_stopped_and_bounded(tmp_path: Path) -> None:
    marker = tmp_path / "began"
    with pytest.raises(JobStopped):
        run("sleep", marker, result=type(None), should_stop=marker.exists)
    with pytest.raises(UserError, match="Failed") as caught:
        run("sleep", marker, result=type(None), deadline_s=0.5)
    assert "did not end within" in caught.value.what
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in living if "qlora_tui.worker" in child.cmdline()]


def test_a_job_that_does_not_exit_has_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_EXIT_S", 0.0)
    # No room on any disk for what it prints.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert run("linger", tmp_path / "lived on", result=int) == 1
    assert not (tmp_path / "lived on").exists()


@pytest.mark.parametrize("survives", [False, True])
def test_a_job_ends_with_its_parent_unless_it_is_detached(tmp_path: Path, survives: bool) -> None:
    marker = tmp_path / "began"
    code = f"from tests.files import test_worker; test_worker.start(sys.argv[1], {survives})"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", str(marker)], env=worker.subprocess_env()
    )
    wait_for(marker.exists)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    if survives:
        assert child.is_running()
        child.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def start(marker: str, detached: bool) -> None:
    """Start :func:`sleep`, and wait for its end."""
    if detached:
        child = start_detached(f"{_HERE}:sleep", Path(marker), stdout=subprocess.DEVNULL, stderr=2)
        child.wait()
    else:
        run("sleep", Path(marker), result=type(None))
