"""Each room opens with a guide to its modules; a guide that leaves one out misleads."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qlora_tui
from qlora_tui.tui.screens.registry import SCREENS

ROOMS = (
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
    *(f"tui/screens/{screen}" for screen in (*SCREENS, "presets")),
)


@pytest.mark.parametrize("room", ROOMS)
def test_the_guide_of_a_room_names_each_of_its_modules(room: str) -> None:
    folder = Path(qlora_tui.__file__).parent / room
    guide = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert not modules - set(re.findall(r"\w+", guide))
