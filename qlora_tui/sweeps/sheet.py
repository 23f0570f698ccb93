"""A sweep's definition in TOML: a recipe with a table ``[sweep]``.

    [sweep]
    method = "random"
    trials = 8
    rounds = 3

    [sweep.vary]
    "training.learning_rate" = { low = 1e-4, high = 4e-3, log = true }
    "lora.rank" = [8, 16, 32]

Everything else in the file is the recipe that the trials start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct

from qlora_tui.errors import UsageError
from qlora_tui.formatting import short_model_name
from qlora_tui.recipe import aliases, toml
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.layering import build_recipe, with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.sweeps.space import Space, check_space, grid_points, grid_size

HALVING = 2
"""Factor by which each round reduces the number of trials: one in every ``HALVING`` trials continues."""
AUTO_ROUNDS = 3
"""Default number of rounds of a sweep with a deadline, if its learning-rate schedule allows them."""
_SAFE = ("wsd", "constant")


class Sweep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[sweep]``."""

    name: Annotated[str, Meta(max_length=60)] = ""
    method: Literal["random", "grid", "tpe"] = "random"
    """How points are chosen. ``grid``: every combination. ``tpe``: by Optuna, from the results so far."""
    trials: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Number of trials; 0 for the whole grid, or for as many as fit before the deadline."""
    rounds: Annotated[int, Meta(ge=0, le=8)] = 0
    """Number of rounds of successive halving. 1: every trial completes all its steps. 0: planned for the
    deadline if there is one; otherwise 1.
    """
    seeds: Annotated[int, Meta(ge=1, le=16)] = 3
    """Number of seeds for the unchanged recipe and the winner; with 1, the noise is not measured."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """Random seed of the points."""
    vary: Space = {}
    """Values or a range of each varied field."""


class Sheet(Struct, frozen=True, kw_only=True):
    """A sweep and its recipe."""

    recipe: Recipe
    sweep: Sweep

    @property
    def name(self) -> str:
        """Name of the sweep; if empty, of its recipe; if that is empty, of its model."""
        return self.sweep.name or self.recipe.name or short_model_name(self.recipe.model.id)

    @classmethod
    def load(cls, path: Path) -> Sheet:
        """Read a sheet with a complete recipe. Raises UserError."""
        sweep, layer = read_sheet(path)
        return cls(recipe=toml.to_recipe(layer, str(path)), sweep=sweep)

    def dump(self) -> str:
        """Return the sheet as TOML, with every setting of the recipe."""
        return tomli_w.dumps({"sweep": msgspec.to_builtins(self.sweep), **toml.to_layer(self.recipe)})

    @property
    def is_safe_to_halve(self) -> bool:
        """Whether the learning-rate schedule allows halving in ``AUTO_ROUNDS`` rounds.

        The warmup must end within the first round, and a decay must not begin before the last.
        """
        return not self._unsafe_schedule(AUTO_ROUNDS)

    def check(self, *, has_time: bool) -> None:
        """Raise UserError, exit code 2, if the sweep is invalid.

        ``has_time``: whether the sweep has a deadline, so that it needs no number of trials.
        """
        sweep, training = self.sweep, self.recipe.training
        require_runnable(self.recipe)
        check_space(sweep.vary, self.recipe)
        if sweep.method == "grid":
            next(grid_points(sweep.vary))
        if not (self.recipe.data.validation_path or self.recipe.data.validation_fraction):
            raise UsageError(
                "No validation data",
                what="A sweep compares validation losses, and the recipe has no validation data.",
                fix="Set data.validation_fraction above 0, or set data.validation_path.",
            )
        if training.early_stopping:
            raise UsageError(
                "Early stopping in a sweep",
                what=f"training.early_stopping is {training.early_stopping}.",
                why="Early stopping would end some trials after fewer tokens than others.",
                fix="Set training.early_stopping = 0: halving (--rounds) ends the worse trials.",
            )
        if sweep.method != "grid" and not (sweep.trials or has_time):
            raise UsageError(
                "How many trials?",
                what="The sweep has neither a number of trials nor a deadline.",
                fix="Give a number or a deadline: --trials 8, --for 3h or --until 07:00.",
            )
        if sweep.rounds > 1 and (why := self._unsafe_schedule(sweep.rounds)):
            raise UsageError(
                "This schedule does not allow halving",
                what=why,
                why="Trials are compared in the middle of their runs, before such a schedule has lowered the "
                "learning rate: the comparison would favor trials with a low rate.",
                fix="Set training.lr_scheduler to wsd or constant (--set training.lr_scheduler=wsd), or "
                "train all steps of every trial (--rounds 1).",
            )

    def _unsafe_schedule(self, rounds: int) -> str:
        """Return why a schedule is not safe for halving, in a sentence; empty if all schedules are safe."""
        schedules = self.sweep.vary.get("training.lr_scheduler")
        names: Sequence[str] = (
            schedules if isinstance(schedules, list) else [self.recipe.training.lr_scheduler]
        )
        for name in names:
            if name not in _SAFE:
                return f'training.lr_scheduler "{name}" lowers the learning rate in every round.'
        last_round = 1 / HALVING
        if "wsd" in names and self._highest("lr_decay_share") > 1 - last_round:
            return f"training.lr_decay_share begins the decay before the last round ({last_round:.0%})."
        if self._highest("warmup_ratio") > HALVING ** (1 - rounds):
            return f"training.warmup_ratio is longer than the first of {rounds} rounds."
        return ""

    def _highest(self, key: str) -> float:
        """Return the highest value that a field of ``[training]`` takes in the sweep."""
        values = self.sweep.vary.get(f"training.{key}")
        if values is None:
            return float(getattr(self.recipe.training, key))
        return float(max(values) if isinstance(values, list) else values.high)

    def number_of_trials(self) -> int:
        """Return the requested number of trials; 0 if the deadline determines the number."""
        if self.sweep.method == "grid":
            size = grid_size(self.sweep.vary)
            return min(size, self.sweep.trials or size)
        return self.sweep.trials


def read_sheet(path: Path) -> tuple[Sweep, dict[str, Any]]:
    """Return the table ``[sweep]`` of a file (defaults if it has none) and its recipe. Raises UserError."""
    text = toml.read_text(path)
    layer = toml.parse(text, str(path))
    table = layer.pop("sweep", {})
    toml.validate(layer, str(path), text)
    try:
        return msgspec.convert(table, Sweep, strict=True), aliases.canonical(layer)
    except msgspec.ValidationError as error:
        raise UsageError(
            "Invalid sweep",
            what=f"{path}, [sweep]: {error}.",
            fix="docs/sweeps.md describes the table [sweep].",
        ) from None


def build_sheet(
    *,
    file: Path | None,
    preset: str | None,
    sets: Sequence[str],
    model: str | None,
    data: Sequence[str],
    settings: Mapping[str, Any],
    vary: Space,
) -> Sheet:
    """Build a sweep from an optional file and from command options, which override the file.

    ``settings`` are fields of :class:`Sweep` that the command sets. Raises UserError.
    """
    sweep, layer = read_sheet(file) if file is not None else (Sweep(), {})
    recipe = build_recipe(preset=preset, layer=layer, sets=sets, model=model, data=data)
    sweep = msgspec.structs.replace(sweep, **settings, vary={**sweep.vary, **vary})
    try:
        sweep = msgspec.convert(msgspec.to_builtins(sweep), Sweep, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(
            "Invalid sweep", what=f"{error}.", fix="`qlora-tui sweep start --help` lists the bounds."
        ) from None
    return Sheet(recipe=with_absolute_paths(recipe), sweep=sweep)
