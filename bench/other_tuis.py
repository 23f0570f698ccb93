"""Programs of the same kind, measured like ours: ``btop``, and ``nvitop`` with a real or simulated GPU.

Each samples once a second, as ours does, and has a help that a key opens.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Help:
    """The key that opens it, words of it, and the key that closes it."""

    key: str
    shows: str
    closes: str


@dataclass(frozen=True)
class Neighbour:
    """How one is started."""

    name: str
    command: tuple[str, ...]
    help: Help
    env: dict[str, str] = field(default_factory=dict)


def installed() -> list[Neighbour]:
    """Those that are here."""
    programs = []
    if shutil.which("btop"):
        command = ("btop", "--utf-force", "--update", "1000")
        programs.append(Neighbour("btop", command, Help("h", "Mouse 1", "\x1b")))
    if shutil.which("nvitop"):
        command = ("nvitop", "--interval", "1")
        programs.append(Neighbour("nvitop", command, Help("h", "show this help screen", "\x1b"), _gpu_env()))
    return programs


def _gpu_env() -> dict[str, str]:
    """Return the environment in which ``nvitop`` has a GPU, simulated where there is none."""
    if Path("/dev/nvidiactl").exists():
        return {}
    from bench.support.nvml_stub import stub_env

    return stub_env("one_gpu")
