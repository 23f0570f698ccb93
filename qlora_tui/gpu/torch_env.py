"""What has to be settled before torch is loaded, in whichever process loads it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import psutil

from qlora_tui import paths
from qlora_tui.gpu.visible_devices import PCI_BUS_ORDER_ENV

_CPU_SAMPLE_S = 0.3
_IDLE_MAX_CORES = 0.5
"""Up to so much of one core at work in all, the machine counts as quiet."""
ONEDNN_CACHE_CAPACITY = 128
"""Shapes for which oneDNN, which multiplies bfloat16 on a CPU, keeps what it made: else 1,024, 0.3 MB each. A
step has some 70."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""What loads a model asks nothing of the network: model and data are on this machine by then."""
offline_variables_set: set[str] = set()
"""Those of them that this process set and the user had not."""
_USER_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def configure_torch_env(extra: Mapping[str, str] = {}) -> None:
    """Set what torch and its libraries read from the environment; what the user has set stays.

    Libraries of Hugging Face are offline from here on.
    """
    kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_CACHE_CAPACITY)}
    for name, value in {**openmp_wait_policy(os.environ), **PCI_BUS_ORDER_ENV, **kernels, **extra}.items():
        os.environ.setdefault(name, value)
    for name, value in OFFLINE.items():
        if name not in os.environ:
            os.environ[name] = value
            offline_variables_set.add(name)
    # What libraries plan to rename is of no use to those who train or chat.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _log_bitsandbytes_warnings()


def _log_bitsandbytes_warnings() -> None:
    """On import it warns that a kernel of the hub is missing, which it does without: that goes to the log.

    Doctor says so in a sentence.
    """
    # Here, since light verbs import this module for what it knows of kernels.
    import logging

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.propagate = False
    if not logger.handlers:
        handler = logging.FileHandler(paths.log_path(), delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def openmp_wait_policy(environ: Mapping[str, str]) -> dict[str, str]:
    """How OpenMP's threads wait for each other, by a look of 0.3 s at how busy the machine is.

    They sleep on a busy one: spinning would make a step many times slower as soon as something else wants a
    core, and takes the core from it. On a quiet one they spin for a moment first: two cores then train at 160
    to 175 tokens/s in place of 94 to 110, and at 30 in place of 88 once the machine is busy after all.
    Nothing where the user has chosen, or lets one thread work alone.
    """
    if environ.get("OMP_NUM_THREADS") == "1" or any(name in environ for name in _USER_WAIT_VARIABLES):
        return {}
    busy_cores = psutil.cpu_percent(_CPU_SAMPLE_S) / 100 * (psutil.cpu_count() or 1)
    return {"GOMP_SPINCOUNT": "20000"} if busy_cores <= _IDLE_MAX_CORES else {"OMP_WAIT_POLICY": "PASSIVE"}
