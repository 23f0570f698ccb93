"""Hub datasets by id, downloaded by the ``datasets`` library in a child process.

``datasets`` imports numpy, pandas and more, so it never runs in this process. It leaves Arrow files in the
Hugging Face cache, which ``read`` reads in place; their location is stored in the cache directory, so the
next use makes no request to the Hub.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.gpu.torch_env import online_environ
from qlora_tui.paths import cache_dir
from qlora_tui.worker import run_job

TRAINING_SPLITS = ("train", "training", "train_sft", "sft")
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class HubFiles(Struct, frozen=True):
    """Files that the child process downloaded."""

    files: tuple[str, ...]
    split: str


_FILES = msgspec.json.Decoder(HubFiles)


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
    return run_job(
        "qlora_tui.data.hub_dataset:download_split",
        name,
        result=HubFiles,
        title="No such data",
        subject=f"The process that downloads {name}",
        fix="Check the name and the connection.",
        environ=online_environ(),
    )


def download_split(name: str) -> HubFiles:
    """Download the training split of a dataset, as a job. Raises UserError.

    ``trust_remote_code`` is never set, so the library refuses a dataset that is a script.
    """
    import datasets

    path, _, subset = name.partition(":")
    try:
        names = datasets.get_dataset_split_names(path, subset or None)
        split = next((s for s in TRAINING_SPLITS if s in names), names[0])
        loaded = datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, from its own to its HTTP client's
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            "No such data",
            what=f"{name} is neither a local file nor a dataset that the Hub provides: {text[:400]}",
            fix=_fix(text, type(error).__name__),
        ) from None
    return HubFiles(tuple(file["filename"] for file in loaded.cache_files), split)


def _fix(text: str, kind: str) -> str:
    if "Missing config name" in text:
        return "Add the subset after a colon: owner/name:subset."
    if "Gated" in kind or "401" in text or "403" in text or "gated" in text:
        return "Accept its terms on its page, then log in: hf auth login."
    if "script" in text:
        return "Dataset scripts are never run. Download the data files and use their paths."
    return "Check the name and the connection."
