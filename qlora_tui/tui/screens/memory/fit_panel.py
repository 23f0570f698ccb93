"""Whether it fits, and what would make it fit: changes with their price, of which Enter applies one."""

from __future__ import annotations

from collections.abc import Iterator

from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_gib
from qlora_tui.memory import Estimate, MemorySaving, StepChoice, Verdict, check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.memory.explain import describe_choice, describe_speedup
from qlora_tui.tui.key_names import bare_key, highlight_keys, key_name
from qlora_tui.tui.render.labels import VERDICT_STYLE, refusal_words, verdict_words
from qlora_tui.tui.screens.memory.solution import Solution
from qlora_tui.tui.screens.memory.stacked_bar import spare_words
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel


class FitPanel(Panel):
    """The verdict as its title, the changes that make the recipe fit, and notes on the estimate."""

    class Chosen(Message):
        """Enter was pressed on a change, or it was clicked."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    def __init__(self) -> None:
        self.choices = ViList(id="choices")
        self._notes = Static(id="fit-notes")
        super().__init__("Fit", self.choices, self._notes, id="fit-panel")

    def offer(self, *, changes: bool) -> None:
        """Show the keys for changes, or none."""
        self.show_keys((("memory.apply", "apply ▸"), ("memory.choose", "choose")) if changes else ())

    def show(
        self,
        name: str,
        estimate: Estimate,
        budget: MemoryBudget,
        solution: Solution,
        refusal: UserError | None,
        length_warning: UserError | None,
        *,
        is_recipe: bool,
    ) -> None:
        """Show an estimate of the precision ``name``; ``is_recipe``: it is that of the recipe.

        ``refusal``: why the model cannot be trained.
        """
        verdict = check_fit(estimate, budget.bytes)
        self.show_title(_verdict_title(verdict, name, can_train=refusal is None))
        self.choices.display = bool(solution.changes)
        self.choices.show(choice_lines(solution.changes, self.choices.scrollable_content_region.width))
        notes = [] if refusal is None else [_refusal_text(refusal)]
        notes += list(_notes(estimate, budget, solution, length_warning, is_recipe=is_recipe))
        notes.append(Content.styled(_uncertainty(verdict), "$text-muted"))
        update_if_changed(self._notes, Content("\n").join(notes))

    def on_option_list_option_selected(self, event: ViList.OptionSelected) -> None:
        """Say which change it was."""
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
        yield _nothing_helps(solution.least_bytes)
    if solution.changes and not is_recipe:
        yield Content("The changes are for the precision of the recipe.")
    if conversion := solution.conversion:
        on_cpu = budget.device.kind == "cpu"
        yield Content(conversion.words(estimate.process_bytes if on_cpu else None))
    if length_warning is not None:
        # The setting itself is shown among the settings.
        yield Content.styled(f"{length_warning.why} {length_warning.fix}", "$warning")
    if solution.step is not None and is_recipe:
        yield _step_text(solution.step, estimate.total_bytes)
    if solution.host_memory and is_recipe:
        yield Content(solution.host_memory)
    yield from map(Content, estimate.notes)


def choice_lines(changes: tuple[MemorySaving, ...], width: int) -> list[tuple[str, Content]]:
    """(number, text) of each change that makes it fit, the cheapest first: what it is, memory, and cost."""
    lines = []
    for number, change in enumerate(changes):
        key = bare_key("memory.apply") if not number else ""
        head = Content.assemble(
            (f"{'▸' if not number else ' '} {key:<2}", "$accent bold"),
            (change.label, "bold" if not number else ""),
        )
        word = change.verdict.word
        details = Content.assemble(
            f"{format_gib(change.estimate.total_bytes)} GiB ",
            (word, VERDICT_STYLE[word]),
            (f", {change.cost}" if change.cost else "", "$text-muted"),
        )
        wrapped = [*_hanging(head, width), *(Content("    ") + part for part in details.wrap(width - 4))]
        lines.append((str(number), Content("\n").join(wrapped)))
    return lines


def _hanging(line: Content, width: int) -> list[Content]:
    """Wrap a line whose first four cells are a mark."""
    first, rest = line[:4], line[4:]
    return [(Content("    ") if number else first) + part for number, part in enumerate(rest.wrap(width - 4))]


def _step_text(choice: StepChoice, least_bytes: int) -> Content:
    """What the run does with free memory, and what that gains.

    ``least_bytes``: the memory that it needs, as the bars show it.
    """
    chosen = describe_choice(choice)
    if not chosen:
        return Content("Too little memory is left to keep activations of layers, which are recomputed.")
    total, faster = format_gib(choice.estimate.total_bytes), describe_speedup(choice.speedup)
    return Content.assemble(
        f"The run needs {format_gib(least_bytes)} GiB. With ",
        (f"{format_gib(choice.least_free_bytes)} GiB", "bold"),
        f" free it takes {total} and is about {faster}: {chosen}.",
    )


def _nothing_helps(least_bytes: int) -> Content:
    """The text shown if no change makes it fit."""
    return highlight_keys(
        "No change makes it fit: with every change that saves memory it still needs "
        f"{format_gib(least_bytes)} GiB. Select a smaller model with {key_name('go.models')}, "
        "or use a larger GPU."
    )


def _uncertainty(verdict: Verdict) -> str:
    low, high = format_gib(verdict.low_bytes), format_gib(verdict.high_bytes)
    return f"Expected: {low} to {high} GiB. Uncertain: {verdict.reason}."


def _refusal_text(refusal: UserError) -> Content:
    return Content.assemble(
        (f"{refusal_words(refusal)}. ", "$error"),
        highlight_keys(f"{key_name('go.models')} says what to do."),
    )


def _verdict_title(verdict: Verdict, precision: str, *, can_train: bool) -> Content:
    """``NF4 fits, 17.0 GiB to spare``: the verdict as a title."""
    word, style = verdict_words(verdict.word, can_train=can_train)
    return Content.styled(f"{precision} {word}, {spare_words(verdict)}", style)
