"""The orders that the list of runs can be in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_tui.runs.run_summary import RunSummary
from qlora_tui.runs.status import ACTIVE


@dataclass(frozen=True)
class Order:
    """An order, and how the title of the list says it."""

    label: str
    key: Callable[[RunSummary], Any] | None
    """None keeps the order of the listing."""


def _best_loss(summary: RunSummary) -> float:
    loss = summary.loss if summary.best is None else summary.best[0]
    return math.inf if loss is None or math.isnan(loss) else loss


ORDERS = (
    Order("newest first", None),
    Order("lowest loss first", _best_loss),
    Order("by name", lambda summary: summary.name.casefold()),
    Order("by model and settings", lambda summary: (summary.model.casefold(), summary.settings)),
    Order("longest training first", lambda summary: -(summary.seconds or 0.0)),
)


def in_order(summaries: Sequence[RunSummary], waiting: Collection[str], order: Order) -> list[RunSummary]:
    """Sort the runs that ended; the active one and the queue stay above them."""
    if order.key is None:
        return list(summaries)
    first = [row for row in summaries if row.status.state in ACTIVE or row.id in waiting]
    ended = [row for row in summaries if row not in first]
    return first + sorted(ended, key=order.key)
