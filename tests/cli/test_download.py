"""``qlora-tui download`` with the real client against a hub of our own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_tui.catalog.local_models import hub_cache_dir, resolve_model
from tests.catalog.conftest import child_environ, hub, tiny_repo
from tests.catalog.fake_hub import FakeHub, sha256
from tests.support.polling import wait_for

__all__ = ["hub"]
pytestmark = pytest.mark.slow

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def _start(hub: FakeHub, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_tui", "download", *words],
        env=child_environ(hub),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _call(hub: FakeHub, *words: str) -> tuple[int, str, str]:
    child = _start(hub, *words)
    out, err = child.communicate(timeout=120)
    assert "Traceback" not in err
    return child.returncode, out, err


def test_a_model_is_fetched_with_progress_on_stderr(hub: FakeHub) -> None:
    code, out, err = _call(hub, "org/tiny", "--json")
    output = json.loads(out)
    assert code == 0
    assert resolve_model("org/tiny").folder == Path(output["path"])
    assert output["commit"] == hub.repos["org/tiny"].commit
    assert output["total_bytes"] > 5000
    assert "KiB of" in err and "model.safetensors" in err


def test_ctrl_c_explains_resuming_and_the_next_call_resumes(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = tiny_repo(6 * MIB)
    weights = hub.repos["org/tiny"].files["model.safetensors"]
    partial = hub_cache_dir() / "models--org--tiny" / "blobs" / f"{sha256(weights)}.incomplete"
    hub.stalls = threading.Event()
    child = _start(hub, "org/tiny")
    wait_for(lambda: partial.exists() and partial.stat().st_size >= MIB)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Resume it with `qlora-tui download org/tiny`" in err
    assert "Traceback" not in err
    # Half of it; more where the client lost patience and asked again before it was stopped.
    fetched = partial.stat().st_size
    assert fetched < len(weights)
    hub.stalls.set()
    hub.requests.clear()
    assert _call(hub, "org/tiny")[0] == 0
    assert hub.ranges(sha256(weights)) == [f"bytes={fetched}-"]


def test_a_revision_is_kept_under_its_name(hub: FakeHub) -> None:
    hub.repos["org/tiny"].branches = ("refs/pr/1",)
    code, out, _ = _call(hub, "org/tiny", "--revision", "refs/pr/1")
    commit = hub.repos["org/tiny"].commit
    refs = hub_cache_dir() / "models--org--tiny" / "refs"
    assert code == 0
    assert (refs / "refs" / "pr" / "1").read_text() == commit and not (refs / "main").exists()
    assert f"estimate --model {hub_cache_dir()}" in out


def test_a_revision_that_is_none_is_told(hub: FakeHub) -> None:
    code, _, err = _call(hub, "org/tiny", "--revision", "v9")
    assert code == 1 and "branch, tag or commit" in err
    code, _, err = _call(hub, "org/tiny", "--revision", "../../x")
    assert code == 2 and "Invalid revision" in err
    assert not hub_cache_dir().exists()
