"""The recipe package imports quickly: every command and the app's first frame need it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("layering", ["platformdirs", "difflib", "tempfile", "hashlib", "torch", "textual"]),
        ("presets", ["difflib", "torch", "textual", "psutil"]),
    ],
)
def test_importing_a_recipe_module_loads_no_more_than_it_needs(module: str, absent: list[str]) -> None:
    code = f"import sys, qlora_tui.recipe.{module}; print(*(m for m in {absent} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
