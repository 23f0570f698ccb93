"""Which settings fit into memory, which changes make the recipe fit, and the panel of the verdict.

:func:`solve` is slow, so it must run in a thread. For example, it reads the header of a GGUF file to find out
whether the model must be converted before its first run. Such a header can contain hundreds of thousands of
tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from textual.content import Content
from textual.message import Message

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_sizes
from qlora_tui.memory import (
    Estimate,
    MemorySaving,
    StepChoice,
    Verdict,
    WhatFits,
    cheapest_changes,
    choose_step,
    estimate,
    largest_settings,
    minimum_bytes,
)
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.estimate import PRECISIONS, Precision, precision_of, with_precision
from qlora_tui.memory.explain import describe_choice, describe_speedup, fit_texts
from qlora_tui.memory.levels import Conversion
from qlora_tui.memory.solver import what_if
from qlora_tui.memory.step_choice import describe_host_memory
from qlora_tui.memory.traces import NO_TRACES
from qlora_tui.recipe.fields import fields, get_setting, replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import bare_key, highlight_keys, key_name
from qlora_tui.tui.render.figures import Figure, large_figures
from qlora_tui.tui.render.labels import fit_title, needed_words, next_step, verdict_words
from qlora_tui.tui.screens.memory.step_panels import verdict_sentence
from qlora_tui.tui.setting_stepper import step_value
from qlora_tui.tui.widgets.controls import Lines, Panel, ViList

HALVED_SETTINGS = ("data.max_length", "training.micro_batch_size", "lora.rank")
"""Settings with two keys on the Memory screen: one key doubles the value, the other halves it."""
CYCLED_SETTINGS = ("lora.target_modules", "training.gradient_checkpointing")
"""Settings with one key on the Memory screen. The key selects the next of several values."""
METHOD_OF_PRECISION = {"nf4": "nf4", "int8": "int8", "fp16": "none"}
"""Value of ``quantization.method`` for each precision."""
TARGETS: tuple[tuple[str, ...], ...] = (
    ("all-linear",),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj"),
)
"""Target modules that a key cycles through: those of the QLoRA paper, of many recipes, and of the LoRA paper.
"""


@dataclass(frozen=True)
class KeyEffect:
    """What a key would do: the next value of its setting, and the change in the recipe's memory in bytes."""

    value: Any
    bytes: int
    is_exact: bool = True
    """Whether the change is the difference between two traced steps."""


@dataclass(frozen=True)
class Solution:
    """Which settings and changes fit into memory. The default values mean that nothing has been computed
    yet.
    """

    fitting: Mapping[Precision, WhatFits] = field(default_factory=dict)
    """For each setting, the largest value that fits, by precision."""
    lowered: Mapping[Precision, Mapping[str, KeyEffect]] = field(default_factory=dict)
    """Effect of the key that halves a setting or selects its next value, by precision and path of the
    setting. A setting that the key would not change is left out.
    """
    changes: tuple[MemorySaving, ...] = ()
    """Changes that make the recipe fit, cheapest first; empty if the recipe already fits, or if no change
    makes it fit.
    """
    least_bytes: int = 0
    """Memory of the recipe with all changes that save memory, in bytes; 0 if the recipe fits, or if
    ``changes`` is not empty.
    """
    step: StepChoice | None = None
    """How a run would use free memory; None if the recipe does not fit."""
    host_memory: str = ""
    """Sentences about the parts of the recipe that are kept in host memory, and about the time that this
    costs; empty if there are none.
    """
    conversion: Conversion | None = None
    """The conversion that the model's GGUF file needs before its first run; None if no conversion is needed.
    """
    recipes: tuple[Recipe, ...] = ()
    """The recipes to trace: the recipe with each of ``changes``, and the recipe with each value that
    ``lowered`` has for the recipe's precision.
    """
    is_exact: bool = False
    """Whether the steps of all ``recipes`` have been traced."""


def solve(recipe: Recipe, architecture: Architecture, budget: MemoryBudget, *, fits: bool) -> Solution:
    """Return which settings and which changes to the recipe fit into memory. This is slow, so call it in a
    thread. ``fits``: whether the recipe itself fits.
    """
    device, available = budget.device, budget.bytes
    variants = {precision: with_precision(recipe, precision) for precision in PRECISIONS}
    lowered = {precision: _lowered(variant, architecture) for precision, variant in variants.items()}
    changes = cheapest_changes(recipe, architecture, available, device=device)
    halved = (replace_setting(recipe, *change) for change in lowered[precision_of(recipe)].items())
    recipes = (*halved, *(change.recipe for change in changes))
    return Solution(
        fitting={
            precision: largest_settings(variant, architecture, available, device=device)
            for precision, variant in variants.items()
        },
        lowered={
            precision: _effects(variants[precision], values, architecture, budget)
            for precision, values in lowered.items()
        },
        changes=changes,
        least_bytes=0 if fits or changes else minimum_bytes(recipe, architecture, device=device),
        step=choose_step(recipe, architecture, available, device=device) if fits else None,
        host_memory=describe_host_memory(recipe, architecture, device),
        conversion=_conversion(recipe.model.id),
        recipes=recipes,
        is_exact=all(estimate(each, architecture, device=device).traced for each in recipes),
    )


def next_targets(now: tuple[str, ...], kinds: Collection[str]) -> tuple[str, ...]:
    """Return the entry of :data:`TARGETS` that follows ``now``. Entries with kinds that the model lacks are
    skipped. If ``now`` is not an entry, return all-linear.

    ``kinds``: the kinds of the model's modules.
    """
    choices = [choice for choice in TARGETS if choice == TARGETS[0] or set(choice) <= set(kinds)]
    index = choices.index(now) + 1 if now in choices else 0
    return choices[index % len(choices)]


def _lowered(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    """Return, by path of the setting, the value that a key of the Memory screen would set. If a setting has
    two keys, the value is that of the key that halves it. Settings that the key would not change are omitted.
    """
    lower: dict[str, Any] = {}
    for path in (*HALVED_SETTINGS, *CYCLED_SETTINGS):
        value = get_setting(recipe, path)
        if path == "lora.target_modules":
            lower[path] = next_targets(value, architecture.kinds())
        else:
            lower[path] = step_value(fields()[path], value, -1 if path in HALVED_SETTINGS else 1)
        if lower[path] == value:
            del lower[path]
    return lower


def _effects(
    recipe: Recipe, values: Mapping[str, Any], architecture: Architecture, budget: MemoryBudget
) -> dict[str, KeyEffect]:
    """Return the effect of setting each of ``values``, by path of the setting. Either all effects are exact,
    or none is.
    """
    variants = {"": recipe, **{path: replace_setting(recipe, path, value) for path, value in values.items()}}
    verdicts = what_if(variants.items(), architecture, budget)
    if not all(verdict.is_exact for verdict in verdicts.values()):
        verdicts = what_if(variants.items(), architecture, budget.with_traces(NO_TRACES))
    now = verdicts.pop("").needed_bytes
    return {
        path: KeyEffect(values[path], each.needed_bytes - now, each.is_exact)
        for path, each in verdicts.items()
    }


def _conversion(model_id: str) -> Conversion | None:
    if not model_id.endswith(".gguf"):
        return None
    from qlora_tui.training.gguf_conversion import pending_conversion  # its import loads tokenizers

    return pending_conversion(model_id)


class FitPanel(Panel):
    """Whether the recipe fits: the verdict as the title, the changes that make the recipe fit, and notes on
    the estimate.
    """

    @dataclass
    class Chosen(Message):
        """Posted when the user selects a change. ``number``: index of the change in
        :attr:`Solution.changes`.
        """

        number: int

    def __init__(self) -> None:
        self.choices = ViList(id="choices", classes="quiet")
        self._notes = Lines(id="fit-notes")
        self._needed = Lines(id="fit-needed")
        super().__init__("Fit", self._needed, self.choices, self._notes, id="fit-panel")

    def offer(self, *, changes: bool) -> None:
        """If ``changes``, show the keys that apply or choose a change; otherwise, hide these keys."""
        self.show_keys((("memory.apply", "apply ▸"), ("memory.choose", "choose")) if changes else ())

    def show(
        self,
        name: str,
        estimate: Estimate,
        verdict: Verdict,
        budget: MemoryBudget,
        solution: Solution,
        refusal: UserError | None,
        length_warning: UserError | None,
        *,
        is_recipe: bool,
    ) -> None:
        """Show whether an estimate fits.

        Args:
            name: Name of the precision.
            estimate: The estimate for this precision.
            verdict: The verdict on this precision.
            budget: The memory that the estimate is compared with.
            solution: The settings and the changes to the recipe that fit into memory.
            refusal: Why the model cannot be trained; None if it can be.
            length_warning: Warning about a sequence length beyond the model's context; None if there is none.
            is_recipe: Whether the precision is the recipe's.
        """
        can_train, is_narrow = refusal is None, self.screen.has_class("-narrow")
        word, style = verdict_words(verdict, can_train=can_train)
        train = next_step("go.train", "check and launch")
        is_done = is_recipe and can_train and verdict.fits_even_if_tight
        longest = fit_texts(verdict, can_train=can_train)[0]
        before, _, after = longest.partition(" of ")
        if is_narrow and solution.step and is_recipe:
            title = Content("With free memory")
        elif is_narrow or self._needed.display:
            # The figures are above the bars or in large digits, which follow the verb.
            words = word if is_narrow else before.rpartition(" ")[0]
            title = Content.styled(f"{name} {words}", "" if style == "$text-muted" else style)
        elif verdict.word == "uncertain":
            title = Content.styled(f"{name} {word}, {verdict_sentence(verdict)}", style)
        else:
            title = fit_title(name, verdict, self.size.width - 4, can_train=can_train)
        has_room = title.cell_length + 3 + train.cell_length <= self.size.width - 1
        self.show_title(Content("   ").join([title, train]) if is_done and has_room else title)
        size = format_bytes(verdict.used_bytes or verdict.needed_bytes)
        # The unit of the total is next to the figure, if both have the same unit.
        total, comma, more = after.partition(",")
        rest = total.replace(f" {size.rpartition(' ')[2]}", "") + comma + more
        figure = Figure(f"of {rest}", size, f"bold {style}")
        self._needed.show([*large_figures([figure]), Content("")])
        self.choices.display = bool(solution.changes)
        self.choices.show(partial(choice_lines, solution.changes))
        notes = [train] if is_done and not has_room else []
        notes += _notes(estimate, budget, solution, length_warning, is_recipe=is_recipe)
        if uncertainty := _uncertainty(verdict, is_narrow=is_narrow):
            notes.append(Content.styled(uncertainty, "$text-muted"))
        self._notes.show(notes)

    def on_option_list_option_selected(self, event: ViList.OptionSelected) -> None:
        """Post ``Chosen`` for the selected change."""
        event.stop()
        self.post_message(self.Chosen(event.option_index))


def _notes(
    estimate: Estimate,
    budget: MemoryBudget,
    solution: Solution,
    length_warning: UserError | None,
    *,
    is_recipe: bool,
) -> Iterator[Content]:
    if solution.least_bytes:
        yield highlight_keys(
            "No change makes it fit: even with every change that saves memory, it needs "
            f"{format_bytes(solution.least_bytes)}. Select a smaller model with {key_name('go.models')}, "
            "or use a larger GPU."
        )
    if solution.changes and not is_recipe:
        yield Content("These changes apply to the recipe's precision.")
    if conversion := solution.conversion:
        on_cpu = budget.device.kind == "cpu"
        yield Content(conversion.words(estimate.process_bytes if on_cpu else None))
    if length_warning is not None:
        # The warning's ``what`` is left out, since the length is in the table of settings.
        yield Content.styled(f"{length_warning.why} {length_warning.fix}", "$warning")
    if solution.step is not None and is_recipe:
        yield Content(_step_text(solution.step, budget.bytes))
    if solution.host_memory and is_recipe:
        yield Content(solution.host_memory)
    yield from map(Content, estimate.notes)


def _uncertainty(verdict: Verdict, *, is_narrow: bool) -> str:
    """Return sentences with the range of the expected memory and the reason for the uncertainty. For a traced
    step, if the limit is outside the range, return only what was not traced. ``is_narrow``: whether to
    leave out everything except the range.
    """
    if verdict.is_exact and verdict.word != "uncertain":
        return "" if is_narrow else f"Not traced: {verdict.reason}."
    expected = format_sizes(verdict.low_bytes, "to", verdict.high_bytes)
    return f"Expected: {expected}." + ("" if is_narrow else f" Uncertain: {verdict.reason}.")


def choice_lines(changes: tuple[MemorySaving, ...], width: int) -> list[tuple[str, Content]]:
    """Return (number, text) for each change that makes the recipe fit, cheapest first. The text describes the
    change, the memory that the changed recipe needs, and the drawback of the change.
    """
    lines = []
    for number, change in enumerate(changes):
        key = bare_key("memory.apply") if not number else ""
        head = Content.assemble(
            (f"{'▸' if not number else ' '} {key:<2}", "$key bold"),
            (change.label, "bold" if not number else ""),
        )
        details = Content.assemble(
            f"{needed_words(change.verdict)} ",
            verdict_words(change.verdict),
            (f", {change.cost}" if change.cost else "", "$text-muted"),
        )
        # The first four cells of a text contain a mark and a key. Further lines are indented by four cells.
        pieces = [*head[4:].wrap(width - 4), *details.wrap(width - 4)]
        wrapped = [(Content("    ") if below else head[:4]) + piece for below, piece in enumerate(pieces)]
        lines.append((str(number), Content("\n").join(wrapped)))
    return lines


def _step_text(choice: StepChoice, all_bytes: int) -> str:
    """Return how a run uses free memory, and how much faster this makes the run. ``all_bytes``: the total
    memory of the device.
    """
    chosen = describe_choice(choice)
    if not chosen:
        why = (
            "Too little memory is left to keep activations"
            if choice.estimate.exact
            else "What kept activations would take is uncertain"
        )
        return f"{why}, so all layers recompute their activations."
    total, faster = format_bytes(choice.estimate.total_bytes), describe_speedup(choice.speedup)
    free = format_sizes(choice.least_free_bytes, "of", all_bytes)
    return (
        f"If {free} are free, a run uses ~{total} and is about {faster}: {chosen}. Otherwise, it uses less."
    )
