"""The adapter's settings, with explanations and advice from papers, and the adapter's costs.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 7.2. QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 4.
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv 2402.09353.

Costs are trained parameters, size on disk and memory, for the recipe and for other ranks and targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import ClassVar

from msgspec import structs
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Blur, Click, MouseScrollDown, MouseScrollUp
from textual.message import Message

from qlora_tui.catalog.adapters import adapter_parameters
from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    capitalize,
    format_bytes,
    format_count,
    format_delta,
    format_float,
    format_small_percent,
)
from qlora_tui.glossary import GLOSSARY, explain
from qlora_tui.memory import Device, Estimate, check_fit, estimate
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import Verdict, precision_of
from qlora_tui.memory.layout import vocabulary_shapes
from qlora_tui.memory.solver import estimate_variants
from qlora_tui.recipe.fields import diff_recipes, fields, format_value, get_setting, replace_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Lora, Recipe
from qlora_tui.recipe.targets import alpha_of, match_modules, rank_of
from qlora_tui.tui.key_names import bare_key, highlight_keys, key_name
from qlora_tui.tui.render.columns import Column, hanging, table
from qlora_tui.tui.render.labels import (
    PRECISION_NAMES,
    fit_figure,
    next_step,
    recipe_fit,
    verdict_legend,
)
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.tui.workbench import Workbench

COSTS = "What other choices would cost"
_ONE_LINE = 1_000
"""A width, in cells, that is larger than any line, so that no line wraps."""


class SettingsList(ViList):
    """A list of settings. The id of a line is the path of the line's setting."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "step(1)", show=False),
        Binding("left,h", "step(-1)", show=False),
    ]

    @dataclass
    class Stepped(Message):
        """Posted to step a setting to its next value (``direction`` 1) or to its previous value (-1)."""

        path: str
        direction: int

    _clicked: int | None = None
    """Index of the option that was clicked last; None if no option was clicked since the list got the focus.
    """

    def on_click(self, event: Click) -> None:
        """Move the cursor to the clicked setting. If the previous click was on the same setting, step the
        setting up.
        """
        event.prevent_default()  # otherwise, the first click would already step the setting
        at = event.style.meta.get("option")
        if at is not None and at == self._clicked:
            self.action_step(1)
        elif at is not None:
            self.highlighted = self._clicked = at

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        """If the mouse is over the setting under the cursor, and the list has the focus, step the setting
        up.
        """
        self._scroll(event, 1)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        """If the mouse is over the setting under the cursor, and the list has the focus, step the setting
        down.
        """
        self._scroll(event, -1)

    def _scroll(self, event: MouseScrollUp | MouseScrollDown, direction: int) -> None:
        if event.style.meta.get("option") == self.highlighted and self.has_focus:
            event.stop()
            event.prevent_default()
            self.action_step(direction)

    def on_blur(self, event: Blur) -> None:
        """Forget which option was clicked last."""
        self._clicked = None

    def action_step(self, direction: int) -> None:
        """Post :class:`Stepped` for the setting under the cursor."""
        if self.current is not None:
            self.post_message(self.Stepped(self.current, direction))

    def action_select(self) -> None:
        """Step the setting under the cursor up."""
        self.action_step(1)

    def select_setting(self, path: str) -> None:
        """Move the cursor to the setting with this path, if the list has it."""
        paths = [option.id for option in self.options]
        if path in paths:
            self.highlighted = paths.index(path)


LORA_CONTROLS: dict[str, tuple[str, ...]] = {
    "lora.rank": ("lora.rank_up", "lora.rank_down"),
    "lora.alpha": ("lora.alpha_up", "lora.alpha_down"),
    "lora.dropout": ("lora.dropout_up", "lora.dropout_down"),
    "lora.use_rslora": ("lora.rslora",),
    "lora.use_dora": ("lora.dora",),
    "lora.train_embeddings": ("lora.embeddings",),
}
"""Ids of the commands that change each setting on the screen, by the setting's path."""
_TERMS = {"lora.use_rslora": "rsLoRA", "lora.use_dora": "DoRA", "lora.train_embeddings": "embed"}
"""Name of a setting's glossary entry, by the setting's path. A setting that is not listed here has an entry
with its own name.
"""


def setting_lines(
    recipe: Recipe, base: Recipe, dora_cost: str, width: int, *, with_meaning: bool = False
) -> list[tuple[str, Content]]:
    """Return (path, line) for each setting. The line has the keys, the value, and advice on the value. With
    ``with_meaning``, the meaning of the setting comes before the advice, and both are wrapped.

    Args:
        recipe: The recipe being edited.
        base: The preset that the recipe is compared with.
        dora_cost: The memory that DoRA adds, as text; empty if unknown.
        width: Width of a line, in cells.
        with_meaning: Whether there is room to explain the setting.
    """
    lines = []
    for path in LORA_CONTROLS:
        head = control_line(path, recipe, base)
        advice = setting_advice(path, recipe, base, dora_cost)
        if with_meaning:
            indent = Content(" " * (head.cell_length + 1))
            meaning = hanging(head + " ", Content(explain(term_of(path))), width)
            line = Content("\n").join([*meaning, *hanging(indent, Content.styled(advice, "dim"), width)])
        else:
            line = Content.assemble(head, (f" {advice}", "$text-muted")).truncate(width, ellipsis=True)
        lines.append((path, line))
    return lines


def setting_advice(path: str, recipe: Recipe, base: Recipe, dora_cost: str) -> str:
    """Return advice on the value of a setting in this recipe. ``base``: the preset that the recipe is
    compared with. ``dora_cost``: the memory that DoRA adds, as text; empty if unknown.
    """
    lora, now, before = recipe.lora, _scale(recipe.lora), _scale(base.lora)
    is_scaled_by_rank = lora.rank != base.lora.rank and lora.alpha == base.lora.alpha and now != before
    if path == "lora.alpha" and is_scaled_by_rank:
        return (
            f"Scales the update by {format_float(now)} instead of {format_float(before)}: alpha is unchanged."
        )
    if path == "lora.use_dora" and dora_cost:
        return f"{dora_cost}. {advice(path, lora)}"
    return advice(path, lora)


def term_of(path: str) -> str:
    """Return the name of the setting's entry in the glossary."""
    return _TERMS.get(path, fields()[path].key)


def control_line(path: str, recipe: Recipe, base: Recipe) -> Content:
    """Return a line with a setting's keys, name and value, such as ``r R rank    16*``. A star marks a value
    that differs from the value in ``base``, the preset.
    """
    value = get_setting(recipe, path)
    star = "*" if value != get_setting(base, path) else " "
    keys = " ".join(map(bare_key, LORA_CONTROLS[path]))
    return Content.assemble(
        (f"{keys:<4}", "$key bold"), f"{term_of(path):<8}", (f"{format_value(value):>6}{star}", "bold")
    )


def _scale(lora: Lora) -> float:
    """Return the scale of the update B·A: alpha/rank, or alpha/√rank with rsLoRA."""
    return lora.alpha / (sqrt(lora.rank) if lora.use_rslora else lora.rank)


def advice(path: str, lora: Lora) -> str:
    """Return one line of advice on the value of a setting of the adapter."""
    match path:
        case "lora.rank" if lora.target_modules == (ALL_LINEAR,):
            return "The QLoRA paper found no effect of rank with all-linear."
        case "lora.rank":
            return "On q and v, ranks 1 to 8 did as well as 64 (LoRA paper)."
        case "lora.alpha":
            return f"Scales the update by {format_float(_scale(lora))}, much like the learning rate."
        case "lora.dropout":
            return "QLoRA paper: 0.1 up to 13B, 0.05 above. 0 saves memory."
        case "lora.use_rslora" if lora.use_rslora:
            return "Scales by alpha/√rank, so that high ranks keep learning."
        case "lora.use_rslora":
            return f"On: scales the update by a further {format_float(sqrt(lora.rank))}. For high ranks."
        case "lora.use_dora":
            return "Better at low ranks, always slower (DoRA paper)."
        case _ if lora.train_embeddings:
            return "Embedding LR applies; if it is 0, a tenth of Learning rate."
        case _:
            return "On: for a new language. Takes much more memory."


def modules_words(modules: Sequence[LinearModule], lora: Lora, width: int) -> str:
    """If all modules are of one kind, return an explanation of this kind; otherwise, explain the term "target
    modules". If ``width`` allows, append what the QLoRA paper says about adapting all layers.
    """
    kinds = {module.kind for module in modules}
    kind = next(iter(kinds)) if len(kinds) == 1 else ""
    fell_short = "In the QLoRA paper, adapting fewer layers did worse than full fine-tuning."
    all_needed = "The QLoRA paper needed all layers to match full fine-tuning."
    meaning = explain(kind if kind in GLOSSARY else "target modules")
    words = f"{meaning} {all_needed if lora.target_modules == (ALL_LINEAR,) else fell_short}"
    return words if len(words) <= width else meaning


def one_line(path: str) -> Content:
    """Return a line with the name and the explanation of a setting."""
    return Content.assemble((f"{term_title(path)}: ", "bold"), explain(term_of(path)))


def term_title(path: str) -> str:
    term = term_of(path)
    return capitalize(term) if term.islower() else term


_RANKS = (4, 8, 16, 32, 64, 128, 256)
_TARGETS = {
    ALL_LINEAR: (ALL_LINEAR,),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gate, up, down": ("gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
}
_RANK_CELLS = 7
_CHOICE_CELLS, _DISK_CELLS, _CHOICE_GAP, _MAX_SPREAD = 22, 9, 3, 12
"""Widths, in cells. ``_CHOICE_CELLS``: the column of a choice of targets, including the gap before the
column. ``_DISK_CELLS``: the size on disk. ``_CHOICE_GAP``: the gap. ``_MAX_SPREAD``: the maximum number of
cells that a wide window adds to the gap.
"""
_CHOICE_NAME_CELLS, _PARAMS_CELLS, _FIGURE_CELLS = 18, 7, 13
_GROUP_CELLS = _CHOICE_NAME_CELLS + _PARAMS_CELLS + _DISK_CELLS + 2 + _FIGURE_CELLS
"""Width of a line of :func:`_choice_bars` without its bar, in cells."""
_LEAST_BAR, _GROUP_GAP = 18, 4
SAVED_BYTES = 4
"""Bytes per parameter in ``adapter_model.safetensors``: adapters are trained and saved in 32 bits."""
_MAX_LINES = 2
"""Maximum number of lines that list differences from the preset."""
_WITH = " with gradients and optimizer"


@dataclass(frozen=True)
class MemoryDeltas:
    """Differences in memory, in bytes. They are computed after the other figures, because each difference
    requires another estimate.
    """

    dora_bytes: int
    """Memory of the recipe with DoRA, minus memory of the recipe without DoRA."""
    preset_bytes: int
    """Memory of the recipe, minus memory of the recipe with the preset's LoRA settings."""


def memory_deltas(
    recipe: Recipe, base: Recipe, architecture: Architecture, device: Device
) -> MemoryDeltas | None:
    """Return how much memory DoRA adds to the recipe, and how much the recipe's LoRA settings add compared
    with those of the preset ``base``. This takes about 20 ms, for three estimates.

    Return None if the model lacks target modules of the recipe or of the preset.
    """

    def total(of: Recipe) -> int:
        return estimate(of, architecture, device=device).step_bytes

    try:
        plain, dora = (total(replace_setting(recipe, "lora.use_dora", on)) for on in (False, True))
        as_preset = total(structs.replace(recipe, lora=base.lora))
        return MemoryDeltas(dora - plain, (dora if recipe.lora.use_dora else plain) - as_preset)
    except UserError:
        return None


def trained_parameters(recipe: Recipe, architecture: Architecture) -> int:
    """Return the number of trained parameters of a recipe. Raises UserError if the model lacks the target
    modules.
    """
    chosen = match_modules(recipe.lora.target_modules, architecture.targets)
    return adapter_parameters(chosen, recipe.lora) + sum(
        map(prod, vocabulary_shapes(recipe.lora, architecture))
    )


def saved_bytes(recipe: Recipe, architecture: Architecture) -> int:
    """Return the size of the saved adapter, in bytes. If embedding and head are tied and trained, peft saves
    their weights twice. Raises UserError if the model lacks the target modules.
    """
    twice = recipe.lora.train_embeddings and architecture.head.tied
    saved = trained_parameters(recipe, architecture) + (architecture.head.weight_params if twice else 0)
    return saved * SAVED_BYTES


def adapter_title(workbench: Workbench, budget: MemoryBudget, width: int) -> Content:
    """Return the title of the adapter's panel, with the total memory of the recipe: ``Adapter  NF4 fits:
    uses ~9.5 of 12.0 GiB``. If the memory is unknown, return only ``Adapter``.
    """
    fit = recipe_fit(workbench, budget, PRECISION_NAMES[precision_of(workbench.recipe)])
    if fit is None:
        return Content("Adapter")
    title = Content("Adapter  ")
    return title + fit.draw(width - title.cell_length, max_bar=0).stylize_before("not bold $foreground")


def adapter_text(
    workbench: Workbench, budget: MemoryBudget, known: MemoryDeltas | None, width: int
) -> Content:
    """Return the text of the adapter's panel. If the model is known, the first line gives the adapter's
    parameters, size on disk and memory. The differences from the preset follow.

    The memory is the adapter's share of the peak, as on the Memory screen. ``known``: the differences in
    memory; None until they are computed.
    """
    differs = difference_text(workbench, known, width)
    compared, architecture = workbench.comparison(budget.device), workbench.architecture()
    if isinstance(compared, UserError) or isinstance(architecture, UserError):
        return differs
    recipe = workbench.recipe
    trained = trained_parameters(recipe, architecture)
    share = trained / architecture.total_params
    text = Content.assemble(
        (f"{format_count(trained)}", "bold"),
        f" of {format_count(architecture.total_params)} parameters ({format_small_percent(share)}) · ",
        f"{format_bytes(saved_bytes(recipe, architecture))} on disk · ",
        f"{format_bytes(compared[precision_of(recipe)].adapter_bytes)} in memory",
    )
    if text.cell_length + len(_WITH) <= width:
        text += Content(_WITH)
    train = next_step("go.train", "check and launch")
    has_room = differs.cell_length + 3 + train.cell_length <= width
    if has_room and workbench.model_refusal() is None:
        differs = Content("   ").join([differs, train])
    return Content("\n").join([text, differs])


def difference_text(workbench: Workbench, known: MemoryDeltas | None, width: int) -> Content:
    """Return the LoRA settings that differ from the preset, as many as fit, and their combined effect on
    memory.
    """
    changes = [
        c for c in diff_recipes(workbench.preset_recipe, workbench.recipe) if c.path.startswith("lora.")
    ]
    if not changes:
        return Content.styled(f"LoRA settings as in preset {workbench.preset}", "$text-muted")
    words = [
        str(change).removeprefix("lora.").removeprefix("use_").replace("_modules", "s") for change in changes
    ]
    memory_cost = f"{format_delta(known.preset_bytes)} · " if known and known.preset_bytes else ""
    for shown in range(len(words), -1, -1):
        rest = [f"{len(words) - shown} more"] if shown < len(words) else []
        named = " · ".join([*words[:shown], *rest])
        text = Content.assemble((f"vs {workbench.preset}: ", "$text-muted"), (memory_cost, "bold"), named)
        if len(text.wrap(width)) <= _MAX_LINES:
            break
    return text


def cursor_text(modules: Sequence[LinearModule], lora: Lora, *, in_block: bool) -> Content:
    """Return a description of the modules that the toggle key would select or deselect. ``in_block``: whether
    the user is marking a block of modules.
    """
    if not modules:
        return Content.styled("No module here.", "$text-muted")
    trained = f"{format_count(adapter_parameters(modules, lora))} trainable{_own(modules, lora)}"
    if len(modules) == 1:
        only = modules[0]
        shape = f"{only.in_features:,} → {only.out_features:,}"
        return Content.styled(f"{only.name}  {shape}  {trained}", "$text-muted")
    block = "Block: " if in_block else ""
    end = f" · {key_name('lora.block')} toggle · Esc cancel" if in_block else ""
    weights = format_count(sum(module.weight_params for module in modules))
    return highlight_keys(f"{block}{len(modules)} modules, {weights} weights, {trained}{end}", "$text-muted")


def _own(modules: Sequence[LinearModule], lora: Lora) -> str:
    """Return text such as ``, rank 32, alpha 16 to 64`` with the ranks and alphas of these modules. If the
    recipe has no rank patterns, omit the ranks; if it has no alpha patterns, omit the alphas.
    """
    words = ""
    for name, number_of, own in (
        ("rank", rank_of, lora.rank_pattern),
        ("alpha", alpha_of, lora.alpha_pattern),
    ):
        numbers = sorted({number_of(lora, module) for module in modules})
        if own and numbers:
            words += (
                f", {name} {' to '.join(format_value(n) for n in dict.fromkeys((numbers[0], numbers[-1])))}"
            )
    return words


@dataclass(frozen=True)
class ChoiceCost:
    """The costs of the recipe with another rank and other target modules."""

    rank: int
    targets: str
    is_current: bool
    trained: int
    saved_bytes: int
    estimate: Estimate
    verdict: Verdict


def choice_costs(recipe: Recipe, architecture: Architecture, budget: MemoryBudget) -> tuple[ChoiceCost, ...]:
    """Return the costs of each rank with each choice of targets. A choice is left out if the model lacks its
    modules. Each estimate takes about 10 ms.
    """
    now = recipe.lora.target_modules
    choices = {
        name: targets
        for name, targets in _TARGETS.items()
        if name == ALL_LINEAR or set(targets) <= set(architecture.kinds())
    }
    if now not in choices.values():
        choices = {"as selected": now, **choices}
    variants = {
        (rank, name): replace_setting(
            replace_setting(recipe, "lora.rank", rank), "lora.target_modules", targets
        )
        for rank in sorted({*_RANKS, recipe.lora.rank})
        for name, targets in choices.items()
    }
    costs = []
    for (rank, name), estimated in estimate_variants(variants.items(), architecture, budget.device).items():
        changed, verdict = variants[rank, name], check_fit(estimated, budget.bytes)
        trained, saved = trained_parameters(changed, architecture), saved_bytes(changed, architecture)
        costs.append(ChoiceCost(rank, name, changed == recipe, trained, saved, estimated, verdict))
    return tuple(costs)


def costs_title(costs: tuple[ChoiceCost, ...]) -> Content:
    """Return the title of the panel with the costs, followed by a legend of the symbols in the panel."""
    signs = verdict_legend((cost.verdict for cost in costs), _ONE_LINE)
    return Content.assemble(COSTS, "   ", signs.stylize_before("not bold $foreground"))


def choice_lines(costs: tuple[ChoiceCost, ...], with_bars: bool, width: int, height: int) -> list[Content]:
    """Return the costs of each choice as lines: with bars if there is room for all bars, otherwise as a
    table.

    Args:
        costs: The costs to show.
        with_bars: Whether bars may be drawn.
        width: Width of a line, in cells.
        height: Number of visible lines. A table may have more.
    """
    bars = _choice_bars(costs, width, height) if with_bars else []
    return bars or _choice_table(costs, width)


def _choice_bars(costs: tuple[ChoiceCost, ...], width: int, height: int) -> list[Content]:
    """Return a group of lines for each choice of targets; an empty list if they do not fit.

    A group has a line for each rank, with parameters, size on disk, a bar of the adapter's memory, and the
    memory of the run. Bars are relative to the largest adapter. Groups are side by side if they do not fit
    ``height`` below each other.
    """
    most = max(cost.estimate.adapter_bytes for cost in costs)
    groups: dict[str, list[ChoiceCost]] = {}
    for cost in costs:
        groups.setdefault(cost.targets, []).append(cost)
    for number in range(1, len(groups) + 1):
        cells = (width - _GROUP_GAP * (number - 1)) // number
        if cells < _GROUP_CELLS + _LEAST_BAR:
            break
        draw = partial(_group_lines, most_bytes=most, width=cells)
        drawn = [draw(name, group) for name, group in groups.items()]
        lines: list[Content] = []
        for at in range(0, len(drawn), number):
            lines += [Content("")] if lines else []
            pairs = zip(*drawn[at : at + number], strict=True)
            lines += [Content(" " * _GROUP_GAP).join(parts) for parts in pairs]
        if len(lines) <= height:
            return lines
    return []


def _group_lines(name: str, group: Sequence[ChoiceCost], *, most_bytes: int, width: int) -> list[Content]:
    """Return lines for one choice of targets: a heading, followed by a line for each rank. Each line is
    ``width`` cells wide. ``most_bytes``: the memory of the largest adapter.
    """
    bar_cells = width - _GROUP_CELLS
    heads = f"{'params':>{_PARAMS_CELLS}}{'disk':>{_DISK_CELLS}}  "
    heads += f"{'adapter at the peak':<{bar_cells}}{'needs':>{_FIGURE_CELLS - 2}}"
    lines = [Content.assemble((f"  {name:<{_CHOICE_NAME_CELLS - 2}}", "bold"), (heads, "dim"))]
    for cost in group:
        figure = fit_figure(cost.verdict, is_current=cost.is_current)
        figures = (
            f"{format_count(cost.trained):>{_PARAMS_CELLS}}{format_bytes(cost.saved_bytes):>{_DISK_CELLS}}"
        )
        rank = f" {f'rank {cost.rank}':<{_CHOICE_NAME_CELLS - 2}}"
        lines.append(
            Content.assemble(
                ("●" if cost.is_current else " ", "bold $primary"),
                (f"{rank}{figures}  ", "bold" if cost.is_current else ""),
                (bar(cost.estimate.adapter_bytes / most_bytes, bar_cells, has_track=False), "$training 50%"),
                figure.pad_left(_FIGURE_CELLS - figure.cell_length),
            )
        )
    return [line.truncate(width, pad=True) for line in lines]


def _choice_table(costs: tuple[ChoiceCost, ...], width: int) -> list[Content]:
    """Return a heading, and a line for each rank. A line gives parameters, size on disk and memory, for as
    many choices of targets as fit into ``width``.
    """
    by_rank: dict[int, list[ChoiceCost]] = {}
    for cost in costs:
        by_rank.setdefault(cost.rank, []).append(cost)
    rows = list(by_rank.values())
    names = [cost.targets for cost in rows[0]] if rows else []
    names = names[: max(1, (width - _RANK_CELLS) // _CHOICE_CELLS)]
    with_disk = width >= _RANK_CELLS + len(names) * (_CHOICE_CELLS + _DISK_CELLS)
    choice_cells = _CHOICE_CELLS + (_DISK_CELLS if with_disk else 0)
    spare = max(0, width - _RANK_CELLS - len(names) * choice_cells) // max(1, len(names))
    gap = _CHOICE_GAP + min(_MAX_SPREAD, spare)

    def cell(row: list[ChoiceCost], number: int) -> Content:
        cost = row[number]
        mark, weight = ("●", "bold") if cost.is_current else (" ", "")
        disk = f"{format_bytes(cost.saved_bytes):>{_DISK_CELLS}}" if with_disk else ""
        memory = fit_figure(cost.verdict, is_current=cost.is_current)
        return Content.assemble(
            (mark, "bold $primary"),
            (f"{format_count(cost.trained):>6}{disk}", weight),
            " " * (12 - memory.cell_length),
            memory,
        )

    disk_cells = _DISK_CELLS if with_disk else 0
    title = f" {'params':>6}{'disk' if with_disk else '':>{disk_cells}}{'needs':>10}"
    columns = [Column[list[ChoiceCost]](title="rank", text=lambda row: f"{row[0].rank}", width=4, right=True)]
    for number in range(len(names)):
        columns.append(Column(title=title, text=partial(cell, number=number), gap=gap))
    heads = "".join(f"{name:<{choice_cells + gap - _CHOICE_GAP}}" for name in names)
    indent = " " * (_RANK_CELLS + 1 + gap - _CHOICE_GAP)
    return [
        Content(indent + heads.rstrip()).stylize("bold"),
        *table(columns, rows, width),
    ]
