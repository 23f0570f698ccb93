"""Several processes for one run, one card each: ``torchrun`` or ``accelerate launch`` started them.

Each lays out the whole run and takes its share of every step's micro-batches; the first one speaks, writes
and hears for all. Importing this loads no torch.
"""

from __future__ import annotations

import os
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")


class DistributedContext(Struct, frozen=True):
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    """Number of its card on this machine."""
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0

    def initialize(self, *, on_cpu: bool) -> None:
        """Connect them; nothing where there is one."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu)

    def barrier(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def broadcast(self, value: T) -> T:
        """What the first one has, in every one."""
        if self.world_size == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values = [value] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The sums of each value over all processes."""
        return tuple(map(sum, zip(*self.all_gather(values), strict=True)))


def distributed_context() -> DistributedContext:
    """As the launcher says in the environment; one where there is no launcher."""
    environ = os.environ
    return DistributedContext(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
    )
