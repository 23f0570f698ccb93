"""The order in which the ways that a benchmark compares are measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def in_turn(ways: Iterable[T], repeat: int) -> list[T]:
    """Reversed in every second repeat: what drifts while they are measured affects all of them alike."""
    forward = list(ways)
    return forward if repeat % 2 == 0 else forward[::-1]
