"""What has to be settled before torch is loaded."""

from __future__ import annotations

import os
import warnings

from qlora_tui.gpu.visible import STABLE_ORDER

_ENVIRONMENT = {
    # Threads that wait for each other sleep. Spinning, the default, makes an answer many times slower as soon
    # as something else wants a core, such as a run in training, and takes the core from it.
    "OMP_WAIT_POLICY": "PASSIVE",
} | STABLE_ORDER


def settle_before_torch() -> None:
    """Set what torch and its libraries read from the environment, unless the user has set it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # What libraries plan to rename is of no use to the one who chats.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
