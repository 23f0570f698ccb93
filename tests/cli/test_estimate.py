"""``qlora-tui estimate`` of models that are only on the Hub: the real client, a hub of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.catalog.conftest import child_environ, hub
from tests.catalog.fake_hub import FakeHub

__all__ = ["hub"]
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKEN = "hf_the_right_token"


def _estimate(hub: FakeHub, model: str, **environ: str) -> tuple[int, str, str]:
    child = subprocess.run(
        [sys.executable, "-m", "qlora_tui", "estimate", "--model", model, "--gpu-gib", "8", "--json"],
        env=child_environ(hub, **{"HF_TOKEN": TOKEN, **environ}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in child.stderr
    assert TOKEN not in child.stdout + child.stderr
    return child.returncode, child.stdout, child.stderr


def test_an_estimate_fetches_only_the_config(hub: FakeHub) -> None:
    code, out, err = _estimate(hub, "org/tiny")
    assert code == 0, err
    assert json.loads(out)["model"] == "org/tiny"
    assert "fetching config.json of org/tiny from the Hub" in err
    assert [request.path for request in hub.requests] == ["/org/tiny/resolve/main/config.json"]
    assert _estimate(hub, "org/tiny")[0] == 0
    assert len(hub.requests) == 1


def test_without_the_hub_an_estimate_says_what_to_do(hub: FakeHub) -> None:
    code, _, err = _estimate(hub, "org/tiny", HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 1
    assert "org/tiny is not on this machine." in err
    assert "copy it into a folder and give that folder as the model" in err


def test_a_config_without_end_is_not_read_to_its_end(hub: FakeHub) -> None:
    hub.endless = "config.json"
    code, _, err = _estimate(hub, "org/tiny")
    assert code == 1
    assert "not from a model Hub" in err
    assert hub.sent_bytes < 64 << 20


def test_a_missing_folder_is_not_looked_for_on_the_hub(hub: FakeHub) -> None:
    code, _, err = _estimate(hub, "./models/none")
    assert code == 2
    assert "Check the path." in err
    assert hub.requests == []
