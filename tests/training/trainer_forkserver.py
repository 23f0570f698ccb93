"""Forks trainers from a process that has imported everything.

Each child is a real process that runs ``python -m qlora_tui.training`` from its first line, to be stopped,
watched and killed like any other; it only skips the ten seconds of imports.

A request through the Unix socket is a line of JSON with ``arguments`` and ``environment``. The reply is the
child's process id and, once it has ended, its exit code. ``BEFORE_TRAINER`` in the environment is code to run
first: see :mod:`tests.training.fault_injection`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import warnings
from pathlib import Path

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from qlora_tui.runs.directory import RunDir
from qlora_tui.training import __main__ as trainer
from qlora_tui.training import attempt


def main() -> None:
    """Serve on the socket named on the command line until standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    # A trainer gives way to other programs, which here are the tests that wait for it.
    vars(attempt)["lower_priority"] = lambda: None
    # What is here now is in every child: a collection there need not go over it, and copy its pages.
    gc.freeze()
    print("ready", flush=True)
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    events.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                client, _ = listener.accept()
                child = _start(client)
                events.register(os.pidfd_open(child), selectors.EVENT_READ, (child, client))
            else:
                child, client = key.data
                _, status = os.waitpid(child, 0)
                events.unregister(key.fileobj)
                os.close(key.fd)
                _reply(client, os.waitstatus_to_exitcode(status))
                client.close()


def _start(client: socket.socket) -> int:
    request = json.loads(client.makefile().readline())
    child = os.fork()
    if child == 0:
        _become_trainer(request["arguments"], request["environment"])
    _reply(client, child)
    return child


def _reply(client: socket.socket, number: int) -> None:
    # The client may have been killed meanwhile.
    with contextlib.suppress(OSError):
        client.sendall(f"{number}\n".encode())


def _become_trainer(arguments: list[str], environment: dict[str, str]) -> None:
    before = environment.pop("BEFORE_TRAINER", "")
    os.environ.clear()
    os.environ.update(environment)
    with RunDir(Path(arguments[0])).log_path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore")
    sys.argv = ["trainer", *arguments]
    code = 1
    try:
        exec(before, {})
        code = trainer.main()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
