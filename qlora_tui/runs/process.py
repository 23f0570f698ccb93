"""Identifying processes, and starting processes that outlive their parent.

PIDs are reused, and the clock can be set. A process is therefore identified by its PID, the clock tick since
boot at which it started, and the boot.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from msgspec import Struct

from qlora_tui import paths, worker
from qlora_tui.gpu.visible_devices import PCI_BUS_ORDER_ENV, without_choice

INHIBITOR = "systemd-inhibit"
"""Program of systemd that prevents the machine from suspending while another program runs."""
LAUNCHER_VARIABLE = "QLORA_TUI_LAUNCHER"
"""Environment variable with the process id of the torchrun that the runner started."""
_TORCHRUN = "torch.distributed.run"
_KEEP_PROCESSES = "trap '' TERM; export PET_SIGNALS_TO_HANDLE=SIGINT;"
"""Shell commands that prevent a cluster's SIGTERM from ending a process before it has saved.

By default, torchrun kills its processes 30 s after it got the signal, and then fails. These commands
make torchrun ignore the signal. Its processes get the signal too, and save. Versions of torch that do not
know the variable ignore it.
"""
_OF_TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|ROLE_NAME$|MASTER_|TORCHELASTIC_|TORCH_NCCL_|OMP_NUM_THREADS$"
    rf"|{LAUNCHER_VARIABLE}$"
)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Permanent identity of a process, unlike its PID, which is reused."""

    pid: int
    boot_id: str
    """Id of the boot, which changes at every boot of the machine."""
    start_ticks: int = 0
    """Clock ticks between boot and the start of the process."""
    host: str = ""
    """Name of the machine or container."""

    @property
    def is_from_this_boot(self) -> bool:
        """Whether the process belongs to the current boot of this kernel."""
        return self.boot_id == boot_id()

    @property
    def is_from_this_host(self) -> bool:
        """Whether the process ran on this machine or container, possibly before a reboot."""
        return self.host in ("", os.uname().nodename)

    def is_alive(self) -> bool:
        """Return whether exactly this process is running; a zombie is not."""
        return self.state not in ("", "Z", "X")

    @property
    def state(self) -> str:
        """Return the kernel's state letter (``R``, ``S``, ``D``, ``T``, ``Z``…); empty if it has ended."""
        if not self.is_from_this_boot:
            return ""
        state, start_ticks = _look_up(self.pid)
        return state if start_ticks == self.start_ticks else ""

    @contextmanager
    def opened(self) -> Iterator[int | None]:
        """Open a handle to exactly this process; yield None if it is not running or cannot be reached."""
        with ExitStack() as stack:
            handle = None
            with suppress(OSError, OverflowError):
                handle = os.pidfd_open(self.pid)
                stack.callback(os.close, handle)
            # The handle refers to the process that had the PID when it was opened, so check the identity
            # afterwards.
            yield handle if handle is not None and self.is_alive() else None

    def wait(self, timeout_s: float) -> None:
        """Wait until the process ends, but at most ``timeout_s`` seconds.

        If it is not running or cannot be reached, wait for the whole time.
        """
        with self.opened() as handle:
            if handle is None:
                time.sleep(timeout_s)
                return
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            ended.poll(timeout_s * 1000)


def process_identity(pid: int | None = None) -> ProcessIdentity:
    """Identify a running process, by default this one. Raises ProcessLookupError if it does not exist."""
    pid = os.getpid() if pid is None else pid
    state, start_ticks = _look_up(pid)
    if not state:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessIdentity(pid=pid, boot_id=boot_id(), start_ticks=start_ticks, host=os.uname().nodename)


def boot_id() -> str:
    """Return the kernel's identifier of this boot; empty if unavailable."""
    # Tests use this variable to simulate a reboot; nothing else sets it.
    if simulated := os.environ.get("QLORA_TUI_BOOT_ID"):
        return simulated
    return _real_boot_id()


@cache
def _real_boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _look_up(pid: int) -> tuple[str, int]:
    """Return the state and the start tick of the process that currently has this PID. If there is no such
    process, the state is empty.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # The second field is the command in parentheses, which may contain any characters.
        fields = stat[stat.rindex(b")") + 2 :].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0


def runner_lock_path() -> Path:
    """Return the path of the file that the runner locks."""
    return paths.state_dir() / "runner.lock"


def runner_log_path() -> Path:
    """Return the path of the file with the runners' stdout and stderr."""
    return paths.state_dir() / "runner.log"


def ensure_runner() -> None:
    """Start a runner that outlives this process and its terminal. Harmless if one is active."""
    with runner_log_path().open("ab") as log:
        spawn_detached("qlora_tui.runs.runner", output=log)


def trainer_command(run: Path, processes: int, *arguments: str) -> tuple[str, ...]:
    """Return module and arguments that train a run: the trainer, or torchrun for several processes."""
    trainer = ("qlora_tui.training", str(run), *arguments)
    return trainer if processes == 1 else torchrun_command(processes, *trainer)


def torchrun_command(processes: int, *module: str) -> tuple[str, ...]:
    """Return module and arguments that run ``module`` with its arguments in several processes."""
    return (_TORCHRUN, "--standalone", "--nproc-per-node", str(processes), "-m", *module)


def threads_variable(processes: int) -> dict[str, str]:
    """Return the variable that divides the CPU cores among processes. torchrun's default is one core each."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}


def spawn_detached(
    module: str,
    *arguments: str,
    output: IO[bytes] | None,
    environ: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
    through: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a module in its own session, so that signals to this process group do not reach it.

    Args:
        module: The Python module to run.
        arguments: Its arguments.
        output: Receives its output; None lets it write to this process's output.
        environ: Additional environment variables.
        inherited: Descriptors that the new process keeps open.
        through: A command that starts the process, such as srun.
    """
    argv = worker.module_argv(module, *arguments)
    if module == _TORCHRUN:
        # The program replaces the shell and keeps its process id.
        prepare = f"export {LAUNCHER_VARIABLE}=$$; {_KEEP_PROCESSES if through else ''}"
        argv = ["/bin/sh", "-c", f'{prepare} exec "$@"', "sh", *argv]
    return subprocess.Popen(
        [*through, *argv],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
        env=detached_environ() | dict(environ or {}),
        pass_fds=inherited,
    )


def detached_environ() -> dict[str, str]:
    """Return the environment of a process that outlives this one, without the GPU chosen for this process.

    torchrun's variables are removed too. If this process is one of several trainer processes, it has these
    variables, and a process that inherited them would wait for the other trainer processes.
    """
    environ = without_choice(worker.subprocess_env())
    if "TORCHELASTIC_RUN_ID" in environ:
        environ = {name: value for name, value in environ.items() if not _OF_TORCHRUN.match(name)}
    return environ | PCI_BUS_ORDER_ENV
