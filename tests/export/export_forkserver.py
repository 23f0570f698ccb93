"""Forks exports from a process that has imported everything, and sends them a signal at a moment.

A moment is a file operation in ``folder``. Each line on stdin is a JSON object with ``arguments`` of
``qlora-tui``, or ``job``, the folder of a background export; ``environment``; ``folder``; and optionally
``stop_at``, the moment at which the child sends itself the signal ``number``. Prints its exit code and its
number of moments as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from qlora_tui.cli.main import main
from qlora_tui.export import forms  # noqa: F401
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


def run_child(request: dict[str, Any], moments: int) -> None:
    """Run the export in a forked child, with a byte in the pipe ``moments`` for each moment."""
    os.environ.clear()
    os.environ.update(request["environment"])
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(arguments[0]).startswith(request["folder"]):
            count += 1
            os.write(moments, b".")
            if count == request.get("stop_at"):
                os.kill(os.getpid(), request["number"])

    sys.addaudithook(watch)
    sys.stdout = sys.stderr
    if "job" in request:
        run_job(Path(request["job"]))
        os._exit(0)
    os._exit(main(request["arguments"]))


def serve() -> None:
    """Serve until standard input ends."""
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(0)
            os.close(reading)
            run_child(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            moments = len(pipe.read())
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), moments]), flush=True)


if __name__ == "__main__":
    serve()
