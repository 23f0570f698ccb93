"""Each package has a guide to its modules in its docstring; a guide that omits one misleads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qlora_tui
from qlora_tui.tui.commands import SCREENS

PACKAGES = (
    *(
        "recipe",
        "catalog",
        "gpu",
        "memory",
        "data",
        "runs",
        "training",
        "chat",
        "export",
        "engine",
        "demo",
        "tui",
    ),
    *("tui/render", "tui/widgets", "tui/screens", "tui/screens/modals"),
    *(f"tui/screens/{screen.name}" for screen in SCREENS),
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_packages_guide_names_each_of_its_modules(package: str) -> None:
    folder = Path(qlora_tui.__file__).parent / package
    guide = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert not modules - set(re.findall(r"\w+", guide))


def test_every_screen_has_commands() -> None:
    packages = (Path(qlora_tui.__file__).parent / "tui/screens").glob("*/screen.py")
    assert sorted(path.parent.name for path in packages) == sorted(screen.name for screen in SCREENS)
