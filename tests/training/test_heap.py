"""What glibc keeps free below the top of its heap is returned."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from qlora_tui.training.heap import release_free_memory

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
