"""A learning-rate range test: the loss of real steps at a rising rate, and where the result is stored.

``training.lr_range_worker`` measures it, ``lr_suggestion`` reads a rate from it; the command ``lr-find`` and
the Train screen show both. A result belongs to one recipe, but for the settings that the test replaces or
that change no step, and to one state of its data files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.data.sources import every_source, source_stamps
from qlora_tui.decoding import Count, decode_json
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import atomic_write, private_dir, read_regular
from qlora_tui.recipe.absolute_paths import with_absolute_paths
from qlora_tui.recipe.fields import WITHOUT_EFFECT_ON_WEIGHTS, get_setting, replace_setting
from qlora_tui.recipe.schema import Recipe

_FORMAT = 1
"""Bump when the steps of a test change, so that earlier results no longer count."""
_IGNORED = (
    *WITHOUT_EFFECT_ON_WEIGHTS,
    "training.lr_scheduler",
    "training.lr_cycles",
    "training.lr_power",
    "training.lr_decay_share",
    "training.warmup_ratio",
    "training.epochs",
    "training.max_steps",
    "training.report_to",
)
"""Settings that the test replaces, or that change no step."""
MANY_EPOCHS = 1000.0
"""Epochs of a test, which its number of steps ends."""
_DIVERGED, _FAR_ABOVE_START = 2.0, 1.25
"""A test ends at this multiple of its lowest loss, if that is also this multiple of the loss before it.

fastai's ``LRFinder`` ends at 4 times the lowest alone. A language model that has lost everything is at the
logarithm of its vocabulary, about 11 nats, so 4 times a loss of 3 is never reached.
"""
_AVERAGED = 3
"""Steps over which the loss is averaged for that."""
MIN_STEPS = 20
"""Fewer steps leave too few points between two powers of ten."""


class RangeSettings(Struct, frozen=True, kw_only=True):
    """Which rates are tried, in how many optimizer steps."""

    low: float = 1e-6
    high: float = 1e-1
    steps: Count = 60

    def rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 0: the logarithm rises evenly."""
        return float(self.low * (self.high / self.low) ** (step / (self.steps - 1)))

    def check(self) -> None:
        """Raise UserError where no test can have these settings."""
        if not 0 < self.low < self.high <= 1:
            what = f"The rates go from {self.low:g} to {self.high:g}."
            fix = "Rise from a rate above 0 to a higher one of at most 1."
        elif self.steps < MIN_STEPS:
            what = f"The test has {self.steps} steps."
            fix = f"Use {MIN_STEPS} steps or more."
        else:
            return
        raise UserError("Invalid range test", what=what, fix=fix, exit_code=EXIT_USAGE)


class RangeStep(Struct, frozen=True):
    """One optimizer step of the test."""

    rate: float
    """Its learning rate."""
    loss: float | None
    """Mean loss of its batch before the update, in nats per trained token; None where it is not finite."""
    untrained: float
    """Loss of the same batch before the first step."""


class LrRange(Struct, frozen=True, kw_only=True):
    """A test, as far as it has come."""

    settings: RangeSettings
    measured_at: float
    """Unix time of its start."""
    seconds: float = 0.0
    """From the start to the last step, with loading."""
    steps: tuple[RangeStep, ...] = ()
    diverged: bool = False
    """Whether it ended early, because the loss was not finite or far above its lowest."""


def has_diverged(steps: tuple[RangeStep, ...]) -> bool:
    """Whether the last loss is not finite, or the loss has risen far above its lowest and its first."""
    if not steps or steps[-1].loss is None:
        return bool(steps)
    start = sum(step.untrained for step in steps) / len(steps)
    losses = [start + step.loss - step.untrained for step in steps if step.loss is not None]
    means = [sum(losses[i : i + _AVERAGED]) / _AVERAGED for i in range(len(losses) - _AVERAGED + 1)]
    return bool(means) and means[-1] > max(_DIVERGED * min(means), _FAR_ABOVE_START * start)


_DECODER = msgspec.json.Decoder(LrRange)


def write_lr_range(path: Path, lr_range: LrRange) -> None:
    """Write a test. Raises OSError."""
    atomic_write(path, msgspec.json.encode(lr_range))


def read_lr_range(path: Path) -> LrRange | None:
    """Read a test; None where there is none, or the file is damaged."""
    try:
        return decode_json(read_regular(path), _DECODER)
    except (OSError, ValueError):
        return None


def at_learning_rate(recipe: Recipe, rate: float) -> Recipe:
    """Return the recipe at another learning rate; a rate of embedding and head keeps its ratio to it."""
    training = recipe.training
    embedding_rate = training.embedding_learning_rate / training.learning_rate * rate
    for path, value in (
        ("training.learning_rate", rate),
        ("training.embedding_learning_rate", min(1.0, float(f"{embedding_rate:.3g}"))),
    ):
        recipe = replace_setting(recipe, path, value)
    return recipe


def stored_path(recipe: Recipe) -> Path:
    """Where the newest complete test of a recipe is stored, whether or not there is one."""
    relevant = at_learning_rate(with_absolute_paths(recipe), Recipe().training.learning_rate)
    for path in _IGNORED:
        relevant = replace_setting(relevant, path, get_setting(Recipe(), path))
    stamps = [source_stamps(source) for source in every_source(relevant.data)]
    key = hashlib.sha256(msgspec.json.encode([_FORMAT, relevant, stamps])).hexdigest()[:16]
    return private_dir(paths.cache_dir() / "learning-rates") / f"{key}.json"
