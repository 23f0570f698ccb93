"""Lines of the model list: local models, models to start with, and results from the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.demo.wheel_download import SMOLLM2
from qlora_tui.formatting import format_bytes, format_count, truncate_middle
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.labels import VERDICT_SIGN, VERDICT_STYLE
from qlora_tui.tui.screens.models.starter_choice import Starter
from qlora_tui.tui.widgets.controls import HEADING

LOCAL, HUB, STARTER = "local:", "hub:", "starter:"
"""Prefixes of line ids, before the path or the Hub id."""
DEMO_LINE = "demo:"
"""Id of the demo model's line."""
_WIDE = 100
"""Cells of the list from which it has all columns."""
_SOURCES = {"hub cache": "cache", "folder": "folder", "gguf": "GGUF", "converted": "converted"}
_MIN_NAME = 8
_Cell = tuple[str, str]
"""Text and style."""


def local_lines(
    models: Sequence[LocalModel], chosen: str, width: int, needs: Mapping[Path, tuple[int, str]]
) -> list[tuple[str, Content]]:
    """A heading and a line a model; ● marks the recipe's, ✗ those that cannot be trained.

    ``needs``: bytes and verdict of each model with the recipe, as far as they are known.
    """
    columns = _model_columns("on disk", "from", width)
    lines = [(f"{HEADING}local", _heading(f"On this machine ({len(models)})", columns, width))]
    for model in models:
        mark, style = ("✗", "$text-muted") if model.refusal else (" ", "")
        if chosen in (model.id, str(model.path)):
            mark = "●"
        architecture = model.architecture
        context = architecture.max_positions if architecture else None
        cells = [
            [(format_count(architecture.total_params) if architecture else "NA", style)],
            [(format_bytes(model.size_bytes), style)],
            [("cannot train", "$error")] if model.refusal else _need(needs.get(model.path)),
            [("NA" if context is None else f"{context:,}", style)],
            [(architecture.model_type if architecture else "NA", style)],
            [(_SOURCES[model.source], style)],
        ]
        lines.append((LOCAL + str(model.path), _line(mark, model.name, cells, columns, width, style)))
    return lines


def hub_lines(
    models: Sequence[HubModel] | None, query: str, width: int, present: frozenset[str]
) -> list[tuple[str, Content]]:
    """A heading and a line for each result; None if the Hub was not searched, or could not be."""
    if models is None:
        how = f"press {key_name('models.filter')}, type a name, then Enter"
        text = (
            f"On the Hub: {how}"
            if not query
            else f"The Hub was not searched for {query!r}. {how.capitalize()}"
        )
        return [(f"{HEADING}hub", Content(text))]
    columns = [("params", 7), ("a month", 10), ("access", 13)]
    columns += [("changed", 12), ("family", 14), ("license", 13)] if width >= _WIDE else []
    heading = _heading(f"On the Hub, for {query!r} ({len(models)})", columns, width)
    lines = [(f"{HEADING}hub", heading)]
    for model in models:
        mark, style = ("✗", "$text-muted") if model.refusal else (" ", "")
        cells = [
            [(text, style)]
            for text in (
                format_count(model.parameters),
                f"↓{format_count(model.downloads)}" if model.downloads else "",
                "here" if model.id in present else "gated" if model.gated else "",
                model.modified,
                model.model_type or "",
                model.license or "",
            )
        ]
        lines.append((HUB + model.id, _line(mark, model.id, cells, columns, width, style)))
    return lines


def starter_lines(models: Sequence[Starter], width: int, *, with_demo: bool) -> list[tuple[str, Content]]:
    """A heading and a line for each model to start with, in the columns of the models of this machine.

    ``with_demo``: whether the first is the demo's model, which comes from the Python package index.
    """
    columns = _model_columns("download", "license", width)
    lines = [(f"{HEADING}starters", _heading("Worth starting with, to download", columns, width))]
    if with_demo:
        demo = ("135M", format_bytes(SMOLLM2.download_bytes), "", "8,192", "llama", "apache-2.0")
        line = _line(" ", f"{SMOLLM2.name} (demo)", [[(text, "")] for text in demo], columns, width, "")
        lines.append((DEMO_LINE, line))
    for model in models:
        architecture = model.architecture
        cells = [
            [(format_count(architecture.total_params), "")],
            [(format_bytes(model.download_bytes), "")],
            _need((model.needs_bytes, model.verdict)),
            [("NA" if architecture.max_positions is None else f"{architecture.max_positions:,}", "")],
            [(architecture.model_type, "")],
            [(model.license, "")],
        ]
        lines.append((STARTER + model.id, _line(" ", model.id, cells, columns, width, "")))
    return lines


def _model_columns(bytes_label: str, last: str, width: int) -> list[tuple[str, int]]:
    """Return the columns of models whose architecture is known, as far as there is room for them."""
    columns = [("params", 7), (bytes_label, 10), ("needs", 13)]
    return columns + ([("context", 10), ("family", 14), (last, 11)] if width >= _WIDE else [])


def _need(need: tuple[int, str] | None) -> list[_Cell]:
    if need is None:
        return []
    bytes_, word = need
    return [(f"{format_bytes(bytes_)} ", ""), (VERDICT_SIGN[word], VERDICT_STYLE[word])]


def _heading(text: str, columns: Sequence[tuple[str, int]], width: int) -> Content:
    figures = "".join(f"{label:>{cells}}" for label, cells in columns)
    left = max(_MIN_NAME, width - len(figures))
    return Content(f"{text:<{left}}"[:left] + figures)


def _line(
    mark: str,
    name: str,
    cells: Sequence[Sequence[_Cell]],
    columns: Sequence[tuple[str, int]],
    width: int,
    style: str,
) -> Content:
    left = max(_MIN_NAME, width - sum(wide for _, wide in columns) - 2)
    marked = (f"{mark} ", "$accent bold" if mark == "●" else style)
    parts: list[_Cell] = [marked, (f"{truncate_middle(name, left):<{left}}", style)]
    for (_, wide), texts in zip(columns, cells, strict=False):
        room = wide - 1 - sum(len(text) for text, _ in texts[1:])
        first, first_style = texts[0] if texts else ("", "")
        shown = first if len(first) <= room else f"{first[: room - 1]}…"
        parts += [(f"{shown:>{room + 1}}", first_style), *texts[1:]]
    return Content.assemble(*parts)
