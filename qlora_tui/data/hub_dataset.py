"""Hub datasets by id, downloaded by the ``datasets`` library in a child process.

``datasets`` imports numpy, pandas and more, so it never runs in this process. It leaves Arrow files in the
Hugging Face cache, which ``read`` reads in place; their location is stored in the cache directory, so the
next use makes no request to the Hub.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import subprocesses
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.gpu.torch_env import offline_variables_set
from qlora_tui.paths import cache_dir

TRAINING_SPLITS = ("train", "training", "train_sft", "sft")
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class HubFiles(Struct, frozen=True):
    """Files that the child process downloaded."""

    files: tuple[str, ...]
    split: str


class HubFailure(Struct, frozen=True):
    """Why the child process found no files."""

    reason: str
    fix: str


_FILES = msgspec.json.Decoder(HubFiles)
_FAILURE = msgspec.json.Decoder(HubFailure)


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` may be a dataset id: ``owner/name``, optionally with ``:subset``."""
    return _ID.fullmatch(name) is not None and not name.startswith(("./", "../", "~"))


def hub_files(name: str) -> tuple[list[Path], str]:
    """Return the files of a dataset's training split, downloaded if needed, and a note on them.

    Raises ``UserError`` where the dataset does not exist or cannot be reached.
    """
    cached = _read_cached(name)
    if cached is None:
        cached = _fetch(name)
        if not cached.files:
            raise UserError(
                "No such data",
                what=f"{name} has no files in the cache after its download: split {cached.split} is empty.",
                fix="Choose another dataset, or download its files and name their folder.",
            )
        atomic_write(_cache_path(name), msgspec.json.encode(cached))
    other = "" if cached.split in TRAINING_SPLITS else ", because it has none for training"
    return [Path(file) for file in cached.files], f"hub dataset {name}, split {cached.split}{other}"


def is_training_split(name: str) -> bool:
    """Return whether the split of an earlier download is for training. Makes no request to the Hub."""
    cached = _read_cached(name)
    return cached is not None and cached.split in TRAINING_SPLITS


def local_files(name: str) -> list[Path] | None:
    """Return the files of an earlier download, else None. Makes no request to the Hub."""
    cached = _read_cached(name)
    return None if cached is None else [Path(file) for file in cached.files]


def _cache_path(name: str) -> Path:
    return private_dir(cache_dir() / "datasets") / f"{name.replace('/', '--').replace(':', '@')}.json"


def _read_cached(name: str) -> HubFiles | None:
    try:
        files = decode_json(_cache_path(name).read_bytes(), _FILES)
    except (OSError, msgspec.MsgspecError):
        return None
    return files if files.files and all(Path(file).is_file() for file in files.files) else None


def _fetch(name: str) -> HubFiles:
    # The child process may use the network, even where this process holds a model and is offline.
    environment = {
        key: value for key, value in subprocesses.subprocess_env().items() if key not in offline_variables_set
    }
    done = subprocess.run(
        subprocesses.module_argv("qlora_tui.data.hub_fetch", name),
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else b""
    try:
        if done.returncode == 0:
            return decode_json(last, _FILES)
        failure = decode_json(last, _FAILURE)
    except msgspec.MsgspecError:
        failure = HubFailure(
            (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1], ""
        )
    raise UserError(
        "No such data",
        what=f"{name} is neither a local file nor a dataset that the Hub provides: {failure.reason}",
        fix=failure.fix or "Check the name and the connection.",
    )
