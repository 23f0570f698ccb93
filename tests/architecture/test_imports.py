"""Which libraries each module loads, in a running Python, and what only tests may import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ALL_SLOW

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "pandas", "pyarrow")

LIGHT_MODULES = (
    "recipe.presets",
    "catalog.local_models",
    "gpu.nvml",
    "memory",
    "data.inspection",
    "runs.actions",
    "runs.runner",
    "engine.client",
    "serving.server",
    "cli.main",
)
SCREENS = ("home", "models", "data", "memory", "lora", "train", "runs", "chat", "presets")


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (LIGHT_MODULES, {*HEAVY, "textual"}),
        (("tui.app", *(f"tui.screens.{name}.screen" for name in SCREENS)), {*HEAVY}),
    ],
    ids=["all but the app", "the app"],
)
def test_light_modules_load_no_ml_library(modules: tuple[str, ...], unwanted: set[str]) -> None:
    # The first module that loads one is named.
    check = f"found = {unwanted!r} & sys.modules.keys()\nassert not found, found"
    loaded_by("\n".join(f"import qlora_tui.{module}\n{check}" for module in modules))


def test_an_estimate_loads_no_ml_library_and_no_event_loop(tmp_path: Path) -> None:
    published = Path(__file__).parents[1] / "configs" / "Qwen__Qwen2.5-0.5B.json"
    shutil.copy(published, tmp_path / "config.json")
    # Its words name libraries too, so they go elsewhere.
    code = (
        "import contextlib\nfrom qlora_tui.cli import main\nwith contextlib.redirect_stdout(sys.stderr):\n"
        f"    code = main(['estimate', '--model', {str(tmp_path)!r}])\nassert code == 0, code"
    )
    assert not loaded_by(code) & {*HEAVY, "textual", "asyncio"}


def test_a_run_is_queued_without_the_estimate() -> None:
    script = "import sys, qlora_tui.runs.actions; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "qlora_tui.memory" not in done.stdout.split()


def test_light_verbs_load_no_ml_library() -> None:
    calls = "\n".join(f"assert main([{verb!r}]) == 0" for verb in ("runs", "locate", "presets", "models"))
    assert not loaded_by(f"from qlora_tui.cli import main\n{calls}") & {*HEAVY, "textual"}


def test_no_module_shadows_the_standard_library() -> None:
    modules = {path.stem for path in (ROOT / "qlora_tui").rglob("*.py")}
    assert not modules & sys.stdlib_module_names - {"__main__"}


@pytest.mark.parametrize("folder", ["qlora_tui", "bench", "screenshots", "docs"])
def test_only_tests_import_tests(folder: str) -> None:
    imports = re.compile(r"^\s*(?:from|import) tests\b|\"tests\.", re.MULTILINE)
    assert [str(path) for path in (ROOT / folder).rglob("*.py") if imports.search(path.read_text())] == []


def test_modules_of_fast_tests_load_no_ml_library() -> None:
    """Every worker loads all of them, and these libraries take as long as a thousand tests."""
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if not ALL_SLOW.search(path.read_text())]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in tests]
    loaded = loaded_by("\n".join(["import tests.conftest", *(f"import {module}" for module in modules)]))
    found = loaded & set(HEAVY)
    assert not found, "import it inside functions, or mark all tests of the module slow: pytestmark"
