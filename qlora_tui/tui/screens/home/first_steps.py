"""The five steps to a first adapter, shown on Home until there is a run."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_label

_STEPS = (
    ("go.models", "Model", "The base model: start small, with 1 to 3 billion parameters."),
    ("go.data", "Data", "Examples to learn from: JSONL, JSON, CSV or Parquet."),
    ("go.memory", "Memory", "Does it fit? One key finds the change that makes it fit."),
    ("go.lora", "LoRA", "Which layers get an adapter, and its rank. Defaults work well."),
    ("go.train", "Train", "Check it all and launch. A run continues when you log out."),
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


def first_steps_lines(progress: FirstSteps) -> list[Content]:
    """One line a step: ``✓`` is done, ``▸`` comes next. LoRA needs no choice, so it is never next."""
    # A recipe that fits can be trained with the default adapter.
    done = (progress.model, progress.data, progress.fits, progress.fits, False)
    next_step = done.index(False)
    lines = []
    for number, (command, name, text) in enumerate(_STEPS):
        sign, style = (
            ("✓", "$success") if done[number] else ("▸", "bold $accent") if number == next_step else (" ", "")
        )
        lines.append(
            Content.assemble(
                (f"{sign} ", style),
                key_label(command),
                (f" {name:<8}", "bold" if number == next_step else ""),
                (text, "" if number == next_step else "dim"),
            )
        )
    lines.append(Content.styled("  In any order, and none is needed for the demo: defaults work.", "dim"))
    return lines
