from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAYS = (
    "import os; from pathlib import Path; from qlora_tui.training.priority import lower_priority; "
    "lower_priority(); print(os.nice(0), Path('/proc/self/autogroup').read_text().split()[-1])"
)
needs_autogroup = pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this kernel weighs no sessions"
)


@needs_autogroup
def test_a_trainer_gives_way_with_its_whole_session() -> None:
    said = subprocess.check_output([sys.executable, "-c", SAYS], text=True, start_new_session=True)
    assert said.split() == ["10", "10"]


@needs_autogroup
def test_the_starting_terminals_session_keeps_its_priority() -> None:
    shell = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAYS!r}], check=True)"
    said = subprocess.check_output([sys.executable, "-c", shell], text=True, start_new_session=True)
    assert said.split() == ["10", "0"]
