"""Versions of Python and the libraries that a run uses."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("qlora-tui", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python, of the libraries that determine what a run computes, and of torch's CUDA."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    return installed
