"""``requirements-dev.lock`` has every dependency but torch, within the declared range, with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
GPU_BUILDS = ("torch", "triton", "nvidia-", "cuda-")
"""A pinned torch would replace the build that fits the machine, with gigabytes of CUDA libraries."""


def locked() -> dict[str, list[tuple[Version, int]]]:
    """For each package its versions, one for each range of Pythons, and how many hashes each has."""
    packages: dict[str, list[tuple[Version, int]]] = {}
    text = (ROOT / "requirements-dev.lock").read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        requirement = Requirement(entry.partition("\\")[0].strip())
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        version = (Version(specifier.version), len(SHA256.findall(entry)))
        packages.setdefault(canonicalize_name(requirement.name), []).append(version)
    return packages


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]))


def test_every_dependency_is_locked_within_its_range() -> None:
    packages = locked()
    for requirement in declared():
        if requirement.name != "torch":
            versions = packages[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version, _ in versions), requirement


def test_every_locked_version_has_hashes() -> None:
    assert [name for name, versions in locked().items() if not all(count for _, count in versions)] == []


def test_no_build_of_torch_is_locked() -> None:
    names = [name for name in locked() if name.startswith(GPU_BUILDS)]
    assert names == ["nvidia-ml-py"]


def test_the_lock_names_no_package_index() -> None:
    assert "://" not in (ROOT / "requirements-dev.lock").read_text()
