"""Rows that would stop a run, found before it is queued: all of a small file, the beginning of a large one.

Used by ``qlora-tui train`` and the checks of the Train screen. It needs no tokenizer; what only shows
in tokens, and the rest of a large file, ``dataset`` finds when the run starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from qlora_tui.data.conversation import RowRefused
from qlora_tui.data.problems import Tally, refuse
from qlora_tui.data.sources import SourceFile, conversations

PATIENCE_S = 2.0


def look_over(files: Iterable[SourceFile], patience_s: float = PATIENCE_S) -> bool:
    """Whether every row could be read within ``patience_s`` seconds.

    Raises ``Problem`` for the first file with rows that block a run.
    """
    until = time.monotonic() + patience_s
    for file in files:
        tally = Tally(file.source, str(file.path))
        in_time = True
        for row, one in conversations(file):
            if isinstance(one, RowRefused):
                tally.add(one.kind, row.number, one.reason)
            if time.monotonic() >= until:
                in_time = False
                break
        refuse(tally.problems())
        if not in_time:
            return False
    return True
