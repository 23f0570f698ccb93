"""Lines of the model list: local models, and results from the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.formatting import format_bytes, format_count
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.widgets.vi_list import HEADING

LOCAL, HUB = "local:", "hub:"
"""Prefixes of line ids, before the path or the Hub id."""
_SOURCES = {"hub cache": "cache", "folder": "folder", "gguf": "GGUF", "converted": "converted"}
_PARAMETERS, _SIZE, _SOURCE = 7, 9, 9
"""Cells of the three columns on the right."""
_FIGURES = _PARAMETERS + _SIZE + _SOURCE + 3
"""Cells that they take with the spaces around them."""


def local_lines(models: Sequence[LocalModel], chosen: str, width: int) -> list[tuple[str, Content]]:
    """A heading and a line a model; ● marks the recipe's, ✗ those that cannot be trained."""
    lines = [(f"{HEADING}local", Content.styled(f"On this machine ({len(models)})", "$text-muted"))]
    for model in models:
        mark, style = ("✗", "$text-muted") if model.refusal else (" ", "")
        if chosen in (model.id, str(model.path)):
            mark = "●"
        parameters = format_count(model.architecture.total_params) if model.architecture else "NA"
        figures = _figures(parameters, format_bytes(model.size_bytes), _SOURCES[model.source])
        lines.append((LOCAL + str(model.path), _line(mark, model.name, figures, width, style)))
    return lines


def _figures(parameters: str, size: str, source: str) -> str:
    return f"{parameters:>{_PARAMETERS}} {size:>{_SIZE}} {source:>{_SOURCE}}"


def hub_lines(
    models: Sequence[HubModel] | None, query: str, width: int, present: frozenset[str]
) -> list[tuple[str, Content]]:
    """A heading and a line for each result; None if the Hub was not searched."""
    if models is None:
        text = f"On the Hub: press {key_name('models.filter')}, type a name, then Enter"
        return [(f"{HEADING}hub", Content.styled(text, "$text-muted"))]
    lines = [(f"{HEADING}hub", Content.styled(f"On the Hub, for {query!r} ({len(models)})", "$text-muted"))]
    for model in models:
        mark, style = ("✗", "$text-muted") if model.refusal else (" ", "")
        note = "here" if model.id in present else "gated" if model.gated else ""
        figures = _figures(format_count(model.parameters), _downloads(model.downloads), note)
        lines.append((HUB + model.id, _line(mark, model.id, figures, width, style)))
    return lines


def _downloads(number: int) -> str:
    return f"↓{format_count(number)}" if number else ""


def _line(mark: str, name: str, figures: str, width: int, style: str) -> Content:
    width_left = max(8, width - _FIGURES - 2)
    shown = name if len(name) <= width_left else name[: width_left - 1] + "…"
    marked = (f"{mark} ", "$accent bold" if mark == "●" else style)
    return Content.assemble(marked, (f"{shown:<{width_left}}{figures}", style))
