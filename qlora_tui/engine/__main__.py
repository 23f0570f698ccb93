"""``python -m qlora_tui.engine``: the engine, started by :class:`qlora_tui.engine.client.EngineClient`.

Its stdout carries only the protocol: output of libraries goes to stderr, which is a file.
"""

from __future__ import annotations

import os

from qlora_tui.gpu.torch_env import configure_torch_env


def main() -> None:
    """Serve requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    configure_torch_env()
    from qlora_tui.engine.server import Server

    Server(questions, replies).run()


if __name__ == "__main__":
    main()
