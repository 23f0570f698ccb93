"""Private directories for one attempt."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def private_home() -> Iterator[Path]:
    """A new folder with the XDG directories and the Hugging Face cache in it; deleted afterwards."""
    before = dict(os.environ)
    home = Path(tempfile.mkdtemp(prefix="qlora-tui-drill-"))
    try:
        for name in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{name}_HOME"] = str(home / name.lower())
        os.environ.update(HF_HOME=str(home / "huggingface"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        os.environ.pop("HF_TOKEN", None)
        yield home
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(home, ignore_errors=True)
