"""``python -m tests.export.stopped_export REQUEST``: an export that gets a signal at a moment.

A moment is a file operation in ``folder``. The request is JSON with ``arguments`` of ``qlora-tui``, or with
``job``, the folder of a background export; ``folder``; ``stop_at``, the moment at which the process sends
itself the signal ``number``; and ``moments``, a file that gets a byte at each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from qlora_tui.cli.main import main
from qlora_tui.export.export_job import run_job

OPERATIONS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
)


def export(request: dict[str, Any]) -> int:
    """Return the exit code, if it comes to its end."""
    moments = os.open(request["moments"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(arguments[0]).startswith(request["folder"]):
            count += 1
            os.write(moments, b".")
            if count == request["stop_at"]:
                os.kill(os.getpid(), request["number"])

    sys.addaudithook(watch)
    if "job" in request:
        run_job(Path(request["job"]))
        return 0
    return main(request["arguments"])


if __name__ == "__main__":
    sys.exit(export(json.loads(sys.argv[1])))
