"""Before the first step of a run: its own way to compute a step against the library's.

Where they differ, each fast path is tried by itself. Those that compute something else are switched off for
the run, which then trains as transformers and peft would; an event and a warning name them.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from qlora_tui.memory.codepath import LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS
from qlora_tui.runs.events import StepVerified
from qlora_tui.training.base import Base
from qlora_tui.training.batches import Row, Samples, Schedule, tokens_in
from qlora_tui.training.device import Device
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.fast_paths import DESCRIPTIONS, FastPaths, Path
from qlora_tui.training.probe import longest_micro_batch
from qlora_tui.training.processes import Processes
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.step_check import Comparison, Excerpt, StepReference, excerpt_of, ready_to_compare

_MOST_TOKENS = {"cpu": 128, "cuda": 512}
"""Of the excerpt: a second or two of computing on either."""
_FEWEST_TOKENS = 8
_MORE_DRAWS = 3
_LIBRARY_LOGITS_BYTES = 14
"""A token and entry of the vocabulary, at the peak of the library's loss: logits in 16 bits, their fp32 copy,
its log-softmax and their gradient (torch's cross entropy)."""


@dataclass(frozen=True)
class Verified:
    """What the comparison of a whole step showed."""

    comparison: Comparison
    """Of the step with every fast path."""
    replaced: tuple[Path, ...] = ()
    """Paths that computed something else; the library's are in their place now."""
    agrees: bool = True
    """Whether the step, as the model computes it now, is the library's."""


def verify_first_step(
    model: Any,
    base: Base,
    samples: Samples,
    schedule: Schedule,
    micro_batch: int,
    device: Device,
    pad_id: int,
    processes: Processes,
    reporter: Reporter,
) -> Base:
    """Verify the first micro-batch of ``schedule`` and report what was seen.

    Args:
        model: the base's model with its adapter; left with the fast paths that are right.
        micro_batch: rows of a micro-batch.

    Returns:
        The base as the run may use it: ``kept_apart`` is False where packed attention was replaced, after
        which the run must be laid out again.
    """
    started = time.perf_counter()
    rows = schedule.steps[0].rows[:micro_batch]
    longest = longest_micro_batch(schedule, samples, micro_batch, kept_apart=base.kept_apart)
    tokens = _affordable_tokens(longest, samples, device)
    verified: Verified | str = "there was not enough memory"
    while tokens >= _FEWEST_TOKENS:
        excerpt = excerpt_of(rows, samples, tokens=tokens)
        try:
            verified = verify_step(model, base, excerpt, device, pad_id, processes)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tokens //= 2
    seconds = time.perf_counter() - started
    if isinstance(verified, str):
        reporter.tell(StepVerified(at=time.time(), tokens=0, seconds=seconds, agrees=False, reason=verified))
        return base
    _report(verified, excerpt.tokens, seconds, reporter)
    return _base_without(base, verified.replaced)


def verify_step(
    model: Any, base: Base, excerpt: Excerpt, device: Device, pad_id: int, processes: Processes
) -> Verified | str:
    """Compare a step with the library's, and leave the model with the paths that computed the same.

    Processes of one run decide together: a path that is wrong in one is used in none.

    Returns:
        What the comparison showed, or why nothing could be compared.
    """
    paths = FastPaths(model, base)

    def agrees(comparison: Comparison) -> bool:
        return processes.summed((0.0 if comparison.agrees else 1.0,))[0] == 0

    def compare(names: Collection[Path]) -> Comparison:
        paths.use(names)
        return reference.compare(packed="packed attention" in names, pad_id=pad_id)

    used: Collection[Path] = paths.names
    try:
        with ready_to_compare(model):
            paths.use(())
            reference = StepReference(model, excerpt, device)
            if processes.summed((float(reference.is_finite),))[0] < processes.count:
                return "the library's own loss or gradient is not a finite number"
            first = compare(paths.names)
            right = agrees(first)
            if not right:
                # One draw of the noise may have been small by chance: before a path is blamed, more.
                paths.use(())
                for _ in range(_MORE_DRAWS):
                    reference.measure_noise()
                first = compare(paths.names)
                right = agrees(first)
            if not right:
                used = ()
                right = agrees(compare(used))
                for name in paths.names if right else ():
                    if agrees(compare((*used, name))):
                        used = (*used, name)
    finally:
        paths.use(used)
    return Verified(first, tuple(name for name in paths.names if name not in used), right)


def _affordable_tokens(longest: list[Row], samples: Samples, device: Device) -> int:
    """Tokens of the excerpt for which the library's step takes no more memory than the run's longest one.

    The library keeps logits of a whole sample where our loss holds a chunk of them, and up to twice the
    activations of a token.
    """
    trained = sum(sum(samples.trained(i)) for row in longest for i in row)
    ours = 2 * min(LOSS_CHUNK_ROWS, trained) + 12 * LOSS_BLOCK_ROWS[device.kind]
    of_a_sample = ours // _LIBRARY_LOGITS_BYTES
    return min(
        _MOST_TOKENS[device.kind], 2 * of_a_sample, max(tokens_in(longest, samples) // 2, 2 * _FEWEST_TOKENS)
    )


def _report(verified: Verified, tokens: int, seconds: float, reporter: Reporter) -> None:
    comparison = verified.comparison
    names = tuple(DESCRIPTIONS[path] for path in verified.replaced)
    reporter.tell(
        StepVerified(
            at=time.time(),
            tokens=tokens,
            seconds=seconds,
            loss=comparison.loss,
            reference_loss=comparison.reference_loss,
            loss_noise=comparison.loss_noise,
            gradient_difference=comparison.gradient_difference,
            gradient_noise=comparison.gradient_noise,
            tensor=comparison.tensor,
            replaced=names,
            agrees=verified.agrees,
        )
    )
    if comparison.agrees:
        return
    evidence = (
        f"On the first micro-batch the loss of our code is {comparison.loss:.4f} and the library's "
        f"{comparison.reference_loss:.4f} (rounding explains {comparison.loss_noise:.2g}). A gradient "
        f"differs by {comparison.gradient_difference:.2g} of its size (rounding explains "
        f"{comparison.gradient_noise:.2g})."
    )
    if not verified.agrees:
        remedy = (
            "No fast path explains it, so this run computes by transformers and peft alone, which is slower. "
            "Please report the model and the versions of transformers and peft."
        )
    else:
        remedy = (
            f"This run uses the library's code in place of {' and '.join(names)}: right, but slower and "
            "with more memory. Please report the model and the versions of transformers and peft."
        )
    reporter.health("step_differs", evidence, remedy)


def _base_without(base: Base, replaced: Collection[Path]) -> Base:
    """The base as the run's record names it, once these paths are the library's."""
    if not replaced:
        return base
    base = replace(base, replaced=tuple(replaced))
    if "packed attention" in replaced:
        attention = f"{base.library_attention}, padded rows: {DESCRIPTIONS['packed attention']} differs"
        base = replace(base, kept_apart=False, attention=attention)
    if "loss" in replaced:
        base = replace(base, loss=f"stock: {DESCRIPTIONS['loss']} differs")
    return base
