"""What is read from the source of the installed transformers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from qlora_tui.catalog import library_types


def test_one_thread_at_a_time_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def parse(source: str) -> str:
        with pytest.raises(threading.BrokenBarrierError):
            both.wait(0.05)
        return source

    monkeypatch.setattr(library_types, "ast", SimpleNamespace(parse=parse))
    with ThreadPoolExecutor(2) as threads:
        parsed: list[object] = list(threads.map(library_types.parse_source, ("a", "b")))
    assert parsed == ["a", "b"]
