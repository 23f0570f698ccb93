"""Three real steps of a recipe before its launch, in a child process, to measure their time and memory.

The child trains in memory and writes no run, so nothing is left behind however it ends. Anything that it
converts or quantizes goes to the caches that the launch uses too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from msgspec import Struct

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, format_duration
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.devices import Devices, choose, run_on, taken_keys, wanted_devices
from qlora_tui.settings import GPU_VARIABLE
from qlora_tui.worker import Progress, run_job

STEPS = 3
"""Number of timed optimizer steps. They follow one step on the longest batch, which is not timed."""


class StepProbe(Struct, frozen=True, kw_only=True):
    """Result of a probe."""

    steps: int
    seconds: float
    """Time of all timed steps."""
    tokens: int
    """Tokens of all timed steps, without padding."""
    peak_bytes: int
    """Peak memory of the process. On a GPU, as reported by its driver."""

    @property
    def words(self) -> str:
        """The result in words: ``measured in three steps: 1.2 s per step, peak 1.3 GiB``."""
        count = "three steps" if self.steps == STEPS else "one step" if self.steps == 1 else "two steps"
        each = format_duration(self.seconds / self.steps)
        return f"measured in {count}: {each} per step, peak {format_bytes(self.peak_bytes)}"


@changes_box
def probe_steps(
    recipe: Recipe,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepProbe:
    """Train three steps of a recipe, discard them, and return their cost. Takes as long as starting a run.

    The steps are trained in one process, on the first device that a launch would take, even if the recipe
    uses several.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: Other runs use all devices, or the recipe cannot be trained here.
    """
    require_runnable(recipe)
    device = _free_device(recipe)
    return run_job(
        "qlora_tui.training.probe:probe",
        recipe,
        STEPS,
        result=StepProbe,
        title="The steps could not be measured",
        subject="The process that trained three steps",
        fix="Launch the run to see where it fails.",
        on_progress=on_progress,
        should_stop=should_stop,
        environ=os.environ | ({GPU_VARIABLE: device.devices[0].key} if device.is_choice else {}),
    )


def _free_device(recipe: Recipe) -> Devices:
    """Return the first device that a launch would take. Raises UserError if other runs use all devices."""
    wanted = wanted_devices(replace_setting(recipe, "training.gpus", 1), os.environ)
    device = choose(wanted, taken_keys())
    if device is None:
        first = wanted.devices[0]
        raise UserError(
            "Another run is training",
            what=f"{run_on(first.key)} uses {first}.",
            why="The run and the measurement would both be slower, and might run out of memory.",
            fix="Wait until the run has ended, or pause it.",
        )
    return device


def progress_words(progress: Progress) -> str:
    """Return ``training step 1 of 3``, or the activity of a probe before its first step."""
    done = f" step {progress.done} of {progress.total}" if progress.done else ""
    return f"{progress.text}{done}"
