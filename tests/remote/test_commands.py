"""``qlora-tui --host box COMMAND``: run there, with input, output and exit code as here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.remote.sshd import FakeBox

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("private_home")]


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "qlora_tui", "--host", "box", *arguments]
    return subprocess.run(
        argv, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, timeout=100
    )


def test_a_command_prints_what_it_prints_there(box: FakeBox, tmp_path: Path) -> None:
    located = call("locate", "--json")
    assert located.returncode == 0, located.stderr
    assert json.loads(located.stdout)["runs"].startswith(str(box.state_home))
    rows = tmp_path / "two rows.jsonl"
    rows.write_text('{"prompt": "a\'b \\"c", "completion": "d"}\n' * 2)
    shown = call("data", "inspect", "two rows.jsonl", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert str(box.state_home) in shown.stdout
    wrong = call("attach", "no such run; echo $HOME")
    assert wrong.returncode == 2
    assert "'no such run; echo $HOME'" in wrong.stderr
    refused = call("completion", "bash")
    assert refused.returncode == 2
    assert "without --host" in refused.stderr


def test_a_run_is_queued_there_with_the_data_from_here(box: FakeBox, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "d"}\n')
    (tmp_path / "mine.toml").write_text('[data]\nsources = [{ path = "rows.jsonl" }]\n')
    words = ("train", "mine.toml", "--model", "org/absent", "--dry-run", "--set", "lora.rank=4")
    done = call(*words, "--json", cwd=tmp_path)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["model"]["outcome"] == "error"
    assert "org/absent" in checks["model"]["text"]
    assert checks["data"]["outcome"] != "error", checks
    assert list(box.state_home.glob("qlora-tui/uploads/*/rows.jsonl"))
    asked = call("suggest", "mine.toml", "--model", "org/absent", cwd=tmp_path)
    assert asked.returncode == 2
    assert "org/absent" in asked.stderr and "mine.toml" not in asked.stderr
    (tmp_path / "sheet.toml").write_text((tmp_path / "mine.toml").read_text() + "[sweep]\ntrials = 2\n")
    words = ("sweep", "start", "sheet.toml", "--model", "org/absent", "--vary", "lora.rank=4,8")
    started = call(*words, cwd=tmp_path)
    assert started.returncode == 2
    assert "org/absent" in started.stderr.splitlines()[-1], started.stderr
