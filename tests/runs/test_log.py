from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from qlora_tui.runs.event_log import (
    LONGEST_LINE_BYTES,
    EventTail,
    EventWriter,
    events_and_damage,
    events_backwards,
    last_event,
)
from qlora_tui.runs.event_sampling import sample_events
from qlora_tui.runs.events import CheckpointSaved, Finished, SampleGenerated, encode
from tests.support.step_events import a_step


def test_what_is_written_is_read_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.poll() == []
    with EventWriter(path) as log:
        log.append(a_step(1))
        assert tail.poll() == [a_step(1)]
        log.append(a_step(2))
        log.append(a_step(3))
    assert tail.poll() == [a_step(2), a_step(3)]
    assert tail.poll() == []


def test_a_torn_last_line_is_ignored_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = encode(a_step(2))
    path.write_bytes(encode(a_step(1)) + line[:20])
    tail = EventTail(path)
    assert tail.poll() == [a_step(1)]
    with path.open("ab") as file:
        file.write(line[20:])
    assert tail.poll() == [a_step(2)]


def test_the_next_writer_mends_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)) + b'{"event":"step","at"')
    with EventWriter(path) as log:
        log.append(a_step(2))
    assert list(EventTail(path).drain()) == [a_step(1), a_step(2)]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 10_000)
    with EventWriter(path) as log:
        log.append(a_step(1))
    assert list(EventTail(path).drain()) == [a_step(1)]


def test_lines_of_another_version_are_counted_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"teleported","at":1}\nnot json\n' + encode(a_step(1)))
    tail = EventTail(path)
    assert list(tail.drain()) == [a_step(1)]
    assert tail.unknown == 2


def test_a_line_longer_than_a_read_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    long = CheckpointSaved(at=1.0, step=1, folder="f" * 5000)
    path.write_bytes(encode(long))
    tail = EventTail(path)
    assert tail.poll(max_bytes=100) == [long]
    with path.open("ab") as file:
        file.write(encode(a_step(2)))
    assert list(tail.drain()) == [a_step(2)]


def test_a_long_run_is_gone_through_without_holding_it_all(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(encode(a_step(number)) for number in range(40_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in EventTail(path).drain()) == 40_000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_the_last_event_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_event(path) is None
    end = Finished(at=9.0, step=3000, seconds=10.0, tokens_per_s=100.0)
    path.write_bytes(b"".join(encode(a_step(n)) for n in range(3000)) + encode(end) + b'{"torn')
    assert last_event(path) == end


def test_the_last_event_is_read_before_a_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)) + b"y" * 200_000 + b"\n")
    assert last_event(path) == a_step(1)


def test_events_are_read_backwards_across_reads_and_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as log:
        for step in range(1, 3000):
            log.append(a_step(step))
        log.append(SampleGenerated(at=1.0, step=3000, prompt="p", answer="x" * 300_000))
        log.append(a_step(3001))
        begin = path.stat().st_size
        for step in range(3002, 3010):
            log.append(a_step(step))
    with path.open("ab") as file:
        file.write(b'{"event": "torn')
    forwards = list(EventTail(path).drain())
    assert len(forwards) == 3009
    assert list(events_backwards(path)) == forwards[::-1]
    assert list(events_backwards(path, begin)) == forwards[:-9:-1]


def hole(path: Path, size: int) -> None:
    """Add zeros that take no space, as a power cut leaves them."""
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + size)


@pytest.mark.slow
def test_a_large_hole_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)))
    hole(path, 4 * LONGEST_LINE_BYTES)
    torn = list(events_and_damage(path))
    with path.open("ab") as file:
        file.write(encode(a_step(2)) + encode(a_step(3)))
    hole(path, 1 << 29)
    tracemalloc.start()
    assert [is_whole for _, is_whole in torn] == [True, False]
    assert [is_whole for _, is_whole in events_and_damage(path)] == [True, False, True, False]
    assert list(EventTail(path).drain()) == [a_step(1), a_step(3)]
    assert list(events_backwards(path)) == [a_step(3), a_step(1)]
    assert sample_events(path, 64).events[0] == a_step(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * LONGEST_LINE_BYTES


def test_an_event_after_a_partially_written_hole_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(encode(a_step(1)))
    hole(path, 2 * LONGEST_LINE_BYTES)
    tail = EventTail(path)
    assert list(tail.drain()) == [a_step(1)]
    with path.open("ab") as file:
        file.write(b"\n" + encode(a_step(2)))
    assert list(tail.drain()) == [a_step(2)] and tail.unknown == 1
