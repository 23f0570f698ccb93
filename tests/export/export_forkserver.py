"""Forks ``qlora-tui`` from a process that has imported everything.

Each line on stdin is a JSON object with ``arguments``, ``environment`` and optionally ``stop_at``, a number
of lines of progress, and ``number``, the signal that the child then sends itself. Prints its exit code and
its lines of progress as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from qlora_tui.cli import export
from qlora_tui.cli.main import main
from qlora_tui.export import gguf_export  # noqa: F401


def run_child(request: dict[str, Any], progress: int) -> None:
    """Run the command in a forked child, with its lines of progress in the pipe ``progress``."""
    os.environ.clear()
    os.environ.update(request["environment"])
    lines = 0

    def on_status(words: str) -> None:
        nonlocal lines
        lines += 1
        os.write(progress, f"{words}\n".encode())
        if lines == request.get("stop_at"):
            os.kill(os.getpid(), request["number"])

    export._on_status = on_status
    sys.stdout = sys.stderr
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
        with os.fdopen(reading) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), lines]), flush=True)


if __name__ == "__main__":
    serve()
