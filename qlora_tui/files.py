"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
from pathlib import Path


def private_dir(path: Path) -> Path:
    """Create ``path`` (and its parents) readable by its owner only; return it."""
    missing = [path, *path.parents]
    for folder in reversed([p for p in missing if not p.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
    return path


def atomic_write(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replace ``path`` in one step.

    With ``durable`` the content reaches the disk before the name does, so that not even a power cut
    leaves an empty file behind.
    """
    import tempfile  # 15 ms, which a start that writes nothing need not spend

    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
