"""The list on the Model screen: models on this machine, followed by recommended models or by search results
from the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel
from qlora_tui.catalog.starter_models import StarterModel, starter_file
from qlora_tui.demo.demo_model import SMOLLM2
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_count, format_gib
from qlora_tui.memory import Verdict
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import current
from qlora_tui.tui.key_names import TITLE_GAP, key_name
from qlora_tui.tui.render.columns import Column, cut_sentence, table
from qlora_tui.tui.render.labels import CANNOT_TRAIN, fit_figure, place_words
from qlora_tui.tui.screens.models.model_facts import HubFacts, need
from qlora_tui.tui.widgets.controls import HEADING

LOCAL, HUB, STARTER = "local:", "hub:", "starter:"
"""Prefixes of line ids. ``LOCAL`` is followed by a model's path; ``HUB`` and ``STARTER`` are followed by a
model's id on the Hub.
"""
DEMO_LINE = "demo:"
"""Id of the line of the demo's model."""
_WIDE = 100
"""Minimum width of the list, in cells, at which it has all columns."""
_NOTE_CELLS = 20
"""Minimum width, in cells, of the column that says what a recommended model is good for. If there is less
room, the column is hidden.
"""
_LEAST_FIGURES = 3
"""Minimum number of columns with figures that the list keeps, even if the notes are then cut off."""
_NOTE_GAP = 3
"""Cells between the longest name and the notes."""
_SOURCES = {"hub cache": "cache", "folder": "folder", "gguf": "GGUF", "converted": "converted"}
_MAX_STARTER_PARAMETERS_ON_CPU = 2_000_000_000
"""Maximum number of parameters of a model that is recommended for a CPU. Larger models take minutes per
step.
"""
_BYTES_PER_WEIGHT = 2
"""Bytes per weight in a model's files on the Hub, where weights have 16 bits."""
_UNKNOWN = "–"
"""Placeholder for an unknown value."""


@dataclass(frozen=True)
class Starter:
    """A recommended first model on the Hub, and the memory that it needs with the current recipe."""

    model: StarterModel
    architecture: Architecture
    verdict: Verdict
    is_demo: bool = False
    """Whether this is the demo's model, which is downloaded from the Python package index."""
    is_best_fit: bool = False
    """Whether this is the largest suitable model that needs at most half of the memory. The demo's model does
    not count.
    """

    @property
    def id(self) -> str:
        """Id of the model on the Hub; for the demo's model, its name."""
        return self.model.id

    @property
    def line_id(self) -> str:
        """Id of the model's line in the list."""
        return DEMO_LINE if self.is_demo else STARTER + self.id

    @property
    def download_bytes(self) -> int:
        """Size of the download, in bytes; an estimate except for the demo's model."""
        return SMOLLM2.download_bytes if self.is_demo else self.architecture.total_params * _BYTES_PER_WEIGHT


def starters(recipe: Recipe, budget: MemoryBudget) -> tuple[Starter, ...]:
    """Return models for a first run: the demo's model, followed by every model of a short list that fits in
    memory. If none fits, the smallest model of the list follows instead.

    The largest model of the list that needs at most half of the memory comes right after the demo's, as the
    recommended one. The other half is left for longer sequences and other programs. The remaining models are
    sorted by size.

    Call this function in a thread.
    """
    file, all_models = starter_file(), []
    for model in (file.demo, *file.models):
        # The list may have models that only a later version of the app can train.
        with suppress(UserError):
            architecture = model.architecture()
            verdict = need(architecture, recipe, budget)
            all_models.append(Starter(model, architecture, verdict, is_demo=model is file.demo))
    demo, listed = all_models[:1], all_models[1:]
    on_cpu = budget.device.kind == "cpu"
    fitting = [
        starter
        for starter in listed
        if starter.verdict.fits_with_margin
        and not (on_cpu and starter.architecture.total_params > _MAX_STARTER_PARAMETERS_ON_CPU)
    ]
    small = [each for each in fitting if each.verdict.needed_bytes <= budget.bytes / 2]
    others = [each for each in fitting if each not in small[-1:]]
    others.sort(key=lambda each: each.architecture.total_params)
    best = [replace(each, is_best_fit=True) for each in small[-1:]]
    return (*demo, *best, *others) if fitting else (*demo, *listed[:1])


@dataclass
class ListedModels:
    """The models that the list may show, and the facts that have been read about them."""

    local: list[LocalModel] | None = None
    """The models on this machine; None until they have been listed."""
    hub: list[HubModel] | None = None
    """Results of the last search on the Hub; None if there was no search, or if the last search failed."""
    query: str = ""
    """Text of the last search on the Hub; empty if there was none."""
    hub_facts: dict[str, HubFacts] = field(default_factory=dict)
    """Details of models on the Hub by id, for the models whose details have been fetched."""
    needs: dict[Path, Verdict] = field(default_factory=dict)
    """Verdict on the memory that each model on this machine needs with the current recipe, by the model's
    path.
    """
    licenses: dict[Path, str] = field(default_factory=dict)
    """License of each model on this machine by the model's path, from its model card."""
    starters: tuple[Starter, ...] = ()
    """Recommended models, which are listed until the Hub is searched."""

    @property
    def lists_starters(self) -> bool:
        """Whether recommended models are listed instead of search results."""
        return self.hub is None and not self.query

    def find(self, id_: str | None) -> LocalModel | HubModel | Starter | None:
        """Return the model of the line with this id. Return None if ``id_`` is None or belongs to another
        line, such as a heading.
        """
        models: dict[str | None, LocalModel | HubModel | Starter] = {
            **{LOCAL + str(model.path): model for model in self.local or ()},
            **{HUB + model.id: model for model in self.hub or ()},
            **{model.line_id: model for model in self.starters},
        }
        return models.get(id_)

    def _rank(self, model: LocalModel) -> tuple[bool, bool, int]:
        """Return the sort key of a model. Models that can be trained come before others. Within each of these
        two groups, models that fit come first. After that, smaller models come before larger ones.
        """
        verdict = self.needs.get(model.path)
        parameters = model.architecture.total_params if model.architecture else 0
        return model.refusal is not None, verdict is not None and not verdict.fits_even_if_tight, parameters

    def copy_here(self, model: HubModel) -> LocalModel | None:
        """Return the local copy of a Hub model if there is one that can be trained; otherwise None."""
        return next((m for m in self.local or () if m.id == model.id and m.refusal is None), None)

    def lines(
        self, words: str, chosen: str, width: int, most: int | None = None
    ) -> list[tuple[str, Content]]:
        """Return (id, line) for headings and models: first the models on this machine, then search results
        from the Hub. Until the Hub is searched, recommended models are listed instead of results.

        Args:
            words: Only models whose name contains this lowercase text are listed. Search results already
                match the query, so they are all listed.
            chosen: Id of the recipe's model.
            width: Width of a line, in cells.
            most: Maximum number of recommended models; None for all.
        """
        local = [model for model in self.local or () if words in model.name.lower()]
        local.sort(key=self._rank)
        here = frozenset(model.id for model in self.local or () if model.refusal is None)
        to_start = [
            model
            for model in self.starters
            if model.id not in here and words in model.id.lower() and not (model.is_demo and self.local)
        ][:most]
        starters = _starter_rows(to_start) if self.lists_starters else []
        columns, width = _fitting(starters, width) if starters else (len(_figure_columns("", "")), width)
        lines = _local_lines(local, chosen, width, columns, self.needs, self.licenses) if self.local else []
        if starters:
            shown = _figure_columns("download", "access")[:columns]
            return [*lines, *_lines(f"Good first models: {_order(to_start)}", shown, starters, width)]
        return [*lines, *_hub_lines(self.hub, self.query, width, here)]


def list_title(hint: Content, budget: MemoryBudget) -> list[Content]:
    """Return two parts of the list's title: first, ``Models`` and ``hint``, which names the key to press;
    second, an explanation of the column ``needs``.
    """
    of = f"{format_gib(budget.bytes)} GiB ({place_words(budget)})"
    needs = Content.styled(f"memory needed, of {of}", "not bold $text-muted")
    return [TITLE_GAP.join(["Models", hint] if hint else ["Models"]), needs]


@dataclass(frozen=True)
class _Line:
    """A model in the list, with the texts of its columns in order."""

    id: str
    mark: str
    name: str
    texts: tuple[str | Content, ...]
    is_refused: bool = False
    note: str = ""
    """What the model is good for; empty if unknown."""

    @property
    def title(self) -> Content:
        """The mark and the name of the model."""
        style = "$text-muted" if self.is_refused else ""
        return Content.assemble(
            (f"{self.mark} ", "$primary bold" if self.mark == "●" else style), (self.name, style)
        )

    def text(self, number: int) -> str | Content:
        """Return the text of the column with this number."""
        text = self.texts[number]
        return Content.styled(text, "$text-muted") if self.is_refused and isinstance(text, str) else text


def _local_lines(
    models: Sequence[LocalModel],
    chosen: str,
    width: int,
    columns: int,
    needs: Mapping[Path, Verdict],
    licenses: Mapping[Path, str],
) -> list[tuple[str, Content]]:
    """Return (id, line) for a heading and for each model on this machine. ● marks the recipe's model, and ✗
    marks models that cannot be trained.
    """
    rows = []
    for model in models:
        mark = "●" if chosen in (model.id, str(model.path)) else "✗" if model.refusal else " "
        verdict = needs.get(model.path)
        needed: str | Content = "" if verdict is None else fit_figure(verdict)
        if model.refusal:
            needed = Content.styled(f"{CANNOT_TRAIN}  ", "$error")
        texts = _architecture_texts(model.architecture, format_bytes(model.size_bytes), needed)
        more = (licenses.get(model.path) or _UNKNOWN, _SOURCES[model.source])
        rows.append(
            _Line(LOCAL + str(model.path), mark, model.name, (*texts, *more), model.refusal is not None)
        )
    link = current()
    where = "this machine" if link is None else link.box.name
    shown = _figure_columns("on disk", "from")[:columns]
    return _lines(f"On {where} ({len(models)})", shown, rows, width)


def _order(models: Sequence[Starter]) -> str:
    """Return the order of recommended models in words, such as ``demo, best fit, then by size``."""
    first = ["demo"] if any(model.is_demo for model in models) else []
    first += ["best fit"] if any(model.is_best_fit for model in models) else []
    others = sum(not (model.is_demo or model.is_best_fit) for model in models)
    rest = [f"{'then ' if first else ''}by size"] if not first or others > 1 else []
    return ", ".join([*first, *rest])


def _starter_rows(models: Sequence[Starter]) -> list[_Line]:
    """Return the rows of the recommended models, with the same columns as :func:`_local_lines`."""
    rows = []
    for model in models:
        needed = fit_figure(model.verdict)
        texts = _architecture_texts(model.architecture, format_bytes(model.download_bytes), needed)
        access = {None: _UNKNOWN, True: "gated", False: "free"}[model.model.gated]
        texts = (*texts, model.model.license, access)
        name = f"{model.id} (demo)" if model.is_demo else model.id
        rows.append(_Line(model.line_id, " ", name, texts, note=model.model.good_for))
    return rows


def _fitting(rows: Sequence[_Line], width: int) -> tuple[int, int]:
    """Return the number of columns with figures that the list shows, and the list's width in cells, which is
    at most ``width``.

    The notes, which say what the models are good for, are more useful than the last columns, whose figures
    are also in the panel of facts. So the last columns are left out if the notes would otherwise be cut off,
    and the list is no wider than its contents. If there is no room for notes, the list has all columns and
    the full width.
    """
    columns = _figure_columns("", "")
    names = max(row.title.cell_length for row in rows)
    words = names + 1 + _NOTE_GAP + max(len(row.note) for row in rows)
    shown = [cells for _, cells, shown_from in columns if width >= shown_from]
    while len(shown) > _LEAST_FIGURES and words + sum(shown) > width:
        shown.pop()
    if width - names - 1 - sum(shown) < _NOTE_CELLS + _NOTE_GAP:  # the list has no notes
        return len(columns), width
    return len(shown), min(width, words + sum(shown))


def _hub_lines(
    models: Sequence[HubModel] | None, query: str, width: int, present: frozenset[str]
) -> list[tuple[str, Content]]:
    """Return (id, line) for a heading and for each search result from the Hub.

    Args:
        models: The results; None if there was no search, or if it failed.
        query: Text of the search; empty if there was none.
        width: Width of a line, in cells.
        present: Ids of the models that are on this machine.
    """
    if models is None:
        how = f"press {key_name('models.filter')}, type a name, then Enter"
        text = (
            f"The Hub was not searched for {query!r}. {how.capitalize()}" if query else f"On the Hub: {how}"
        )
        return [(f"{HEADING}hub", Content(text))]
    rows = [
        _Line(
            HUB + model.id,
            "✗" if model.refusal else " ",
            model.id,
            (
                format_count(model.parameters),
                f"↓{format_count(model.downloads)}" if model.downloads else "",
                "here" if model.id in present else "gated" if model.gated else "",
                model.modified,
                model.license or "",
            ),
            model.refusal is not None,
        )
        for model in models
    ]
    columns = (
        ("params", 7, 0),
        ("a month", 10, 0),
        ("access", 13, 0),
        ("changed", 12, _WIDE),
        ("license", 13, _WIDE),
    )
    return _lines(f"On the Hub, for {query!r} ({len(models)})", columns, rows, width)


def _figure_columns(bytes_title: str, last: str) -> tuple[tuple[str, int, int], ...]:
    """Return (title, width in cells, minimum width of the list at which the column is shown) for the columns
    of models with a known architecture. ``bytes_title`` and ``last``: titles of the second and the last
    column.
    """
    return (
        ("params", 7, 0),
        (bytes_title, 9, 0),
        ("needs  ", 15, 0),  # padded on the right, because each figure ends with a symbol
        ("context", 9, _WIDE),
        ("license", 12, _WIDE),
        (last, 10, _WIDE),
    )


def _architecture_texts(
    model: Architecture | None, bytes_: str, needed: str | Content
) -> tuple[str | Content, ...]:
    if model is None:
        return ("NA", bytes_, needed, "NA")
    context = "NA" if model.max_positions is None else f"{model.max_positions:,}"
    return (format_count(model.total_params), bytes_, needed, context)


def _lines(
    heading: str, columns: Sequence[tuple[str, int, int]], rows: Sequence[_Line], width: int
) -> list[tuple[str, Content]]:
    """Return (id, line) for a heading, which includes the titles of the columns, and for each model. The
    heading may extend over the column of notes, so the column of names is only as wide as the names.
    """
    shown = [column for column in columns if width >= column[2]]
    names_cells = max((row.title.cell_length for row in rows), default=0)
    free = width - names_cells - sum(cells for _, cells, _ in shown) - 1
    has_notes = any(row.note for row in rows) and free >= _NOTE_CELLS + _NOTE_GAP
    names = Column[_Line](text=lambda row: row.title, fills=not has_notes, min_width=10)
    notes = Column[_Line](
        text=lambda row: row.note,
        style="$text-muted",
        fills=True,
        gap=_NOTE_GAP,
        is_sentence=True,
    )
    figures = [
        Column[_Line](
            title=title,
            text=partial(_Line.text, number=number),
            width=cells - 1,
            right=True,
            gap=1 if number else 2,
            shown_from=shown_from,
        )
        for number, (title, cells, shown_from) in enumerate(columns)
    ]
    ids = (f"{HEADING}{heading}", *(row.id for row in rows))
    columns_shown = [names, *((notes,) if has_notes else ()), *figures]
    titles, *lines = table(columns_shown, rows, width, title_style="$foreground dim")
    head = cut_sentence(Content(heading), len(titles) - len(titles.plain.lstrip()) - 1)
    head = head.stylize("$foreground bold")
    return list(zip(ids, (head + titles[head.cell_length :], *lines), strict=True))
