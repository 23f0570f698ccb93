"""One run in several processes with one GPU each, started by ``torchrun`` or ``accelerate launch``.

Each process plans the whole run and computes its share of the micro-batches of every step. The main process
writes events and files, and reads requests for all processes. All processes end when one fails, or when
torchrun ends. Importing this module does not load torch.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from qlora_tui.decoding import read_json
from qlora_tui.errors import EXIT_FAILURE, UsageError
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed
from qlora_tui.runs.process import LAUNCHER_VARIABLE

T = TypeVar("T")
_LAUNCH_ID = "TORCHELASTIC_RUN_ID"
"""Variable set by torchrun, equal in all processes that it starts."""
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Environment variables with which ``accelerate launch`` requests sharding. accelerate would obey them."""
_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5
_LONGEST_WAIT = timedelta(hours=4)
"""Maximum wait for the main process, which alone converts a GGUF file and answers replay prompts.

By default torch ends waiting processes after 10 minutes.
"""
_EXPLAIN_S = 5.0
"""Maximum seconds that a process with an unexpected error waits for another process to report a failure."""


class DistributedContext(Struct, frozen=True):
    """The position of this process among the processes of the run."""

    rank: int = 0
    local_rank: int = 0
    """Index of this process's GPU on the machine."""
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes events and files."""
        return self.rank == 0

    def initialize(self, *, on_cpu: bool) -> None:
        """Connect the processes; does nothing for a single process."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
            from torch import distributed

            # A launcher that spreads one model over the GPUs would leave each process disconnected.
            assert distributed.get_world_size() == self.world_size

    def disband(self) -> DistributedContext:
        """Disconnect the processes, once all have called this; return the context of a single process."""
        if self.world_size > 1:
            from torch import distributed

            self.barrier()
            # The group is freed at exit. If a DDP model freed it, it would hold the GIL while it waits for a
            # thread of the group, which may need the GIL to free a tensor (pytorch issue 56297).
            groups = [distributed.group.WORLD]
            atexit.register(groups.clear)
            distributed.destroy_process_group()
        return DistributedContext()

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def broadcast(self, value: T) -> T:
        """Return the value of the main process, in every process."""
        if self.world_size == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values = [value] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Return the sum of each value over all processes."""
        return tuple(map(sum, zip(*self.all_gather(values), strict=True)))


def distributed_context() -> DistributedContext:
    """Return the context that the launcher's variables describe; without them, that of a single process."""
    environ = os.environ
    return DistributedContext(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
    )


def require_whole_model() -> None:
    """Raise UserError if the launcher would shard the model: each process must hold the whole model."""
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise UsageError(
                f"{name} is not supported",
                what=f"The trainer was started with {variable}, which shards the model over several GPUs.",
                why="NF4 weights are wrong or missing after sharding (bitsandbytes issue "
                "1945, accelerate issue 3983).",
                fix="Start the trainer with torchrun, or queue the run: each GPU then holds the whole model. "
                "A model that does not fit on one GPU needs streamed layers (quantization.streamed_layers).",
            )


def end_with_launcher() -> None:
    """Have the kernel kill this process when torchrun ends, because a killed torchrun cannot do so.

    torchrun starts each process in its own session, which signals to torchrun's process group do not reach.
    """
    if _LAUNCH_ID in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        launcher = os.environ.get(LAUNCHER_VARIABLE)
        if launcher is not None and int(launcher) != os.getppid():
            # torchrun was killed before the call.
            sys.exit(EXIT_FAILURE)


class ProcessFailures:
    """Failures of a run's processes, exchanged as files, because their connection may hang."""

    def __init__(self, run: RunDir, dist: DistributedContext) -> None:
        self._dist = dist
        # Without --standalone, torchrun calls every launch "none".
        self._launch = os.environ.get(_LAUNCH_ID, "none")
        self._folder = run.path / "failures"
        self._ending = threading.Lock()
        """Held by the thread that records how the run ended."""
        if dist.world_size == 1:
            return
        with suppress(OSError):
            private_dir(self._folder)
            if dist.is_main_process:
                for path in self._folder.iterdir():
                    if self._launch == "none" or not path.name.startswith(self._launch):
                        path.unlink(missing_ok=True)

    def watch(self, on_failure: Callable[[Failed], object]) -> None:
        """End this process if another one fails, after calling ``on_failure``."""
        if self._dist.world_size > 1:
            threading.Thread(target=self._watch, args=(on_failure,), name="failures", daemon=True).start()

    def stop(self) -> None:
        """Stop watching, because this process records how the run ended."""
        self._ending.acquire()

    def report(self, failure: Failed) -> Failed:
        """Report how this process failed, which ends the others; return the failure to record for the run.

        An unexpected error may be the consequence of another process's failure. So the other processes get a
        moment to report a failure, which is then returned instead.
        """
        if self._dist.world_size == 1:
            return failure
        deadline = time.monotonic() + (_EXPLAIN_S if failure.kind == "bug" else 0.0)
        while (other := self._first_of_others()) is None and time.monotonic() < deadline:
            time.sleep(_WATCH_S)
        # On a full disk torchrun ends the others, though later.
        with suppress(OSError):
            atomic_write(self._path(self._dist.rank), msgspec.json.encode(failure))
        return other if other is not None and failure.kind == "bug" else failure

    def _watch(self, on_failure: Callable[[Failed], object]) -> None:
        while (failure := self._first_of_others()) is None:
            time.sleep(_WATCH_S)
        if self._ending.acquire(blocking=False):
            on_failure(failure)
            os._exit(EXIT_FAILURE)

    def _first_of_others(self) -> Failed | None:
        """Return the earliest failure of another process; None without one. A bug is returned only if all
        failures are bugs, because a bug may be the consequence of another failure.
        """
        ranks = (rank for rank in range(self._dist.world_size) if rank != self._dist.rank)
        failures = [found for rank in ranks if (found := read_json(self._path(rank), _DECODER)) is not None]
        return min(failures, key=lambda each: (each.kind == "bug", each.at), default=None)

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._launch}-{rank}.json"


_DECODER = msgspec.json.Decoder(Failed)
