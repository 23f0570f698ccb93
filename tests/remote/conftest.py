"""A box behind a real sshd, if this machine can have one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.remote.sshd import FakeBox, make_box, sshd_root


@pytest.fixture(scope="session")
def sshd_binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which sshd is."""
    if os.geteuid() or shutil.which("ssh") is None or shutil.which("unshare") is None:
        pytest.skip("a box needs root, ssh and unshare")
    in_namespaces = ["unshare", "-m", "-n", "mount", "-t", "tmpfs", "tmpfs", "/run"]
    if subprocess.run(in_namespaces, capture_output=True).returncode:
        pytest.skip("namespaces of mounts and network cannot be made here")
    return sshd_root(tmp_path_factory.mktemp("sshd"))


@pytest.fixture
def box(sshd_binaries: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBox]:
    """A box, reached by the name ``box``. Its folder has a short path, for the sockets of ssh."""
    with TemporaryDirectory(prefix="box-", ignore_cleanup_errors=True) as folder:
        fake = make_box(Path(folder), sshd_binaries, monkeypatch)
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/run")
        yield fake
        # The shared connection ends with its line, and what runs there goes on.
        fake.cut()
        fake.switch_off()
