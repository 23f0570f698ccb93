"""Whether this machine can train: every check that needs no recipe. Used by ``doctor`` and the app."""

from __future__ import annotations

import sys

from qlora_tui import paths, subprocesses
from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.drafts import new_draft
from qlora_tui.errors import UserError, disk_problem
from qlora_tui.gpu.visible_devices import CPU
from qlora_tui.installation import PROGRAM, install_command
from qlora_tui.runs.machine_checks import Check, CheckKind, check_disk, check_gpu, read_machine
from qlora_tui.settings import GPU_VARIABLE
from qlora_tui.worker import run_job

_SELFTEST_S = 1800.0
_DISK_BYTES = 5 * 2**30
"""Free space below which a model's download or a few checkpoints fill the disk."""


def check_system() -> list[Check]:
    """Check Python, disks, file locks and GPU, in the order in which they would fail a run."""
    return [_python(), *_disks(), check_locks(), check_gpu(read_machine())]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(CheckKind.PYTHON, "ok", f"{version}, {sys.executable}")


def _disks() -> list[Check]:
    return [
        check_disk(folder, _DISK_BYTES, variable=variable, name=f"disk for {what}")
        for what, folder, variable in (
            ("runs", paths.state_dir(), "XDG_STATE_HOME"),
            ("downloaded models", hub_cache_dir(), "HF_HOME"),
            ("converted models and data", paths.cache_dir(), "XDG_CACHE_HOME"),
        )
    ]


def check_locks() -> Check:
    """Lock and release a file in the state folder: the runner cannot work without locks."""
    try:
        with new_draft(paths.state_dir()):
            pass
    except (UserError, OSError) as error:
        problem = error if isinstance(error, UserError) else disk_problem(error)
        fix = problem.fix if problem else "Point XDG_STATE_HOME at another disk."
        return Check(CheckKind.LOCKS, "error", problem.what if problem else str(error), fix)
    return Check(CheckKind.LOCKS, "ok", f"work in {paths.state_dir()}")


def check_libraries(*, on_cpu: bool = False) -> list[Check]:
    """Import, quantize, train and save a few weights, in a separate process; ``on_cpu``: not on the GPU."""
    try:
        return run_job(
            "qlora_tui.training.selftest:check_training",
            result=list[Check],
            title="The self-test failed",
            subject="The self-test",
            fix=install_command(PROGRAM),
            deadline_s=_SELFTEST_S,
            environ=subprocesses.subprocess_env() | ({GPU_VARIABLE: CPU} if on_cpu else {}),
        )
    except UserError as error:
        return [Check(CheckKind.LIBRARY, "error", f"{error.what} {error.why}".strip(), error.fix)]
