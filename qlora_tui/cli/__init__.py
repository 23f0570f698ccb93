"""The command line: ``qlora-tui`` opens the app, and each command does one of its tasks without it.

The commands are declared in :mod:`qlora_tui.cli.main` and implemented in one module per topic.
"""

from qlora_tui.cli.main import main

__all__ = ["main"]
