"""A Slurm cluster of one node in a folder: Debian's programs, unpacked and not installed, with two fake GPUs.

Needs root, and the packages that ``make real-cluster`` downloads (5 MB).
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_tui.locks import locked
from tests.support.polling import wait_for

_DAEMONS = ("slurmctld", "slurmd", "slurmstepd")
_SOCKETS = (Path("/run/slurm"), Path("/run/slurmctld"))
"""Folders of the daemons' sockets, by which commands find the key: one cluster on a machine at a time."""
_LOCK = Path("/run/qlora-tui-test-slurm.lock")
_PORTS = range(17_800, 17_900, 2)
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/slurm
CredType=cred/slurm
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PluginDir={libraries}/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=1-00:00:00 GraceTime=60
PartitionName=urgent Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """A running cluster: its commands are on the PATH of this process and its children."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "slurm.conf"

    def start(self) -> None:
        """Start the controller and the node, and wait until jobs can start."""
        subprocess.run([self._folder / "bin" / "slurmctld", "-f", self._config], check=True, timeout=60)
        self.start_node()
        wait_for(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"), seconds=120)

    def start_node(self) -> None:
        """Start slurmd."""
        programs = self._folder / "bin"
        subprocess.run(
            [programs / "slurmd", "-f", self._config, "-d", programs / "slurmstepd"], check=True, timeout=60
        )

    def call(self, *command: str) -> str:
        """Run a command of Slurm; what it prints."""
        return subprocess.run(command, check=True, timeout=60, text=True, stdout=subprocess.PIPE).stdout

    def states(self, job: str) -> list[str]:
        """State and flags of a job."""
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").split()

    def hurry(self, job: str) -> None:
        """Start a job that waits for two minutes, as one that was requeued does."""
        wait_for(lambda: self.states(job) == ["PENDING"], saying="the requeued job")
        # Within a second or so its node takes it for the job that has ended.
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def kill(self, job: str) -> None:
        """``kill -9`` of all processes of a job."""
        for line in self.call("scontrol", "listpids", job).splitlines()[1:]:
            with suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)

    def kill_node(self) -> None:
        """``kill -9`` of slurmd; what trains has another parent."""
        os.kill(int((self._folder / "slurmd.pid").read_text()), signal.SIGKILL)

    def stop(self) -> None:
        """End all jobs and daemons."""
        with suppress(subprocess.SubprocessError):
            self.call("scancel", "--me", "--state=PENDING")
            self.call("scancel", "--me", "--signal=KILL", "--full")
            wait_for(lambda: not self.call("squeue", "--noheader"), saying="the jobs to end")
        for daemon in ("slurmd", "slurmctld"):
            with suppress(OSError, ValueError):
                os.kill(int((self._folder / f"{daemon}.pid").read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster; the test is skipped where there cannot be one."""
    if os.getuid() or shutil.which("dpkg") is None:
        pytest.skip("needs root on Debian, for slurmd")
    with locked(_LOCK) as lock:
        # Tests that run at the same time would take the sockets from each other between look and start.
        if lock is None or any(map(_is_served, _SOCKETS)):
            pytest.skip("another Slurm runs on this machine")
        yield from _started(tmp_path_factory)


def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    root = _unpacked(folder)
    libraries = root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    for name in ("bin", "state", "spool"):
        (folder / name).mkdir()
    for daemon in _DAEMONS:
        # By these names they look for plugins.
        shutil.copy(root / "usr" / "sbin" / f"{daemon}-wlm", folder / "bin" / daemon)
    key = folder / "slurm.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    port = _PORTS[os.getpid() % len(_PORTS)]
    host = platform.node().partition(".")[0]
    config = _CONFIG.format(host=host, port=port, node_port=port + 1, folder=folder, libraries=libraries)
    (folder / "slurm.conf").write_text(config)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", os.pathsep.join([str(root / "usr" / "bin"), os.environ["PATH"]]))
        patch.setenv("LD_LIBRARY_PATH", f"{libraries}:{libraries}/slurm-wlm")
        started = Cluster(folder)
        try:
            started.start()
            yield started
        finally:
            started.stop()
            for sockets in _SOCKETS:
                shutil.rmtree(sockets, ignore_errors=True)


def _is_served(sockets: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(sockets / "sack.socket")) == 0


def _unpacked(folder: Path) -> Path:
    """The programs, from the folder of packages that ``make real-cluster`` fills."""
    packages = os.environ.get("SLURM_PACKAGES")
    if not packages:
        pytest.skip("a cluster takes half a minute to end a job: make real-cluster")
    root = folder / "root"
    for package in Path(packages).glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True, timeout=60)
    return root
