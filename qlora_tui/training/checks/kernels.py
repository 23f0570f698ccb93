"""Installed kernels of a model's layers, such as flash-linear-attention's, and PyTorch in their place."""

from __future__ import annotations

import sys
from inspect import isfunction, unwrap
from typing import Any

from qlora_tui.catalog.optional_kernels import kernel_packages


class InstalledKernels:
    """The functions of a model's modules that call installed kernels.

    For each transformers has a PyTorch function. flash-linear-attention 0.6.0 differs from that by a rounding
    of the dtype (relative norm of outputs and gradients: 5.9e-4 in float16, 4e-7 in float32, run by Triton's
    interpreter).
    """

    def __init__(self, model: Any) -> None:
        """``model``: without its adapter."""
        self._functions: list[tuple[dict[str, Any], str, Any]] = []
        """The names of a module, the function's name there, and the function."""
        if not any(package.is_installed for package in kernel_packages(model.config.model_type)):
            return
        for module in sorted({type(module).__module__ for module in model.modules()}):
            names = vars(sys.modules[module])
            self._functions += [
                (names, name, function)
                for name, function in names.items()
                if isfunction(function) and getattr(unwrap(function), "__module__", "") == module
                if hasattr(function, "__wrapped__")
            ]

    def __len__(self) -> int:
        """Return the number of functions."""
        return len(self._functions)

    def use_ours(self) -> None:
        """Call the installed kernels."""
        for names, name, function in self._functions:
            names[name] = function

    def use_reference(self) -> None:
        """Call PyTorch instead."""
        for names, name, function in self._functions:
            names[name] = function.__wrapped__
