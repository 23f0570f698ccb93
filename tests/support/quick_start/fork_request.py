"""A request to a fork server. Processes import this first: it must stay short."""

import json
import os
import signal
import socket


class ForkRequest:
    """A child that a fork server starts; see :mod:`tests.support.forkserver`."""

    def __init__(self, server: str, module: str, arguments: list[str], streams: list[int]) -> None:
        """Ask the server for a child that runs ``module``; ``streams``: its descriptors from 0 on."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(server)
        request = {
            "module": module,
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109 (its imports take longer than all of this)
            "ignores_term": signal.getsignal(signal.SIGTERM) == signal.SIG_IGN,
        }
        socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], streams)
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())

    def wait(self) -> int:
        """Wait until the child has ended; returns its exit code, negative for a signal."""
        with self._socket, self._answers:
            return int(self._answers.readline())
