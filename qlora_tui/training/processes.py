"""Several processes for one run, one card each: ``torchrun`` or ``accelerate launch`` started them.

Each lays out the whole run and takes its share of every step's micro-batches; the first one speaks, writes
and hears for all. Importing this loads no torch.
"""

from __future__ import annotations

import os
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")


class Processes(Struct, frozen=True):
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    """Number of its card on this machine."""
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0

    def meet(self, *, on_cpu: bool) -> None:
        """Connect them; nothing where there is one."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    def from_first(self, value: T) -> T:
        """What the first one has, in every one."""
        if self.count == 1:
            return value
        from torch import distributed

        held = [value]
        distributed.broadcast_object_list(held, src=0)
        return held[0]

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values = [value] * self.count
        distributed.all_gather_object(values, value)
        return values

    def summed(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The sums of each value over all processes."""
        return tuple(map(sum, zip(*self.gathered(values), strict=True)))


def processes() -> Processes:
    """As the launcher says in the environment; one where there is no launcher."""
    environ = os.environ
    return Processes(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        count=int(environ.get("WORLD_SIZE", 1)),
    )
