"""Names say what a thing is, and each is used for one thing."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("qlora_tui", "tests", "bench", "screenshots", "docs")
    for path in (ROOT / folder).rglob("*.py")
]
PACKAGE = sorted((ROOT / "qlora_tui").rglob("*.py"))
SAY_NOTHING = frozenset(("made", "found", "told", "kept", "asked", "among", "kept_apart"))
"""A participle or preposition does not say what a name holds."""
BARE = re.compile(rf"\b_*(?:{'|'.join(SAY_NOTHING)})\s*(?:[=:,)\](]|[-+*/%@&|^<>]+=|in\b)")
"""Such a word before what follows a target, a parameter or the name of a function."""
SAME_IDEA = {
    "__init__": "every package has one",
    "__main__": "every program has one",
    "errors": "the errors of a package",
    "screen": "the screen of a folder",
    "commands": "the keys of a screen, and what they are made of",
    "actions": "what the keys of a screen do, and what both interfaces do with a run",
    "text": "the text of a screen",
    "presets": "a command line's subcommand and what it works on",
    "estimate": "a command line's subcommand and what it works on",
    "download": "a command line's subcommand and what it works on",
    "check": "a command line's subcommand and what it works on",
    "follow": "a command line's subcommand and what it works on",
}
"""Module names that may be used again, and why."""


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every variable, parameter and function that a module defines, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def test_no_name_is_a_bare_participle() -> None:
    sources = [(path, source) for path in CODE if BARE.search(source := path.read_text())]
    bare = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, source in sources  # the few that have such a word at all: to parse all takes seconds
        for name, line in names_in(ast.parse(source))
        if name.lstrip("_") in SAY_NOTHING
    ]
    assert not bare, "name these for what they hold"


def test_no_module_name_is_used_for_two_things() -> None:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE:
        by_stem[path.stem].append(str(path.relative_to(ROOT)))
    twice = {stem: paths for stem, paths in by_stem.items() if len(paths) > 1 and stem not in SAME_IDEA}
    assert not twice
    assert not {stem for stem in SAME_IDEA if len(by_stem[stem]) < 2}, "listed in SAME_IDEA, and used once"


def test_no_class_name_is_used_twice() -> None:
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE:
        for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE):
            by_name[name].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in by_name.items() if len(paths) > 1}


def test_no_module_shadows_the_standard_library() -> None:
    assert not {path.stem for path in PACKAGE} & sys.stdlib_module_names - {"__main__"}


def test_a_screen_keeps_its_action_methods_in_one_module() -> None:
    screens = ROOT / "qlora_tui/tui/screens"
    split = [
        str(actions.parent.relative_to(ROOT))
        for actions in screens.glob("*/actions.py")
        if "def action_" in (actions.parent / "screen.py").read_text()
    ]
    assert not split, "these have action methods in screen.py as well as in actions.py"


def test_shared_widgets_are_shared() -> None:
    """Those of a single screen are in that screen's package."""
    tui = ROOT / "qlora_tui/tui"
    users: dict[str, set[str]] = {path.stem: set() for path in (tui / "widgets").glob("[a-z]*.py")}
    for path in tui.rglob("*.py"):
        imported = re.findall(r"from qlora_tui\.tui\.widgets\.(\w+) import", path.read_text())
        for name in imported:
            users[name].add(str(path.parent if path.parent.parent.name == "screens" else path))
    assert not {
        name for name, used_by in users.items() if len(used_by) == 1 and "screens/base.py" not in str(used_by)
    }
