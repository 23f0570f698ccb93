"""What the app takes from Textual's private API is still there, and still behaves as it did.

A failure means that the installed Textual has changed: the message says what to do in ``textual_compat.py``.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import selectors
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from textual import events
from textual._styles_cache import StylesCache
from textual.app import App, ComposeResult
from textual.cache import LRUCache
from textual.css.stylesheet import Stylesheet
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from qlora_tui.tui import textual_compat
from qlora_tui.tui.textual_compat import CachedStylesheet, ChopsUpdate, LayoutUpdate, PromptDriver

TUI = Path(textual_compat.__file__).parent


@pytest.mark.parametrize(
    ("owner", "name", "what_to_do"),
    [
        (App, "_display", "find what writes a frame now, and call intercept_update there"),
        (App, "_handle_exception", "find what gets unhandled exceptions now, and call intercept_error there"),
        (App, "_unnotify", "look for a public way to dismiss one notification in dismiss_information"),
        (Screen, "_get_breakpoint_classes", "look at how Screen sets these classes; see add_size_classes"),
        (Widget, "_check_anchor", "look at how Widget.anchor follows the end now; see follow_end"),
        (
            StylesCache,
            "get_inner_outer",
            "if nothing caches styles by widget any more, drop clear_style_caches",
        ),
        (Stylesheet, "set_variables", "if Textual parses a sheet once now, drop CachedStylesheet"),
        (Stylesheet, "reparse", "if Textual parses a sheet once now, drop CachedStylesheet"),
    ],
)
def test_a_private_method_is_there(owner: type, name: str, what_to_do: str) -> None:
    assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} is gone: {what_to_do}"


def test_display_takes_a_screen_and_an_update() -> None:
    names = list(inspect.signature(App._display).parameters)
    assert names == ["self", "screen", "renderable"], "adapt HookedApp._display to the new parameters"


@pytest.mark.parametrize(
    ("update", "fields"), [(LayoutUpdate, {"strips"}), (ChopsUpdate, {"chops", "spans", "chop_ends"})]
)
def test_updates_have_the_fields_that_the_diff_reads(update: type, fields: set[str]) -> None:
    parameters = set(inspect.signature(update).parameters)
    assert fields <= parameters, f"{update.__name__} changed: adapt TerminalContents in terminal_app.py"


def test_style_caches_can_be_cleared() -> None:
    clear = getattr(StylesCache.get_inner_outer, "cache_clear", None)
    assert clear is not None, "the cache has no cache_clear: find how to empty it in clear_style_caches"


async def test_the_app_has_the_private_attributes() -> None:
    app = App[None]()
    async with app.run_test():
        advice = "find its new name, or a public one, in HookedApp"
        for name in ("_driver", "_batch_count", "_notifications", "_clipboard"):
            assert hasattr(app, name), f"App.{name} is gone: {advice}"
        assert isinstance(app.screen, Screen)
        assert hasattr(app.screen._compositor, "render_full_update"), "see full_update"
        assert hasattr(app.screen._bindings, "key_to_bindings"), "see bindings_of_widget"


def test_textual_still_forgets_parsed_sheets() -> None:
    sheet = Stylesheet(variables={"primary": "red"})
    sheet.add_source("Label { color: $primary; }", read_from=("a.tcss", ""))
    sheet.parse()
    assert isinstance(sheet._parse_cache, LRUCache) and len(sheet._parse_cache), "see CachedStylesheet"
    sheet.set_variables(sheet._variables)
    assert not len(sheet._parse_cache), "Textual keeps parsed sheets now: drop CachedStylesheet"
    cached = CachedStylesheet(variables={"primary": "red"})
    cached.add_source("Label { color: $primary; }", read_from=("a.tcss", ""))
    cached.parse()
    cached.set_variables({"primary": "red"})
    assert len(cached._parse_cache) == 1


async def test_the_thread_that_reads_keys_is_woken_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    select, (screen, side) = selectors.SelectSelector.select, os.openpty()
    # For ever in place of a tenth of a second: without being woken it would never end.
    monkeypatch.setattr(selectors.SelectSelector, "select", lambda self, timeout: select(self, None))
    monkeypatch.setattr(signal, "signal", lambda number, action: None)  # only for the main thread
    with os.fdopen(side, "r") as terminal:
        monkeypatch.setattr(sys, "__stdin__", terminal)
        driver = PromptDriver(App[None](), mouse=False)
        driver._key_thread = reader = threading.Thread(target=driver.run_input_thread, daemon=True)
        reader.start()
        threading.Thread(target=driver.disable_input, daemon=True).start()
        reader.join(20.0)
        assert not reader.is_alive(), "see PromptDriver: what does drivers/linux_driver.py wait with now?"
    os.close(screen)


class _OneField(App[None]):
    def compose(self) -> ComposeResult:
        yield Input()


async def test_textual_still_runs_backspace_after_later_letters() -> None:
    app = _OneField()
    async with app.run_test() as pilot:
        field = app.query_one(Input)
        for key, character in (("b", "b"), ("a", "a"), ("backspace", "\x7f"), ("c", "c")):
            field.post_message(events.Key(key, character))
        await pilot.pause()
        assert field.value != "bc", "Textual issue 6605 is fixed: drop OwnKeysFirst in widgets/text_field.py"


async def test_a_screen_has_the_classes_of_the_windows_size_before_its_widgets() -> None:
    seen: list[set[str]] = []

    class Sized(Screen[None]):
        def compose(self) -> ComposeResult:
            textual_compat.add_size_classes(self)
            seen.append(set(self.classes))
            yield Input()

    class Sizes(App[None]):
        HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012
        VERTICAL_BREAKPOINTS = [(0, "-short"), (30, "-tall")]  # noqa: RUF012

    app = Sizes()
    async with app.run_test(size=(100, 24)) as pilot:
        await app.push_screen(Sized())
        await pilot.pause()
        assert seen == [{"-wide", "-short"}] == [app.screen.classes & {"-narrow", "-wide", "-short", "-tall"}]


def _private_uses() -> Iterator[str]:
    """Yield each attribute with an underscore that no module of the app defines, and each private import."""
    trees = {path: ast.parse(path.read_text()) for path in TUI.rglob("*.py")}
    nodes = {path: list(ast.walk(tree)) for path, tree in trees.items()}
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    every = [node for tree in nodes.values() for node in tree]
    ours = {node.name for node in every if isinstance(node, defined)}
    stored = [node for node in every if isinstance(getattr(node, "ctx", None), ast.Store)]
    ours |= {node.attr for node in stored if isinstance(node, ast.Attribute)}
    ours |= {node.id for node in stored if isinstance(node, ast.Name)}
    ours.add("_replace")  # a public method of named tuples
    for path, tree in nodes.items():
        if path.name == "textual_compat.py":
            continue
        for node in tree:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("textual._"):
                yield f"{path.name}:{node.lineno} {node.module}"
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in ours:
                yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.slow
def test_no_other_module_uses_the_private_api() -> None:
    assert not list(_private_uses()), "move it to textual_compat.py, with a test here"
