"""A child process that processes batches of rows: ``python -m qlora_tui.data.worker``.

Started by ``worker_pool``. It receives ``RowProcessor`` first and replies when it is ready, then batches, one
at a time. Both are pickled by its own parent. It exits when its input ends.
"""

from __future__ import annotations

import os
import pickle
import sys

import msgspec

from qlora_tui.data.length_prefixed import read_frame, write_frame


def main() -> None:
    """Process batches until the input ends."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not a reply
    encode = msgspec.msgpack.Encoder().encode
    try:
        outcomes = pickle.loads(read_frame(requests))
        write_frame(answers, b"")
        while True:
            batch = pickle.loads(read_frame(requests))
            write_frame(answers, encode(outcomes.process(batch)))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
