"""Opening of files from other programs: regular files only, up to a size limit.

A pipe blocks its reader, a device may never end, and a sparse file of gigabytes takes no disk space.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_MIB = 1 << 20


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading. Raises OSError for anything else; never blocks."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Read a regular file. Raises OSError if it is not regular or exceeds ``most_bytes``."""
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes // _MIB} MiB", str(path))
    return content
