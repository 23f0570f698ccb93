"""Forks ``qlora-tui`` from a process that has imported everything.

Each line on stdin is a JSON object with ``arguments`` and ``environment``.
Prints the child's process id, and its exit code once it has ended; its progress is on stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from qlora_tui.cli.main import main
from qlora_tui.export import gguf_export  # noqa: F401


def serve() -> None:
    """Serve until standard input ends."""
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.close(0)
            os.dup2(2, 1)
            request = json.loads(line)
            os.environ.clear()
            os.environ.update(request["environment"])
            code = main(request["arguments"])
            print("ended", flush=True)
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
