"""The five steps to a first adapter: a list for Home, and two lines for each screen of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from textual.content import Content

from qlora_tui import paths
from qlora_tui.memory import check_fit
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.data_checks import data_error
from qlora_tui.tui.key_names import command_key, key_label, key_name, pressable
from qlora_tui.tui.workbench import Workbench

STEP_MODES = ("models", "data", "memory", "lora", "train")
"""The screen of each step, by its name in the app's modes."""
_STEPS = (
    ("Model", "The base model: start small, with 1 to 3 billion parameters."),
    ("Data", "Examples to learn from: JSONL, JSON, CSV or Parquet."),
    ("Memory", "Does it fit? One key finds the change that makes it fit."),
    ("LoRA", "Which layers get an adapter, and its rank. Defaults work well."),
    ("Train", "Check it all and launch. A run continues when you log out."),
)


@dataclass(frozen=True)
class FirstSteps:
    """Which of the steps are done."""

    model: bool
    data: bool
    fits: bool

    @classmethod
    def of(cls, recipe: Recipe, verdict: str, *, has_data_error: bool) -> FirstSteps:
        """Memory counts as done only with a model: there is no verdict without one."""
        data = bool(recipe.data.sources) and not has_data_error
        return cls(bool(recipe.model.id), data, verdict in ("fits", "tight"))

    @property
    def done(self) -> tuple[bool, bool, bool, bool, bool]:
        """Whether each step is done. LoRA needs no choice: its defaults can be trained."""
        return self.model, self.data, self.fits, self.fits, False

    @property
    def next(self) -> int:
        """Index of the first step that is not done; the last one, the launch, never is."""
        return self.done.index(False)

    def after(self, mode: str) -> int:
        """Index of the step to go to from a screen: the one after it, done or not.

        From Train and from screens that are no step it is the first that is not done.
        """
        index = STEP_MODES.index(mode) if mode in STEP_MODES else len(_STEPS) - 1
        return index + 1 if index + 1 < len(_STEPS) else self.next


def read_first_steps(workbench: Workbench, budget: MemoryBudget) -> FirstSteps:
    """Read which steps are done, in a thread: the first rows of the data are read."""
    recipe, estimate = workbench.recipe, workbench.estimate(budget.device)
    verdict = "" if estimate is None else check_fit(estimate, budget.bytes).word
    return FirstSteps.of(recipe, verdict, has_data_error=data_error(recipe.data) is not None)


def first_steps_lines(progress: FirstSteps) -> list[Content]:
    """One line a step for Home: ``✓`` is done, ``▸`` comes next."""
    lines = []
    for number, (mode, (name, text)) in enumerate(zip(STEP_MODES, _STEPS, strict=True)):
        is_next = number == progress.next
        sign, style = (
            ("✓", "$success") if progress.done[number] else ("▸" if is_next else " ", "bold $accent")
        )
        lines.append(
            Content.assemble(
                (f"{sign} ", style),
                key_label(f"go.{mode}"),
                (f" {name:<8}", "bold" if is_next else ""),
                (text, "" if is_next else "dim"),
            )
        )
    next_step, hint = key_label("app.next_step"), " goes to the next step from any screen. Defaults work."
    return [*lines, Content.assemble("  ", next_step, (hint, "dim"))]


def guide_lines(progress: FirstSteps, mode: str, width: int) -> Content:
    """Two lines for the screen of a step: the five steps with the key of the next, and this one's sentence.

    Args:
        progress: Which steps are done.
        mode: The screen, one of ``STEP_MODES``.
        width: Cells of a line; from 78 on, both fit.
    """
    here, following = STEP_MODES.index(mode), progress.after(mode)
    parts = [Content.styled(f"Step {here + 1} of {len(_STEPS)}", "bold")]
    for number, (name, _text) in enumerate(_STEPS):
        weight = "bold" if number == here else "dim"
        sign = ("✓ ", "$success") if progress.done[number] else ("▸ ", "bold $accent")
        parts.append(
            Content.assemble(sign if progress.done[number] or number == here else "", (name, weight))
        )
    steps = Content("  ").join(parts)
    keys = _press("app.guide", "Hide")
    if following != here:
        verb = "Next" if progress.done[here] else "Skip" if following > here else "Back"
        keys = Content.assemble(_press("app.next_step", verb), "  ", keys)
    gap = " " * max(1, width - steps.cell_length - keys.cell_length)
    return Content.assemble(steps, gap, keys, "\n", _STEPS[here][1])


def is_guide_hidden() -> bool:
    """Whether the user has hidden the two lines."""
    return _hidden_mark().exists()


def hide_guide(*, hidden: bool) -> None:
    """Remember for later starts whether the two lines are hidden."""
    if hidden:
        _hidden_mark().touch(mode=0o600)
    else:
        _hidden_mark().unlink(missing_ok=True)


def _hidden_mark() -> Path:
    return paths.state_dir() / "guide-hidden"


def _press(command: str, label: str) -> Content:
    key = pressable(key_name(command), command_key(command)).stylize("bold $accent")
    return Content.assemble(key, (f" {label}", "dim"))
