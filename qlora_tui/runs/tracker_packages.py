"""The packages of experiment trackers (``training.report_to``): whether they are installed."""

from __future__ import annotations

from importlib.util import find_spec

from qlora_tui.errors import UserError
from qlora_tui.installation import install_command

TRACKER_NAMES = {
    "tensorboard": "TensorBoard",
    "wandb": "Weights & Biases",
    "trackio": "Trackio",
    "mlflow": "MLflow",
}
"""The name of each choice of ``training.report_to`` but ``none``; the choice is that of its package."""


def missing_tracker(report_to: str) -> UserError | None:
    """Return the error for a tracker whose package is not installed here; None where none is missing."""
    if report_to == "none" or find_spec(report_to) is not None:
        return None
    return UserError(
        f"{TRACKER_NAMES[report_to]} is not installed",
        what=f'Report to (training.report_to) is "{report_to}", and its package is not installed.',
        fix=f'Install it with `{install_command(report_to)}`, or set training.report_to = "none".',
    )
