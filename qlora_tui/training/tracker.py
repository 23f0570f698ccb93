"""Sends a run's events to an experiment tracker, through transformers' integration of the tracker.

The tracker receives the numbers of each step and evaluation, and the recipe's settings except its note and
its sample prompts. Of a path, it receives only the last part. If the tracker fails, for example without a
network, the run reports this once and continues without it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from qlora_tui import paths
from qlora_tui.errors import first_line
from qlora_tui.recipe.fields import fields, format_value, get_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Evaluated, Step
from qlora_tui.runs.preflight import TRACKER_NAMES, missing_tracker

PROJECT = "qlora-tui"
"""Project or experiment of the runs, unless the tracker's own environment variable specifies another."""
_MLFLOW_ID = "mlflow_run_id"
"""File in a run's folder with the id that MLflow assigned to the run, so that a resume continues it."""
_SECRET_LENGTH = 8
"""Minimum length of a value that is treated as a secret. A shorter value may be an ordinary word."""
_URL_PASSWORD = re.compile(r"//[^/@\s]+@")
_LONGEST_TEXT = 300
_UNTRACKED = frozenset(("note", "training.report_to", "training.sample_prompts"))


class TrackedSettings:
    """Replaces ``TrainingArguments`` for an integration: the recipe's settings, and the run's name."""

    project = PROJECT
    hub_private_repo = None
    trackio_space_id = None
    trackio_bucket_id = None
    trackio_static_space_id = False
    """Prevents Trackio from publishing anything."""

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        self.run_name = run.id
        self.output_dir = str(run.path)
        self._settings = tracked_settings(recipe)

    def to_dict(self) -> dict[str, Any]:
        """Return each setting, keyed by its path such as ``lora.rank``."""
        return dict(self._settings)

    def to_json_string(self) -> str:
        """Return one line for each setting, which TensorBoard shows as text."""
        return "\n".join(f"    {key} = {value}" for key, value in self._settings.items())


def tracked_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a tracker may see. A path is reduced to its last part, the name."""
    settings = {}
    for path in fields().keys() - _UNTRACKED:
        value = get_setting(recipe, path)
        if path == "data.sources":
            value = tuple(PurePath(source.path).name for source in value)
        elif isinstance(value, str):
            value = PurePath(value).name if value.startswith(("/", "~", ".")) else value
        settings[path] = value if isinstance(value, int | float | str) else format_value(value)
    return dict(sorted(settings.items()))


class RunTracker:
    """Reports one run to its tracker.

    Args:
        on_failure: called once, with the first exception that the tracker raised.
    """

    def __init__(self, run: RunDir, recipe: Recipe, on_failure: Callable[[Exception], None]) -> None:
        self._settings = TrackedSettings(run, recipe)
        self._run = run
        self._name = recipe.training.report_to
        self._on_failure = on_failure
        self._state = TrainerState()
        self._integration: TrainerCallback | None = None

    def start(self) -> None:
        """Open the run in the tracker. Raises UserError if its package is not installed."""
        if missing := missing_tracker(self._name):
            raise missing
        self._attempt(self._open)

    def observe(self, event: AnyEvent) -> None:
        """Send the numbers of a step or an evaluation; any other event is ignored."""
        numbers = tracked_numbers(event)
        if numbers and isinstance(event, Step | Evaluated):
            self._state.global_step = event.step
            self._call("on_log", logs=numbers)

    def close(self) -> None:
        """Flush and close the tracker."""
        self._call("on_train_end")
        self._integration = None

    def _open(self) -> None:
        _set_defaults(self._name, self._run)
        integration = _INTEGRATIONS[self._name]()
        if self._name == "tensorboard" and integration.logging_dir is None:
            integration.logging_dir = str(self._run.path / "tensorboard")
        self._integration = integration
        integration.on_train_begin(self._settings, self._state, TrainerControl())
        if self._name == "mlflow":
            import mlflow

            (self._run.path / _MLFLOW_ID).write_text(mlflow.active_run().info.run_id)

    def _call(self, method: str, **values: Any) -> None:
        integration = self._integration
        if integration is not None:
            call = getattr(integration, method)
            self._attempt(lambda: call(self._settings, self._state, TrainerControl(), **values))

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # the library, the disk or the network may fail, and none may end a run
            self._integration = None
            self._on_failure(error)


_INTEGRATIONS: dict[str, Callable[[], Any]] = {
    "tensorboard": integration_utils.TensorBoardCallback,
    "wandb": integration_utils.WandbCallback,
    "trackio": integration_utils.TrackioCallback,
    "mlflow": integration_utils.MLflowCallback,
}


def tracked_numbers(event: AnyEvent) -> dict[str, float]:
    """Return the numbers of an event for a tracker, under transformers' names; empty for most events."""
    match event:
        case Step():
            numbers = {
                "loss": event.loss,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "epoch": event.epoch,
                "tokens": event.tokens,
                "tokens_per_second": event.tokens_per_s,
                # These are TRL's names.
                "rewards/accuracies": event.reward_accuracy,
                "rewards/margins": event.reward_margin,
            }
        case Evaluated():
            numbers = {
                "eval_loss": event.loss,
                "eval_accuracy": event.accuracy,
                "eval_forgetting": event.forgetting,
                "eval_rewards/accuracies": event.reward_accuracy,
                "eval_rewards/margins": event.reward_margin,
            }
        case _:
            return {}
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _set_defaults(name: str, run: RunDir) -> None:
    """Set the environment variables that configure the tracker for this run, unless the user has set them."""
    defaults: dict[str, str] = {}
    match name:
        case "wandb":
            defaults = {
                "WANDB_PROJECT": PROJECT,
                "WANDB_DIR": str(run.path),
                # A resume continues the same run.
                "WANDB_RUN_ID": run.id,
                "WANDB_RESUME": "allow",
                # The tracker may read neither the trainer's output nor the contents of its folder.
                "WANDB_CONSOLE": "off",
                "WANDB_SILENT": "true",
                "WANDB_DISABLE_CODE": "true",
                "WANDB_DISABLE_GIT": "true",
                "WANDB_X_DISABLE_META": "true",
            }
        case "mlflow":
            defaults = {
                "MLFLOW_TRACKING_URI": f"sqlite:///{paths.state_dir() / 'mlflow.db'}",
                "MLFLOW_EXPERIMENT_NAME": PROJECT,
                # A server that does not answer delays the start of a run by seconds instead of minutes.
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            }
            if (run.path / _MLFLOW_ID).is_file():
                defaults["MLFLOW_RUN_ID"] = (run.path / _MLFLOW_ID).read_text().strip()
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)


def describe_failure(report_to: str, error: Exception) -> tuple[str, str]:
    """Return (evidence, remedy) for a tracker that failed, without the values of secret variables."""
    text = first_line(error)
    text = _URL_PASSWORD.sub("//…@", text)
    for variable, value in os.environ.items():
        if len(value) >= _SECRET_LENGTH and variable.endswith(("_KEY", "_TOKEN", "_PASSWORD", "_SECRET")):
            text = text.replace(value, "…")
    return (
        f"{TRACKER_NAMES[report_to]} failed: {text[:_LONGEST_TEXT].rstrip('.')}. The run continues.",
        "The numbers sent to the tracker are also in the run's events: see the Runs screen, or run "
        "`qlora-tui runs save`.",
    )
