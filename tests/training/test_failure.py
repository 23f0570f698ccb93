from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import PhaseChanged
from qlora_tui.training.failure import failure_event

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 56623104 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB."


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (CPU, "It requested 54 MiB, more than the machine had left."),
        ("could not create a primitive", "The machine is out of memory."),
        (OUT_OF_MEMORY, OUT_OF_MEMORY),
    ],
)
def test_out_of_memory_is_recognized_and_explained(tmp_path: Path, said: str, what: str) -> None:
    ending = failure_event(RuntimeError(said), RunDir(tmp_path), None, None)
    assert (ending.kind, ending.title, ending.what) == ("out_of_memory", "Out of memory", what)


def test_out_of_memory_records_the_phase_of_the_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with EventWriter(run.events_path) as log:
        log.append(PhaseChanged(at=1.0, phase="loading"))
    ending = failure_event(RuntimeError(OUT_OF_MEMORY), run, Recipe(), None)
    assert ending.phase == "loading" and "smaller model" in ending.fix
    assert failure_event(RuntimeError("bug"), run, Recipe(), None).phase is None


def test_what_onednn_cannot_do_is_no_lack_of_memory(tmp_path: Path) -> None:
    said = "could not create a primitive descriptor for the matmul primitive"
    assert failure_event(RuntimeError(said), RunDir(tmp_path), None, None).kind == "bug"
