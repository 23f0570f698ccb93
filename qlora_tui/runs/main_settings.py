"""The settings in which runs most often differ, as short texts for the columns of lists and for summaries
of one line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from qlora_tui.formatting import format_number, format_rate
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank


class MainSetting(NamedTuple):
    """A setting of a run, as text."""

    title: str
    """Title of a column with this setting, such as ``lr``."""
    value: str
    """Text of the value in a column with this title, such as ``0.0002``."""
    words: str
    """Text that stands alone, where there is no title: ``lr 0.0002``."""


def main_settings(recipe: Recipe) -> tuple[MainSetting, ...]:
    """Return the settings in which runs most often differ, always in this order: ``nf4``, ``r16``,
    ``2,048 tok``, ``batch 2 × 8``, ``lr 0.0002``, ``2 epochs``.
    """
    method, rank, training = recipe.quantization.method, format_rank(recipe.lora), recipe.training
    length, batch = length_and_batch(recipe)
    rate, epochs = format_rate(training.learning_rate), format_number(training.epochs)
    return (
        MainSetting("precision", method, method),
        MainSetting("rank", rank, rank),
        MainSetting("length", length, length),
        MainSetting("batch", batch.removeprefix("batch "), batch),
        MainSetting("lr", rate, f"lr {rate}"),
        MainSetting("epochs", epochs, f"{epochs} {'epoch' if training.epochs == 1 else 'epochs'}"),
    )


def length_and_batch(recipe: Recipe) -> tuple[str, str]:
    """Return ``1,024 tok``, ``batch 1 × 8``: sequence length, and micro-batch size × accumulation."""
    training = recipe.training
    return (
        f"{recipe.data.max_length:,} tok",
        f"batch {training.micro_batch_size} × {training.gradient_accumulation}",
    )


def shared_settings(runs: Iterable[Sequence[MainSetting]]) -> tuple[MainSetting, ...]:
    """Return the settings that all runs with a readable recipe have in common; empty for fewer than two such
    runs. ``runs``: the settings of each run, empty if its recipe is unreadable.
    """
    readable = [settings for settings in runs if settings]
    if len(readable) < 2:
        return ()
    return tuple(each for each in readable[0] if all(each in settings for settings in readable))


def setting_words(settings: Sequence[MainSetting], shared: Collection[MainSetting] = ()) -> str:
    """Return a run's settings in one line, without those in ``shared``, which other runs in the list have
    too. If ``settings`` is empty, return ``recipe unreadable``.
    """
    if not settings:
        return "recipe unreadable"
    return " · ".join(each.words for each in settings if each not in shared)
