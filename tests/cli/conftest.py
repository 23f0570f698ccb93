"""Running a command in this process, and a model folder with only a ``config.json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Said:
    """What a call said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*words: str) -> Said:
        try:
            code = main(list(words))
        except SystemExit as end:  # argparse's way of saying that the call was wrong
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Said(code, said.out, said.err)

    return called


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """Qwen2.5-7B, without its weights: enough for an estimate."""
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    shutil.copy(CONFIGS / "Qwen__Qwen2.5-7B.json", folder / "config.json")
    return folder
