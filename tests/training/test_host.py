"""The trainer returns free memory, and gives way to other programs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tui.training.host import release_free_memory

BLOCK, BLOCKS = 64 * 1024, 1000


def test_free_blocks_below_one_in_use_are_returned() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident_bytes()
    release_free_memory()
    assert before - resident_bytes() > BLOCK * BLOCKS * 0.8
    libc.free(blocks[-1])


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


SAYS = (
    "import os; from pathlib import Path; from qlora_tui.training.host import lower_priority; "
    "lower_priority(); print(os.nice(0), Path('/proc/self/autogroup').read_text().split()[-1])"
)
LOWERED = str(max(10, os.getpriority(os.PRIO_PROCESS, 0)))
needs_autogroup = pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this kernel weighs no sessions"
)


@needs_autogroup
def test_a_trainer_gives_way_with_its_whole_session() -> None:
    said = subprocess.check_output([sys.executable, "-c", SAYS], text=True, start_new_session=True)
    assert said.split() == [LOWERED, "10"]


@needs_autogroup
def test_the_starting_terminals_session_keeps_its_priority() -> None:
    shell = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAYS!r}], check=True)"
    said = subprocess.check_output([sys.executable, "-c", shell], text=True, start_new_session=True)
    assert said.split() == [LOWERED, "0"]
