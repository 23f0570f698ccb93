"""Architectures that a process has read from transformers' own classes, stored on disk.

Describing a config takes seconds, mostly for imports. The result depends only on the config and the versions
of transformers and of this program. Descriptions, including refusals, are stored in the cache folder; a
damaged file is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from msgspec import Struct

from qlora_tui import __version__
from qlora_tui.answer_cache import AnswerCache
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.errors import UserError
from qlora_tui.worker import Failure, run_job

JOB = "qlora_tui.training.description:describe_all"
DEADLINE_S = 90.0
"""Seconds after which a process that describes configs is ended. One config usually takes 4."""
_FORMAT = 5
MAX_FILES = 400
"""Maximum number of descriptions that are stored, of about 20 to 200 KB each."""


class Description(Struct, frozen=True, omit_defaults=True):
    """The result of describing a config with transformers' class: an architecture or a refusal."""

    architecture: Architecture | None = None
    refusal: Failure | None = None
    missing: tuple[str, ...] = ()
    """Packages whose absence is the reason for the refusal."""

    def result(self) -> Architecture:
        """Return the architecture, or raise the refusal."""
        if self.architecture is not None:
            return self.architecture
        assert self.refusal is not None
        raise self.refusal.error()


_CACHE = AnswerCache("descriptions", Description, max_bytes=64 << 20)


def stored(config: Mapping[str, Any]) -> Description | None:
    """Return the stored description of a config; None if there is none, or if it is out of date.

    It is out of date if a package whose absence was the reason for a refusal is installed now.
    """
    found = _CACHE.find(_key(config))
    if found is None or not (found.architecture or found.refusal) or any(map(_is_installed, found.missing)):
        return None
    return found


def describe(config: Mapping[str, Any], should_stop: Callable[[], bool] = lambda: False) -> Architecture:
    """Return the exact architecture of a config, from the cache or from a process that takes seconds.

    Raises JobStopped, and UserError if the installed transformers cannot build a language model of the
    config.
    """
    description = stored(config) or _describe([config], should_stop)[0]
    return description.result()


def describe_all(
    configs: Iterable[Mapping[str, Any]], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Describe all configs that are not in the cache.

    One process describes them all. If it fails, each config is described in a process of its own. Raises
    JobStopped.
    """
    missing = [config for config in configs if stored(config) is None]
    try:
        if missing:
            _describe(missing, should_stop)
    except UserError:
        for config in missing if missing[1:] else ():
            with suppress(UserError):
                _describe([config], should_stop)


def _describe(configs: list[Mapping[str, Any]], should_stop: Callable[[], bool]) -> list[Description]:
    descriptions = run_job(
        JOB,
        configs,
        result=list[Description],
        title="The model's structure could not be read",
        subject="The process that builds the model without weights",
        fix="Compare its config.json with the one published with the model, or choose another model.",
        deadline_s=DEADLINE_S,
        should_stop=should_stop,
    )
    for config, description in zip(configs, descriptions, strict=True):
        keep(config, description)
    return descriptions


def keep(config: Mapping[str, Any], description: Description) -> None:
    """Store the description of a config."""
    _CACHE.keep(_key(config), description, MAX_FILES)


def _key(config: Mapping[str, Any]) -> bytes:
    versions = (_FORMAT, __version__, library_version())
    return json.dumps([versions, config], sort_keys=True, default=str).encode()


@lru_cache(maxsize=1)
def library_version() -> str:
    """Return the version of transformers; empty if it is not installed."""
    return version("transformers") if _is_installed("transformers") else ""


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
