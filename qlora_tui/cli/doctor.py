"""``doctor``: test what a run needs, really, and name the command that mends what fails."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qlora_tui import paths, subprocesses
from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.errors import EXIT_FAILURE, UserError, disk_problem
from qlora_tui.formatting import format_bytes
from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.runs.locks import locked

_DISK_BYTES = 5 * 2**30
"""Below this a model's download or a few checkpoints fill the disk."""


@dataclass(frozen=True)
class DoctorCheck:
    """One thing a run needs."""

    name: str
    state: Literal["ok", "note", "fails"]
    found: str
    fix: str = ""


def run(args: argparse.Namespace) -> CommandResult:
    """Every check, in the order a run would meet them."""
    checks = [_python(), *_disks(), _locks(), _gpu(), *_libraries()]
    failed = any(check.state == "fails" for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5}  {check.name}: {check.found}")
        if check.fix:
            lines.append(f"       ▸ {check.fix}")
    lines.append("Not ready to train: fix what fails above." if failed else "Ready to train.")
    return CommandResult(
        data={"ok": not failed, "checks": [asdict(check) for check in checks]},
        text="\n".join(lines),
        exit_code=EXIT_FAILURE if failed else 0,
    )


def _python() -> DoctorCheck:
    version = ".".join(map(str, sys.version_info[:3]))
    return DoctorCheck("Python", "ok", f"{version}, {sys.executable}")


def _disks() -> list[DoctorCheck]:
    return [
        _disk("disk for runs", paths.state_dir(), "XDG_STATE_HOME"),
        _disk("disk for downloaded models", hub_cache_dir(), "HF_HOME"),
        _disk("disk for converted models and data", paths.cache_dir(), "XDG_CACHE_HOME"),
    ]


def _disk(name: str, folder: Path, variable: str) -> DoctorCheck:
    """What is free for a folder that may not be there yet."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    enough = free >= _DISK_BYTES
    fix = "" if enough else f"Free some space, or point {variable} at another disk."
    return DoctorCheck(name, "ok" if enough else "fails", f"{format_bytes(free)} free in {folder}", fix)


def _locks() -> DoctorCheck:
    """Lock and release a file where runs are: without locks no runner works."""
    try:
        path = paths.state_dir() / "lock-test"
        with locked(path):
            path.unlink()
    except (UserError, OSError) as error:
        problem = error if isinstance(error, UserError) else disk_problem(error)
        fix = problem.fix if problem else "Point XDG_STATE_HOME at another disk."
        return DoctorCheck("file locks", "fails", problem.what if problem else str(error), fix)
    return DoctorCheck("file locks", "ok", f"work in {paths.state_dir()}")


def _gpu() -> DoctorCheck:
    try:
        gpu = default_cuda_device()
    except GpuUnavailableError as problem:
        return DoctorCheck("card", "note", f"{problem.what} Runs go to the CPU.", problem.fix)
    return DoctorCheck(
        "card", "ok", f"{gpu.name}, {format_bytes(gpu.total_bytes)}, driver {gpu.driver or 'NA'}"
    )


def _libraries() -> list[DoctorCheck]:
    """Import, quantize, train and save a few weights, in a process of their own."""
    done = subprocess.run(
        subprocesses.module_argv("qlora_tui.training.selftest"),
        env=subprocesses.subprocess_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return [DoctorCheck(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return [
            DoctorCheck(
                "libraries",
                "fails",
                f"The self-test ended with code {done.returncode}: {last}",
                f"{sys.executable} -m pip install --upgrade qlora-tui",
            )
        ]


SUBCOMMANDS = {"doctor": Subcommand(run)}
