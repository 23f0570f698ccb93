"""The command line: ``qlora-tui`` opens the app, and each verb does one thing of the app without it.

Each verb is declared once, in the module of its subject; :mod:`qlora_tui.cli.main` lists them.
"""

from qlora_tui.cli.main import main

__all__ = ["main"]
