"""A real sshd, and a box behind it: a home whose profile prints, and this program in ``~/.local/bin``.

Each connection is an sshd of its own, on a pipe instead of a port (``sshd -i``), in its own namespaces of
mounts and network; killing that process is a line that drops. The user's own files are not touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("openssh-server", "openssh-sftp-server", "libwrap0", "libwtmpdb0")
SOURCES = str(Path(__file__).parents[2])


def sshd_root(folder: Path) -> Path:
    """Return the folder below which sshd is: the system's, or that of Debian's packages, taken apart."""
    if Path("/usr/sbin/sshd").exists():
        return Path("/")
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("sshd is not installed, and there are no Debian packages")
    if subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, capture_output=True).returncode:
        pytest.skip("the Debian packages of sshd cannot be downloaded")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    return folder


@dataclass(frozen=True)
class FakeBox:
    """The files of a box: its name for ssh is ``box``."""

    folder: Path
    state_home: Path

    @property
    def program(self) -> Path:
        return self.folder / "home/.local/bin/qlora-tui"

    def log(self) -> str:
        """Return what the sshd of each connection said."""
        path = self.folder / "sshd.log"
        return path.read_text() if path.exists() else ""

    def connections(self) -> list[int]:
        """Return the processes that are lines to the box."""
        return [int(path.name) for path in (self.folder / "lines").iterdir() if _is_alive(int(path.name))]

    def processes(self, words: str = "") -> list[int]:
        """Return what runs on the box, with these words in its command."""
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        mark = f"XDG_STATE_HOME={self.state_home}"
        return [pid for pid in numbers if mark in _environment_of(pid) and words in _command_of(pid)]

    def switch_off(self) -> None:
        """End whatever runs on the box."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Drop every line; return how many there were."""
        lines = self.connections()
        for pid in lines:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        return len(lines)


def _environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_box(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBox:
    """Write the files of a box, and put an ssh that knows it first in the PATH."""
    home, bin_ = folder / "home", folder / "bin"
    for each in (home / ".local/bin", bin_, folder / "lines", folder / "state"):
        each.mkdir(parents=True)
    (home / ".bashrc").write_text('echo "Welcome to the box! {"; echo "You have mail." >&2\n')
    program = home / ".local/bin/qlora-tui"
    _script(program, f'exec env PYTHONPATH={SOURCES} {sys.executable} -P -m qlora_tui "$@"')
    for key in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "known_hosts").write_text(f"box {(folder / 'host_key.pub').read_text()}")
    variables = {f"XDG_{kind}_HOME": f"{folder}/{kind.lower()}" for kind in ("STATE", "CACHE", "CONFIG")}
    variables |= {"HF_HOME": f"{folder}/huggingface", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    private = "sshd-session", "sshd-auth"
    paths = [f"Sshd{name[5:].title()}Path {root}/usr/lib/openssh/{name}" for name in private]
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/id.pub\n"
        + "".join(f"{line}\n" for line in (paths if (root / "usr/lib/openssh/sshd-session").exists() else []))
        + "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        + f"SetEnv {' '.join(f'{name}={value}' for name, value in variables.items())}\n"
    )
    users = [
        line for line in Path("/etc/passwd").read_text().splitlines() if line[:5] not in ("root:", "sshd:")
    ]
    own = [f"root:x:0:0:root:{home}:/bin/bash", "sshd:x:106:65534::/run/sshd:/usr/sbin/nologin"]
    (folder / "passwd").write_text("\n".join([*own, *users, ""]))
    inside = (
        f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount --bind {folder}/passwd /etc/passwd && "
        f"LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu "
        f"exec {root}/usr/sbin/sshd -i -e -f {folder}/sshd_config 2>>{folder}/sshd.log"
    )
    _script(folder / "connect", f"touch {folder}/lines/$$\nexec setsid unshare -m -n sh -c '{inside}'")
    (folder / "ssh_config").write_text(
        f"Host box\n User root\n IdentityFile {folder}/id\n IdentitiesOnly yes\n"
        f" ProxyCommand {folder}/connect\n UserKnownHostsFile {folder}/known_hosts\n"
    )
    _script(bin_ / "ssh", f'exec {shutil.which("ssh")} -F {folder}/ssh_config "$@"')
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    return FakeBox(folder, folder / "state")


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
