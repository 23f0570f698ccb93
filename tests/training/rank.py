"""Several processes of a run, simulated by threads."""

from __future__ import annotations

from typing import Any

from qlora_tui.training.distributed import DistributedContext


class Rank(DistributedContext, frozen=True, kw_only=True):
    """One of two processes, simulated by threads that wait for each other where processes would."""

    barrier: Any
    values: list[Any]

    def all_gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(timeout=60)
        gathered = list(self.values)
        self.barrier.wait(timeout=60)
        return gathered
