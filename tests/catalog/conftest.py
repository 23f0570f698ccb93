"""A hub for each test, and children that ask it with the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.catalog.fake_hub import FakeHub, FakeRepo, serve
from tests.catalog.models import TINY, safetensors_bytes

Ask = Callable[..., Any]


def tiny_repo(weights: int = 5000, **settings: Any) -> FakeRepo:
    """A small Llama with everything a repository has, some of it never to be fetched."""
    files = {
        "config.json": json.dumps(TINY).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "additional_chat_templates/tool_use.py": b"raise SystemExit",
        "model.safetensors": safetensors_bytes(weights),
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "original/consolidated.00.pth": b"pickle",
        "onnx/model.onnx": b"graph",
        "README.md": b"# Tiny",
    }
    return FakeRepo(files, **settings)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(FakeHub({"org/tiny": tiny_repo(downloads=10)})) as served:
        yield served


def child_environ(hub: FakeHub, **changes: str) -> dict[str, str]:
    """The environment of a process that uses ``hub``."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_HUB_OFFLINE")}
    return {**environ, "HF_ENDPOINT": hub.url, **changes}


@pytest.fixture
def ask(hub: FakeHub, quick_workers: None) -> Ask:
    """``ask(expression)``: evaluate it in another process; see :mod:`tests.catalog.hub_question`."""

    def run(expression: str, **changes: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "tests.catalog.hub_question", expression],
            env=child_environ(hub, **changes),
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        output = done.stdout + done.stderr
        assert hub.token not in output
        assert "signature=secret" not in output
        return json.loads(done.stdout)

    return run
