"""Whether tests that walk over models take all of them, or those of unlike structure."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")

EVERY_MODEL = "EVERY_MODEL" in os.environ
"""Set by ``make check-every-model``. Models that are left out otherwise have no rule of their own."""
walks_over_models = pytest.mark.every_model
"""Marks the tests that ``make check-every-model`` runs."""


def taken(every: Iterable[T], unlike: Collection[T]) -> list[T]:
    """Return ``every`` model for ``make check-every-model``, otherwise those that are ``unlike``."""
    models = list(every)
    assert set(unlike) <= set(models), set(unlike) - set(models)
    return [model for model in models if EVERY_MODEL or model in unlike]
