"""``python -m tests.support.forkserver DESCRIPTOR MODULE…``: forks processes that have imported the modules.

The descriptor is of a socket that listens. The modules are imported when the first client connects.

Each child is a real process that runs ``python -m MODULE`` from its first line, to be stopped, watched and
killed like any other; it only skips the seconds of imports.

A request through the Unix socket is a line of JSON: null, answered by 0 once children start at once; or
``module``, ``arguments``, ``environment``, ``folder``, and whether it ``ignores_term``, with the child's
descriptors from 0 on, answered by the child's process id and, once it has ended, its exit code.
``BEFORE_TRAINER`` in the environment is code to run first: see :mod:`tests.training.fault_injection`. A child
other than a trainer, which outlives who started it, is killed when the client has ended. Its imports, its
memory and what it reads from the environment at import time are the server's: a test about those sets
``FORK_SERVERS`` to an empty string.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
import warnings
from typing import Any

from qlora_tui.gpu.torch_env import faster_imports

TRAINER = "qlora_tui.training"
TORCHRUN = "torch.distributed.run"
_REQUEST_S = 30.0
"""Seconds in which a client sends its request."""


def main() -> None:
    """Serve until standard input ends."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    events.register(sys.stdin, selectors.EVENT_READ)
    if any(key.fileobj is sys.stdin for key, _ in events.select()):
        return
    with faster_imports() if "bitsandbytes" in sys.argv else contextlib.nullcontext():
        for module in sys.argv[2:]:
            # Some are optional, or belong to one version of a library.
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    if "qlora_tui.training.attempt" in sys.argv:
        _prepare_training()
    if library_types := sys.modules.get("qlora_tui.catalog.library_types"):
        # Parsed from the source of transformers, once in each process.
        library_types.config_classes()
        library_types.text_generators()
    # What a power cut would take: see ``skip_fsync`` in tests/conftest.py.
    os.fsync = os.fstat  # type: ignore[assignment]
    # What is here now is in every child: a collection there need not go over it, and copy its pages.
    gc.freeze()
    while True:
        for key, _ in events.select():
            if key.fileobj is sys.stdin:
                return
            if key.fileobj is listener:
                _start(events, listener.accept()[0])
            elif events.get_map().get(key.fd) is not key:
                continue  # unregistered since this call of select
            elif isinstance(key.data, int):
                # The client has ended.
                events.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
            else:
                _end(events, key)


def _prepare_training() -> None:
    from transformers import conversion_mapping

    from qlora_tui.training import answers, attempt

    # A trainer gives way to other programs, which here are the tests that wait for it.
    vars(attempt)["lower_priority"] = lambda: None
    # Tiny models seldom end an answer: with 96 tokens, a sample takes as long as thirty steps.
    answers.SAMPLE_TOKENS = 16
    # Built at the first load of a model, from hundreds of regular expressions.
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]


def _start(events: selectors.BaseSelector, client: socket.socket) -> None:
    client.settimeout(_REQUEST_S)
    line, streams, _, _ = socket.recv_fds(client, 1 << 20, 4)
    while not line.endswith(b"\n") and (more := client.recv(1 << 20)):
        line += more
    if not line.endswith(b"\n"):
        # It was killed before it had asked.
        client.close()
        for stream in streams:
            os.close(stream)
        return
    request = json.loads(line)
    if request is None:
        _reply(client, 0)
        client.close()
        return
    child = os.fork()
    if child == 0:
        _become(request, streams)
    for stream in streams:
        os.close(stream)
    _reply(client, child)
    events.register(os.pidfd_open(child), selectors.EVENT_READ, (child, client))
    if request["module"] != TRAINER:
        events.register(client, selectors.EVENT_READ, child)


def _end(events: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    child, client = key.data
    _, status = os.waitpid(child, 0)
    events.unregister(key.fileobj)
    if client.fileno() in events.get_map():
        events.unregister(client)
    os.close(key.fd)
    _reply(client, os.waitstatus_to_exitcode(status))
    client.close()


def _reply(client: socket.socket, number: int) -> None:
    # The client may have been killed meanwhile.
    with contextlib.suppress(OSError):
        client.sendall(f"{number}\n".encode())


def _become(request: dict[str, Any], streams: list[int]) -> None:
    environment = request["environment"]
    # Torchrun passes it on to its trainers.
    before = "" if request["module"] == TORCHRUN else environment.pop("BEFORE_TRAINER", "")
    # No child of that process.
    environment.pop("QLORA_TUI_LAUNCHER", None)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # The server's sockets, and those of its other clients.
    os.closerange(len(streams), 1 << 16)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["ignores_term"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [request["module"], *request["arguments"]]
    code = 1
    try:
        exec(before, {})
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _exit_code(end: SystemExit) -> int:
    """As the interpreter's: text is printed and counts as an error."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    main()
