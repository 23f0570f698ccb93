"""Host memory that CUDA pins, or refuses to pin; a fake stands for CUDA's runtime."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qlora_tui.training.streaming import host_memory
from qlora_tui.training.streaming.host_memory import HostMemory

pytestmark = pytest.mark.slow
CUDA = torch.device("cuda")


class FakeRuntime:
    """Pins buffers, up to a number of bytes. The error of a failed call waits for the next launch."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.pinned: dict[int, int] = {}
        self.last_error = 0

    def register(self, address: int, size: int, flags: int) -> int:
        """CUDA's error 2 is a lack of memory."""
        if sum(self.pinned.values()) + size > self.limit_bytes:
            self.last_error = 2
            return 2
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        """CUDA's error 713 is that the memory is not registered."""
        if self.pinned.pop(address, None) is None:
            self.last_error = 713
            return 713
        return 0

    def launch(self, *size: int, device: torch.device) -> torch.Tensor:
        """torch.zeros on the GPU, whose launch raises the error that waits, once."""
        code, self.last_error = self.last_error, 0
        if code:
            raise RuntimeError(f"CUDA error: {code}")
        return torch.empty(size)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(100)
    functions = SimpleNamespace(cudaHostRegister=fake.register, cudaHostUnregister=fake.unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: functions)
    monkeypatch.setattr(torch, "zeros", fake.launch)
    return fake


def test_a_refusal_is_reported_once_and_buffers_still_come(runtime: FakeRuntime) -> None:
    reasons: list[str] = []
    memory = HostMemory(CUDA, reasons.append)
    buffers = [memory.allocate(size) for size in (60, 60, 20)]
    assert [len(buffer) for buffer in buffers] == [60, 60, 20]
    assert memory.refused == "CUDA error 2" and reasons == ["CUDA error 2"]
    # After a refusal no more is pinned: a step waits for its slowest copy anyway.
    assert list(runtime.pinned.values()) == [60]
    assert runtime.launch(1, device=CUDA).numel() == 1


def test_a_runtime_that_raises_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise RuntimeError("operation not supported\nwith a stack")

    monkeypatch.setattr(torch.cuda, "cudart", unavailable)
    memory = HostMemory(CUDA)
    assert len(memory.allocate(8)) == 8 and memory.refused == "operation not supported"


@pytest.mark.parametrize(("lost", "arrives"), [((), True), ((3,), False), ((0,), False)])
def test_on_wsl2_copies_from_pinned_memory_are_tried(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, lost: tuple[int, ...], arrives: bool
) -> None:
    copies: list[int] = []

    def copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(len(copies))
        return torch.zeros_like(values) if copies[-1] in lost else values.clone()

    monkeypatch.setattr(host_memory, "_copied_there", copied)
    memory = HostMemory(CUDA)
    memory.allocate(60)
    assert not copies
    monkeypatch.setattr(host_memory, "is_wsl2", lambda: True)
    buffer = memory.allocate(40)
    assert memory.refused == ("" if arrives else "what was copied from it did not arrive on the GPU")
    assert (buffer.data_ptr() in runtime.pinned) is arrives and runtime.last_error == 0


def test_unpinned_memory_stays_usable(runtime: FakeRuntime) -> None:
    reasons: list[str] = []
    memory = HostMemory(CUDA, reasons.append)
    buffer = memory.allocate(60)
    pinned_before = memory.is_pinned
    memory.unpin("copies are lost")
    assert (pinned_before, memory.is_pinned, runtime.pinned) == (True, False, {})
    assert reasons == [memory.refused] == ["copies are lost"]
    del buffer
    assert runtime.last_error == 0


def test_freed_memory_is_not_pinned_any_more(runtime: FakeRuntime) -> None:
    memory = HostMemory(CUDA)
    buffer = memory.allocate(60)
    assert len(runtime.pinned) == 1
    del buffer
    assert not runtime.pinned and not memory.refused
    # One that CUDA no longer knows leaves no error either.
    buffer = memory.allocate(60)
    runtime.pinned.clear()
    del buffer
    assert runtime.launch(1, device=CUDA).numel() == 1


def test_a_cpu_pins_nothing(runtime: FakeRuntime) -> None:
    assert HostMemory(torch.device("cpu")).allocate(60).is_contiguous() and not runtime.pinned
