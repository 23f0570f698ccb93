"""One run in several processes with one GPU each, started by ``torchrun`` or ``accelerate launch``.

Each process plans the whole run and computes its share of the micro-batches of every step. The main process
writes events and files and reads requests for all. Importing this loads no torch.
"""

from __future__ import annotations

import os
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")


class DistributedContext(Struct, frozen=True):
    """The position of this process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    """Index of its GPU on this machine."""
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes events and files."""
        return self.rank == 0

    def initialize(self, *, on_cpu: bool) -> None:
        """Connect the processes; does nothing for a single one."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu)

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def broadcast(self, value: T) -> T:
        """The value of the main process, in every process."""
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
    """Read the launcher's environment variables; a single process without a launcher."""
    environ = os.environ
    return DistributedContext(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
    )
