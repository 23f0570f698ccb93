"""The command line: ``qlora-tui`` opens the app, a verb does one thing of the app without it.

The words are declared in :mod:`qlora_tui.cli.main`; what each does is in the module of its subject.
"""

from qlora_tui.cli.main import main

__all__ = ["main"]
