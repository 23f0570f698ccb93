"""The random model is made once, outside the process that asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]
CODE = """
import sys
from pathlib import Path
from bench.support.random_model import random_model
folder = random_model(Path(sys.argv[1]) / "model", "tiny")
weights = folder / "model.safetensors"
made_at = weights.stat().st_mtime_ns
assert random_model(folder, "tiny") == folder and weights.stat().st_mtime_ns == made_at
assert "torch" not in sys.modules
"""


def test_the_model_is_made_once_in_another_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
