"""A child process that works on batches of rows: ``python -m qlora_tui.data.worker``, started by ``workers``.

It is given ``RowProcessor`` first and answers that it is ready, then a batch at a time. Both come pickled,
from its own parent. When its input ends, so does it.
"""

from __future__ import annotations

import os
import pickle
import sys

import msgspec

from qlora_tui.data.length_prefixed import read_frame, write_frame


def main() -> None:
    """Answer until there is nobody to ask."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
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
