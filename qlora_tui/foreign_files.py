"""Opening of files from other programs: regular files only, up to a size limit.

A pipe blocks its reader, a device may never end, and a sparse file of gigabytes takes no disk space.
"""

from __future__ import annotations

import errno
import io
from pathlib import Path

from qlora_tui.files import open_to_read

_MIB = 1 << 20


def open_foreign(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading. Raises OSError for anything else; never blocks."""
    try:
        return open_to_read(path)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ENXIO):
            raise
        raise OSError(errno.EINVAL, "it is not a regular file", str(path)) from None


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a regular file. Raises OSError if it is not regular or exceeds ``max_bytes``."""
    with open_foreign(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes // _MIB} MiB", str(path))
    return content
