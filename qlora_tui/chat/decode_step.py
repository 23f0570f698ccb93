"""One decoding step on a GPU: in fixed shapes, recorded as a CUDA graph and replayed for each token.

A step launches over a thousand small kernels, which takes Python longer than the GPU needs to compute them.
A graph launches all of them at once. It repeats the same kernels at the same addresses, so whatever changes
from token to token is in tensors that stay in place: the token, its position, and the keys and values so far
(:func:`qlora_tui.chat.kv_cache.fixed_shapes`).

The first tokens of an answer are computed by the same step before it is recorded, so that an answer does not
depend on when that happens. The check of the first prompt compares this step with transformers
(:meth:`qlora_tui.chat.session.ChatSession.check`), and a recorded step must give the logits of the steps
before it. Where a step cannot be computed or recorded (a recurrent state, a layer that waits for the GPU),
tokens are decoded as on a CPU, and ``DecodeSteps.why_not`` has the reason.

Adapters are not merged. Merging into a 4-bit base quantizes it again and merging into a 16-bit base rounds:
either changes what was trained, and the base has to answer without the adapter too. In a graph the two thin
products of each layer cost no launches, and their weights are about 2 % of the base's.

On a CPU there is no such step: it would attend to the whole buffer, and gain nothing.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_tui.chat.kv_cache import FreeBytesFn, GrowingLayer, PrefixCache, fixed_shapes
from qlora_tui.chat.logits_check import LogitsComparison
from qlora_tui.formatting import format_bytes

_STEPS_BEFORE_RECORDING = 8
"""Steps that are computed before one is recorded, which takes as long as several of them, and then compared
with the recorded one: with a single one, a position that never moves would pass."""
_WARM_UPS = 2
"""Steps before the recorded one, in which libraries choose kernels and allocate workspaces."""
_MIN_FREE_BYTES = 512 * 2**20
"""Free memory that recording needs: a graph has its own memory for intermediate results."""

Function = Callable[[], None]
"""Computes from fixed tensors to fixed tensors."""
Record = Callable[[Function], Function]
"""Records what a function computes; returns what repeats it."""
Forward = Callable[[Tensor, Tensor, Any], Tensor]
"""Logits (1, vocabulary) from token (1, 1), position (1, 1) and transformers' cache."""


@dataclass(frozen=True)
class _ComputedStep:
    """A step that was computed."""

    token: Tensor
    position: int
    logits: Tensor


@dataclass
class _Tensors:
    """What a step reads and writes, in place."""

    token: Tensor
    """(1, 1)."""
    position: Tensor
    """(1,)."""
    logits: Tensor | None = None
    """(1, vocabulary), from the first step on."""


class DecodeStep:
    """The step of one token, on the buffers of one cache."""

    def __init__(
        self, layers: list[GrowingLayer], cache: Any, forward: Forward, device: torch.device
    ) -> None:
        token, position = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((1, 1), (1,)))
        self._tensors = tensors = _Tensors(token, position)
        self._steps: deque[_ComputedStep] = deque(maxlen=_STEPS_BEFORE_RECORDING)
        self.is_recorded = False

        # No reference to self: a cycle would keep the buffers until the next garbage collection.
        def compute() -> None:
            with fixed_shapes(layers, position):
                logits = forward(token, position[None], cache)
            if tensors.logits is None:
                tensors.logits = torch.empty_like(logits)
            tensors.logits.copy_(logits)

        self._compute: Function = compute

    def run(self, token: Tensor, position: int) -> Tensor:
        """Process ``token`` (1, 1) at ``position``; return the logits (1, vocabulary) after it.

        The next call overwrites them.
        """
        logits = self._run(token, position)
        if not self.is_recorded:
            self._steps.append(_ComputedStep(token.clone(), position, logits.clone()))
        return logits

    @property
    def is_due(self) -> bool:
        """Return whether it is time to record the step."""
        return len(self._steps) == _STEPS_BEFORE_RECORDING

    def record(self, record: Record, noise: float) -> str:
        """Record the step, and use that if it gives the logits of the steps before it.

        Args:
            record: records a function.
            noise: difference that rounding makes to logits, as in :class:`LogitsComparison`.

        Returns:
            Why it is not recorded; empty if it is. Whatever ``record`` raises is such a reason. What a wrong
            record has written to the cache stays there.
        """
        compute, reason = self._compute, ""
        try:
            self._compute = record(compute)
            worst = max(
                LogitsComparison.of(self._run(step.token, step.position), step.logits).difference
                for step in self._steps
            )
            # The same kernels as before: less may differ than between two implementations.
            if not worst <= noise:
                reason = f"its logits differed by {worst:.2g} of their standard deviation"
        except Exception as error:
            # Drivers, kernels and models raise anything, and the step can be computed without a record.
            reason = first_line(error)
        if reason:
            self._compute = compute
            return f"The decoding step could not be recorded: {reason}."
        self.is_recorded = True
        self._steps.clear()
        return ""

    def _run(self, token: Tensor, position: int) -> Tensor:
        self._tensors.token.copy_(token)
        self._tensors.position.fill_(position)
        self._compute()
        assert self._tensors.logits is not None
        return self._tensors.logits


class DecodeSteps:
    """The decoding steps of a session, as far as they are possible and right."""

    def __init__(
        self,
        forward: Callable[[str], Forward],
        record: Record,
        free_bytes: FreeBytesFn,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._device = device
        self._record = record
        self.free_bytes = free_bytes
        self.in_use = True
        """Whether steps are computed in fixed shapes."""
        self.why_not = ""
        """Why steps are not recorded, as a sentence; empty while they are."""

    def turn_off(self, why_not: str) -> None:
        """Compute no more steps in fixed shapes."""
        self.in_use = False
        self.why_not = why_not

    def step(self, adapter_name: str, prefix_cache: PrefixCache) -> DecodeStep | None:
        """Return the step for the next token of ``prefix_cache``; None where there is none."""
        if not self.in_use or not prefix_cache.has_room:
            return None
        layers = prefix_cache.growing_layers
        if layers is None:
            self.turn_off(
                "The model keeps something other than all keys and values: a recurrent state, or the end of "
                "a sliding window."
            )
            return None
        if prefix_cache.step is None:
            prefix_cache.step = DecodeStep(
                layers, prefix_cache.cache, self._forward(adapter_name), self._device
            )
        return prefix_cache.step

    def record_if_due(self, step: DecodeStep, comparison: LogitsComparison | None) -> bool:
        """Record a step after its first tokens; return False where that failed, now and in this session.

        ``comparison``: of the adapter's logits with those of transformers, which knows the noise of rounding.
        """
        if self.why_not or comparison is None or not step.is_due:
            return True
        if (free_bytes := self.free_bytes()) < _MIN_FREE_BYTES:
            free = format_bytes(free_bytes)
            self.why_not = f"Only {free} of GPU memory was free to record the decoding step."
            return True
        self.why_not = step.record(self._record, comparison.noise)
        return not self.why_not


class TokenReader:
    """Reads a token from a GPU, which computes the next step meanwhile."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._token = torch.zeros((1, 1), dtype=torch.long, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]  # torch's own

    def start(self, token: Tensor) -> None:
        """Begin to read ``token`` (1, 1)."""
        self._token.copy_(token, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> int:
        """Return the token's id."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._token)


def record_cuda_graph(function: Function) -> Function:
    """Record ``function`` as a CUDA graph; return what replays it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    # A tensor of another stream that is freed meanwhile would end the recording.
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    finally:
        if collects:
            gc.enable()
    replay: Function = graph.replay
    return replay


def first_line(error: Exception) -> str:
    """Return the first line of an error, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def free_gpu_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, including what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
