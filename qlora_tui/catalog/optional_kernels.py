"""Finds kernels that transformers uses for a model if their packages are installed, instead of plain PyTorch.

Linear attention, state space and short convolution layers have kernels in packages that neither transformers
nor this program requires. The source of a model's class in the installed transformers, which is not imported,
shows which packages it can use. The checks before a launch, ``doctor`` and the Model screen use this module.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qlora_tui.catalog.library_types import parse_source, text_generators
from qlora_tui.formatting import join_words
from qlora_tui.installation import install_command

_DECORATOR, _LOADER = "use_kernel_func_from_hub_with_fallback", "lazy_load_kernel"
"""Functions of ``transformers.integrations.hub_kernels`` that load kernels.

One is a decorator whose second argument is the package to import (transformers 5.24); the other takes the
name of a package (5.5).
"""
_GUARD = re.compile(r"is_\w+_available")
"""Pattern of the names of functions that guard the import of an optional package (5.5). The ``else`` branch
has the replacement.
"""
_HINT = re.compile(rf"{_DECORATOR}|{_LOADER}|^if {_GUARD.pattern}\(", re.MULTILINE)
_MODEL_TYPE = r"""^\s+model_type\s*(?::[^=]+)?=\s*["']{}["']"""
_KEEP = ("torch", "transformers")
"""Packages whose installed versions must not change when kernels are installed."""


@dataclass(frozen=True)
class KernelPackage:
    """A package with kernels."""

    module: str
    """Name of the module to import: ``fla``."""

    @property
    def distribution(self) -> str:
        """Return the name to install."""
        return _DISTRIBUTIONS.get(self.module, self.module.replace("_", "-"))

    @property
    def is_installed(self) -> bool:
        """Whether this Python can import the package."""
        return find_spec(self.module) is not None


_DISTRIBUTIONS = {"fla": "flash-linear-attention"}
_EXTRAS = {"fla": "[cuda]"}
"""Extras that select a version for the installed torch and Triton (0.6.0 needs 2.7 and 3.3)."""
_COMPILED = frozenset({"causal_conv1d", "mamba_ssm"})
"""Packages that may have to be compiled.

Their setup.py (causal-conv1d 1.7.0, mamba-ssm 2.3.2) downloads a wheel for the installed torch from their
releases on GitHub if there is one, and otherwise compiles. Without nvcc
setup.py fails with a NameError before it looks for a wheel.
"""


@cache
def kernel_packages(model_type: str) -> tuple[KernelPackage, ...]:
    """Return the packages that the class of a ``model_type`` can use; empty for an unknown type."""
    folder = _source_folder(model_type)
    return _of_source(folder) if folder else ()


def missing_kernels(model_type: str) -> tuple[KernelPackage, ...]:
    """Return the packages of :func:`kernel_packages` that are not installed."""
    return tuple(package for package in kernel_packages(model_type) if not package.is_installed)


def types_by_kernel() -> dict[KernelPackage, tuple[str, ...]]:
    """Return all packages with kernels, with the folders of transformers' text models that can use each."""
    found: dict[KernelPackage, list[str]] = {}
    folders = {folder for model_type in text_generators() if (folder := _source_folder(model_type))}
    for folder in sorted(folders):
        for package in _of_source(folder):
            found.setdefault(package, []).append(folder.name)
    return {package: tuple(found[package]) for package in sorted(found, key=lambda each: each.module)}


def describe_missing(packages: tuple[KernelPackage, ...]) -> tuple[str, str]:
    """Return the consequence of missing these packages, and how to install them."""
    names = join_words([package.distribution for package in packages])
    are = "are" if len(packages) > 1 else "is"
    text = f"Some layers run much slower, as plain PyTorch, because {names} {are} not installed."
    if any(package.module == "fla" for package in packages):
        text += (
            " With flash-linear-attention a step of Qwen3.5-9B took 0.70 s instead of 1.22 "
            "(transformers#48718)."
        )
    wheels, compiled = (
        [
            each.distribution + _EXTRAS.get(each.module, "")
            for each in packages
            if (each.module in _COMPILED) is compiles
        ]
        for compiles in (False, True)
    )
    fixes = []
    if wheels:
        fixes.append(f"Install with `{install_command(*wheels, options=(), keep=_KEEP)}`.")
    if compiled:
        command = install_command(*compiled, options=("--no-build-isolation",), keep=_KEEP)
        begin = "Then" if wheels else "Install with"
        if not shutil.which("nvcc"):
            begin = "Install the CUDA toolkit, because the next command needs its nvcc. Then run"
        fixes.append(
            f"{begin} `{command}`, which downloads binaries for this torch, or compiles them with nvcc."
        )
    return text, " ".join(fixes)


@cache
def _models_folder() -> Path | None:
    spec = find_spec("transformers")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / "models").is_dir()), None)


def _source_folder(model_type: str) -> Path | None:
    """Return the folder of the model whose config class has this ``model_type``.

    A part of a model (``qwen3_5_text``) is in the folder of the whole model, whose name is a prefix of the
    part's.
    """
    root, name = _models_folder(), model_type.replace("-", "_")
    if root is None or not re.fullmatch(r"[\w.]+", name):
        return None
    pattern = re.compile(_MODEL_TYPE.format(re.escape(model_type)), re.MULTILINE)
    for end in range(len(name), 0, -1):
        folder = root / name[:end]
        if (end == len(name) or name[end] == "_" or not name[end:].isalnum()) and any(
            pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            for path in folder.glob("configuration_*.py")
        ):
            return folder
    return None


def _of_source(folder: Path) -> tuple[KernelPackage, ...]:
    found: dict[str, None] = {}
    for path in sorted(folder.glob("modeling_*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        if _HINT.search(source):
            found.update(dict.fromkeys(_packages_in(source)))
    return tuple(map(KernelPackage, found))


def _packages_in(source: str) -> Iterator[str]:
    """Yield the modules that a class's source imports only if they are installed."""
    for node in ast.walk(parse_source(source)):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[*_, ast.Constant(value=str(package))]) if name in (
                _DECORATOR,
                _LOADER,
            ):
                yield package.replace("-", "_")
            case ast.If(test=ast.Call(func=ast.Name(id=guard)), body=body, orelse=[_, *_]) if (
                _GUARD.fullmatch(guard)
            ):
                for statement in body:
                    if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                        package = statement.module.partition(".")[0]
                        # A setting of the config enables it, and is off by default: ``use_mambapy``.
                        if package not in ("torch", "transformers") and f"use_{package}" not in source:
                            yield package
