"""Compares the first step of a run, with all fast paths, to the same step by transformers and peft.

If the steps differ, each fast path is tested separately. Fast paths that compute something else are switched
off for the run, which then trains as transformers and peft would; an event and a warning name them.
``NOISE_FACTOR`` of ``rounding`` limits how far the two steps may differ, relative to the noise that
``step_comparison`` measures.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from qlora_tui.data.step_plan import PackedSamples, StepPlan, TokenizedDataset
from qlora_tui.errors import UserError
from qlora_tui.formatting import join_words
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.memory.execution import LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS
from qlora_tui.runs.events import StepVerified
from qlora_tui.training import loss, packed_attention
from qlora_tui.training.batches import count_tokens, longest_micro_batch, micro_batches
from qlora_tui.training.checks.base import prepare_for_text, require_causal
from qlora_tui.training.checks.step_comparison import (
    StepComparison,
    StepReference,
    excerpt_of,
    ready_to_compare,
)
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.fused.kernel_choice import InstalledKernels
from qlora_tui.training.fused.patching import PATCHED_PARTS, PatchedForwards, PatchedPart
from qlora_tui.training.host import release_gpu_memory
from qlora_tui.training.model import PreparedBase
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.run import Run
from qlora_tui.training.samples import SampleList

FastPath: TypeAlias = Literal["packed attention", "loss", "kernels"] | PatchedPart
DESCRIPTIONS: dict[FastPath, str] = {
    "packed attention": "attention over packed samples",
    "loss": "the chunked or Liger loss",
    "kernels": "the installed kernels of its layers",
    "norms": "the fused RMSNorm",
    "rotary": "the rotary kernel",
    "mlp": "the fused gated MLP",
    "lora": "the fused LoRA layers",
    "experts": "the experts one at a time",
    "token rows": "the trained token rows",
    "embeddings": "the trained embedding",
}
"""Names of the fast paths in messages."""


class FastPaths:
    """The fast paths of a model with its adapter, each of which can be switched off."""

    def __init__(self, model: Any, base: PreparedBase) -> None:
        """Find the fast paths in ``model``, the base's model with its adapter."""
        self._switches: dict[FastPath, tuple[Callable[[], object], Callable[[], object]]] = {}
        """For each path, the functions that switch to our code and to the library's."""
        bare = base.model
        if base.padding_free:
            self._switches["packed attention"] = (
                partial(packed_attention.set_attention, bare, bare.config._attn_implementation),
                partial(packed_attention.set_attention, bare, base.reference_attention),
            )
        if base.loss != "stock":
            self._switches["loss"] = (
                partial(vars(bare).__setitem__, "forward", vars(bare)["forward"]),
                partial(loss.use_reference_loss, bare),
            )
        kernels = InstalledKernels(bare)
        if len(kernels):
            self._switches["kernels"] = (kernels.use_ours, kernels.use_reference)
        for part in PATCHED_PARTS:
            replaced = PatchedForwards(model, part)
            if len(replaced):
                self._switches[part] = (replaced.use_ours, replaced.use_reference)

    @property
    def names(self) -> tuple[FastPath, ...]:
        """All fast paths, in the order in which they are tried."""
        return tuple(self._switches)

    def use(self, names: Collection[FastPath]) -> None:
        """Use the named fast paths, and the library's code for all others."""
        for name, (ours, reference) in self._switches.items():
            if name in names:
                ours()
            else:
                reference()


_MAX_TOKENS = {"cpu": 128, "cuda": 512}
"""Maximum number of tokens in the excerpt, which takes a second or two on either device."""
_MIN_TOKENS = 8
_MORE_DRAWS = 3
_LIBRARY_LOGITS_BYTES = 20
"""Bytes per token and vocabulary entry at the peak of the library's step.

They hold logits in 16 bits and their gradient, and log-softmax and two gradients of it in fp32; the rest is
for activations. Measured: 16 to 20 on Gemma-3-270M, whose vocabulary is 262,144.
"""


_REPORT = "Please report the model and the versions of transformers and peft."


T = TypeVar("T")


class StepNotComputedError(Exception):
    """Raised in all processes of a run if one cannot compute a step, so that none waits for it."""

    def __init__(self, reason: str, *, out_of_memory: bool) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class VerificationResult:
    """The result of comparing a whole step."""

    comparison: StepComparison
    """The comparison of the step with every fast path."""
    replaced: tuple[FastPath, ...] = ()
    """Fast paths that computed something else, and have been replaced by the library's code."""
    agrees: bool = True
    """Whether the step, with these paths replaced, agrees with the library's."""


def require_text_model(run: Run) -> None:
    """Raise UserError unless the run's model is a causal language model, and prepare it for text alone.

    The model runs without fast paths during the check.
    """
    paths = FastPaths(run.model, run.base)
    paths.use(())
    require_causal(run.base.model, run.device.torch_device)
    prepare_for_text(run.base.model, run.device.torch_device)
    paths.use(paths.names)


def verify_first_step(run: Run) -> PreparedBase:
    """Compare a step on an excerpt of the run's data with transformers and peft, and report the result.

    ``run.model`` keeps only the fast paths whose results agree.

    Returns:
        The base without the fast paths that were switched off. ``padding_free`` is False if packed attention
            is one of them; the steps must then be planned again.

    Raises:
        UserError: the step differs even without fast paths, and the recipe is set to stop in this case.
    """
    base, samples, step_plan = run.base, run.samples, run.step_plan
    device, reporter = run.device, run.reporter
    micro_batch = run.recipe.training.micro_batch_size
    started = time.perf_counter()
    sequences = _first_sequences(step_plan, samples, micro_batch)
    longest = longest_micro_batch(step_plan, samples, micro_batch, padding_free=base.padding_free)
    tokens = _affordable_tokens(longest, samples, device)
    verified: VerificationResult | str = "there was not enough memory"
    while tokens >= _MIN_TOKENS:
        excerpt = excerpt_of(sequences, samples, tokens=tokens)
        try:
            verified = verify_step(run.model, base, excerpt, device, run.shape.pad_id, run.dist)
            break
        except StepNotComputedError as error:
            tokens //= 2
            if not error.out_of_memory:
                reporter.log("".join(traceback.format_exception(error)))
                verified, tokens = str(error), 0
        release_gpu_memory()
    seconds = time.perf_counter() - started
    if isinstance(verified, str):
        reporter.emit(StepVerified(tokens=0, seconds=seconds, agrees=False, reason=verified))
        return base
    _report(verified, excerpt.tokens, seconds, reporter)
    if not verified.agrees and run.recipe.training.first_step_differs == "stop":
        raise UserError(
            "The first step differs from transformers and peft",
            what=f"{_difference(verified.comparison)} The step also differs without qlora-tui's faster code.",
            why="The results of such a run may be wrong.",
            fix=f"{_REPORT} `--set training.first_step_differs=continue` trains anyway.",
        )
    return _base_without(base, verified.replaced)


def verify_step(
    model: Any,
    base: PreparedBase,
    excerpt: SampleList,
    device: ComputeDevice,
    pad_id: int,
    dist: DistributedContext,
) -> VerificationResult | str:
    """Compare a step with the library's, and switch off the fast paths whose results differ.

    All processes of a run decide together: a path that is wrong in one process is used in none.

    Returns:
        The result of the comparison, or a text that says why nothing could be compared.

    Raises:
        StepNotComputedError: the library's step failed, or memory ran out. All fast paths are then on.
    """
    paths = _in_every_process(dist, lambda: FastPaths(model, base))

    def compare(names: Collection[FastPath]) -> tuple[StepComparison, bool]:
        """Return this process's comparison with the fast paths ``names``, and whether the step agrees with
        the library's in all processes.
        """
        paths.use(names)
        comparison = _in_every_process(
            dist, lambda: _compare_or_blame(reference, packed="packed attention" in names, pad_id=pad_id)
        )
        return comparison, all(dist.all_gather(comparison.agrees))

    used: Collection[FastPath] = paths.names
    try:
        with ExitStack() as stack:

            def reference_step() -> StepReference:
                stack.enter_context(ready_to_compare(model, device))
                paths.use(())
                return StepReference(model, excerpt, device)

            reference = _in_every_process(dist, reference_step)
            if not all(dist.all_gather(reference.is_finite)):
                return "the library's own loss or gradient is not a finite number"
            first, right = compare(paths.names)
            if not right:
                # One draw of the noise may have been small by chance, so draw again before rejecting a path.
                paths.use(())
                for _ in range(_MORE_DRAWS):
                    _in_every_process(dist, reference.measure_noise)
                first, right = compare(paths.names)
            if not right:
                right_paths: tuple[FastPath, ...] = ()
                right = compare(())[1]
                for name in paths.names if right else ():
                    if compare((*right_paths, name))[1]:
                        right_paths = (*right_paths, name)
                # Only now: after an exception all paths are on again, for the caller and for another attempt.
                used = right_paths
    finally:
        paths.use(used)
    return VerificationResult(first, tuple(name for name in paths.names if name not in used), right)


def _compare_or_blame(reference: StepReference, *, packed: bool, pad_id: int) -> StepComparison:
    """Compare our step with the reference; an exception that only our step raises counts as wrong."""
    try:
        return reference.compare(packed=packed, pad_id=pad_id)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failure = reference.failure(_describe_error(error))
    release_gpu_memory()
    return failure


def _in_every_process(dist: DistributedContext, compute: Callable[[], T]) -> T:
    """Run ``compute`` in each process of the run. Raises StepNotComputedError in all of them if one fails."""
    try:
        value, failure, cause = compute(), None, None
    except Exception as error:
        value, failure, cause = None, (_describe_error(error), is_out_of_memory(error)), error
    failures = [each for each in dist.all_gather(failure) if each is not None]
    if failures:
        reason, out_of_memory = min(failures, key=lambda each: each[1])
        try:
            raise StepNotComputedError(reason, out_of_memory=out_of_memory) from cause
        finally:
            # The traceback refers to this frame, and together they would keep the tensors of the failed step.
            del cause
    return value  # type: ignore[return-value]  # None only if that is what it computes


def _describe_error(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _first_sequences(
    step_plan: StepPlan, samples: TokenizedDataset, micro_batch: int
) -> Sequence[PackedSamples]:
    """Return the first micro-batch with two samples, because it can reveal leaks between samples. If there is
    none, return the first micro-batch.
    """
    every = (
        sequences for step in step_plan.steps for sequences in micro_batches(step.sequences, micro_batch)
    )
    return next(
        (sequences for sequences in every if sum(map(len, sequences)) > 1),
        step_plan.steps[0].sequences[:micro_batch],
    )


def _affordable_tokens(longest: list[PackedSamples], samples: TokenizedDataset, device: ComputeDevice) -> int:
    """Return the number of tokens of the largest excerpt that the library can train in the run's memory.

    For each token, the library keeps up to twice the activations. It also keeps the logits of a whole sample,
    of which our loss keeps only one chunk.
    """
    trained = sum(sum(samples.loss_mask(i)) for sequence in longest for i in sequence)
    ours = 2 * min(LOSS_CHUNK_ROWS, trained) + 12 * LOSS_BLOCK_ROWS[device.kind]
    sample_tokens = ours // _LIBRARY_LOGITS_BYTES
    return min(
        _MAX_TOKENS[device.kind],
        2 * sample_tokens,
        max(count_tokens(longest, samples) // 2, 2 * _MIN_TOKENS),
    )


def _report(verified: VerificationResult, tokens: int, seconds: float, reporter: Reporter) -> None:
    comparison = verified.comparison
    names = tuple(DESCRIPTIONS[path] for path in verified.replaced)
    reporter.emit(
        StepVerified(
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
    because = f", because of {join_words(names)}" if verified.agrees and names else ""
    difference = _difference(comparison)
    evidence = (
        f"The first step differs from transformers and peft{because}: {difference[0].lower()}{difference[1:]}"
    )
    if not verified.agrees:
        remedy = (
            "This run uses only the code of transformers and peft, but even so the check fails: the results "
            f"may be wrong. {_REPORT}"
        )
    elif names:
        remedy = (
            "This run uses the code of transformers and peft instead. That code is correct, but it is slower "
            f"and takes more memory. {_REPORT}"
        )
    else:
        remedy = (
            f"Checked one by one, all parts of qlora-tui's faster code match the libraries, so this run "
            f"keeps them. {_REPORT}"
        )
    reporter.health("step_differs", evidence, remedy)


def _difference(comparison: StepComparison) -> str:
    if comparison.failure:
        return f"qlora-tui could not compute the step with its own code ({comparison.failure})."
    return (
        f"Loss {comparison.loss:.4f} instead of {comparison.reference_loss:.4f} with transformers and peft "
        f"(rounding accounts for about {comparison.loss_noise:.2g}); "
        f"a gradient differs by {comparison.gradient_difference:.2%} "
        f"(rounding accounts for about {comparison.gradient_noise:.2%})."
    )


def _base_without(base: PreparedBase, replaced: Collection[FastPath]) -> PreparedBase:
    """Return ``base`` without these fast paths, with descriptions of attention and loss to match."""
    if not replaced:
        return base
    base = replace(base, replaced=tuple(replaced))
    if "packed attention" in replaced:
        attention = (
            f"{base.reference_attention}, padded sequences: packed sequences failed the first step's check"
        )
        base = replace(base, packed=None, attention=attention)
    if "loss" in replaced:
        base = replace(base, loss="stock", loss_reason="the chunked loss failed the first step's check")
    return base
