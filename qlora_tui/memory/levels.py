"""Converts tensor bytes to the allocated, reserved and process levels, with their uncertainty.

On a CPU the process level includes the code that oneDNN generates for each shape of a bfloat16 product (MKL
computes float32 products and generates no code). Measured with torch 2.13: each new shape adds 0.57 MB to the
heap, of which 0.3 MB are freed when oneDNN's cache evicts the shape. The rest, a code buffer of 256 KiB per
kernel, stays (cpu/x64/brgemm/brgemm_containers.cpp keeps every kernel).

A GGUF file is converted in a process that ends before the trainer loads anything, so the conversion's peak is
compared with the run's and never added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.formatting import MIB, format_bytes, format_percent
from qlora_tui.gpu.torch_env import ONEDNN_CACHE_CAPACITY
from qlora_tui.memory.activations import FLOAT
from qlora_tui.memory.allocator import Pool
from qlora_tui.memory.calibration import Correction
from qlora_tui.memory.execution import BFLOAT16_CAPABILITY, LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS, ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.static_memory import optimizer_bytes
from qlora_tui.memory.step import StepProfile, layer_input_bytes


@dataclass(frozen=True)
class UncertaintyBand:
    """Uncertainty range of a figure."""

    low_bytes: int
    high_bytes: int
    reason: str


@dataclass(frozen=True)
class MemoryLevels:
    """The allocated, reserved and process bytes, with the items that make up the differences between them."""

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    added: dict[str, int]
    band: UncertaintyBand


SLACK_SHARES = {True: (0.0, 0.13), False: (0.4, 0.17)}
"""Free memory that the allocator holds at the peak, as shares of the fullest moments of a layer and the loss.

The key is whether segments grow. The value is (share of the smaller moment, share of the larger moment). A
freed block serves another tensor only if it is large enough, so each of the two moments uses only a part of
the memory that the other leaves free. In segments that grow, blocks are cut to size. The shares were fitted
to 1,050 steps of 30 families replayed on a model of the allocator (``allocator.py``). On average, they are
within 1.3 % of all bytes with segments that grow, and within 3.9 % with others.
"""
STATIC_UNCERTAINTY = 0.01
"""Uncertainty of the tensors that exist throughout a step, which are sums of known shapes."""
STEP_UNCERTAINTY = 0.08
"""Uncertainty of the tensors of a step.

Of 1,260 steps of 28 families, 90 % are within 3 %, and 98 % are within this value.
"""
MIXER_UNCERTAINTY = 0.35
"""``STEP_UNCERTAINTY`` of models with mixers other than attention, or with other unusual layers.

The memory of such mixers depends on their kernels or fallback code. Unusual layers take up to 1.11 times
(Gemma 4) or 1.26 times (BitNet) the memory that their shapes give.
"""
BEYOND_RULES = 2.5
"""Uncertainty of a class's steps, as a multiple of how far its layers' saved bytes differ from the rules.

Nanochat's layers save 1.24 times the bytes that the rules give, and its steps take 1.40 times the estimate.
For Muse Spark, the ratios are 1.56 and 1.75; for MiniMax, 1.30 and 1.42; for Gemma 4, 1.10 and 1.24.
"""
OWN_CODE_UNCERTAINTY = 4.0
"""``STEP_UNCERTAINTY`` of models with code of their own, which the shapes of modules do not show.

Among 225 model types, a traced step takes up to 4.1 times the memory that the shapes give (AXK2). One type,
DBRX, cannot be traced; its steps take 1.6 times that memory.
"""
TRACED_UNCERTAINTY = 0.02
"""Uncertainty of a traced step, because a trace only imitates the memory of kernels."""


@dataclass(frozen=True)
class _Doubt:
    """The uncertainty of tensors."""

    moving_bytes: int
    """Bytes of a step's tensors."""
    share: float
    """Uncertainty of these bytes, as a share."""

    def of(self, allocated_bytes: int) -> int:
        """Return the bytes by which the sum of all tensors may differ from the estimate."""
        resident = allocated_bytes - self.moving_bytes
        return int(resident * STATIC_UNCERTAINTY + self.moving_bytes * self.share)

    @property
    def words(self) -> str:
        return f"{format_percent(self.share)} of a step's tensors"


def step_uncertainty(layout: Layout, *, traced: bool) -> float:
    """Return the uncertainty of a step's tensors as a share, from what is known about the model's class."""
    if traced:
        return TRACED_UNCERTAINTY
    if layout.hides_tensors:
        return OWN_CODE_UNCERTAINTY
    usual = STEP_UNCERTAINTY if layout.exact and not layout.is_unusual else MIXER_UNCERTAINTY
    return max(usual, BEYOND_RULES * layout.architecture.saves_beyond_rules)


def expected_pool(
    layout: Layout, profile: StepProfile, allocated_bytes: int, room_bytes: int | None = None
) -> Pool:
    """Return the expected totals of a GPU's allocator for a step, given the step's parts.

    Args:
        layout: the run.
        profile: the parts of its step.
        allocated_bytes: tensors at the peak.
        room_bytes: the most that the allocator can take; it releases free segments before it takes more.
    """
    layers = (each.backward.total() - each.backward["checkpoints"] for each in profile.layers)
    loss = max(profile.head.forward.total(), profile.head.backward.total())
    shares = SLACK_SHARES[layout.execution.expandable_segments]
    parts = sorted((max(layers, default=0), loss))
    slack = int(sum(share * size for share, size in zip(shares, parts, strict=True)))
    if room_bytes is not None:
        slack = max(min(slack, room_bytes - allocated_bytes), 0)
    return Pool(allocated_bytes, allocated_bytes + slack)


def tiers(
    items: dict[str, int],
    moving_bytes: int,
    pool: Pool | None,
    layout: Layout,
    *,
    traced: bool = False,
) -> MemoryLevels:
    """Compute all three levels from the items at the peak.

    Args:
        items: bytes of the tensors by item.
        moving_bytes: bytes of the tensors that are allocated and freed in each step.
        pool: the totals of a GPU's allocator.
        layout: the run.
        traced: whether the step was traced.
    """
    execution = layout.execution
    allocated = sum(items.values())
    doubt = _Doubt(moving_bytes, step_uncertainty(layout, traced=traced))
    if pool is None:
        checkpoint_bytes = items.get("checkpoints", 0)
        return _on_cpu(allocated, doubt, checkpoint_bytes, layout)
    # Blocks that were not split count as allocated; with growing segments all blocks are split.
    unsplit = 0 if execution.expandable_segments else max(0, pool.allocated_bytes - allocated)
    allocated += unsplit
    slack = pool.reserved_bytes - pool.allocated_bytes
    reserved = allocated + slack
    paged = optimizer_bytes(layout) if execution.pages_states else 0
    context_low, context, context_high = context_range(execution)
    process = reserved + context + paged
    doubt_bytes = doubt.of(allocated)
    added = {"unsplit": unsplit, "fragmentation": slack, "context": context}
    if paged:
        added["optimizer"] = paged
    return MemoryLevels(
        allocated,
        reserved,
        process,
        added,
        UncertaintyBand(
            process - doubt_bytes - slack - (context - context_low),
            process + doubt_bytes + slack + (context_high - context),
            f"{doubt.words}, the allocator's slack, and a CUDA context of {context_low // MIB} to "
            f"{context_high // MIB} MiB",
        ),
    )


T4_CONTEXT_BYTES = 141 * MIB
"""CUDA context with the loaded kernels of cuBLAS and bitsandbytes. Measured 133 to 147 MiB on a T4."""
A100_CONTEXT_BYTES = 522 * MIB
"""CUDA context on an A100, from memory outside the allocator in ten runs of a 16-bit base.

The runs are in fms-acceleration's ``a100_80gb_liger.csv`` and ``a100_80gb_granite.csv``, with torch 2.4.1,
flash-attn and Triton.
"""
CONTEXT_MIB_PER_MULTIPROCESSOR = (2.95, 3.15)
"""Published context sizes per multiprocessor, before any kernel is loaded, in MiB.

107 MiB on an RTX 4060 Ti with 34 multiprocessors and 555 on an RTX PRO 6000 with 188 (llama.cpp pull request
23604), 256 on an RTX 3090 with 82 (InvokeAI issue 9413), 426 on an RTX 6000 Ada with 142 (unsloth-zoo pull
request 1053). Per multiprocessor, these are 3.15, 2.95, 3.12 and 3.00 MiB.
"""
KERNELS_MIB = {False: (7, 29), True: (7, 203)}
"""Size of the loaded kernels in MiB, as (smallest, largest), by whether FlashAttention is available.

Calculated as the measured contexts minus ``CONTEXT_MIB_PER_MULTIPROCESSOR`` for each multiprocessor. A T4 has
40, and an A100 has 108.
"""
MULTIPROCESSORS = {(7, 5): 72, (8, 6): 84, (8, 9): 142, (9, 0): 132, (12, 0): 188}
"""Largest number of multiprocessors of GPUs with this compute capability, for GPUs that do not report it.

The GPUs are TITAN RTX, RTX 3090 Ti, RTX 6000 Ada, H100 SXM and RTX PRO 6000.
"""
UNKNOWN_CONTEXT_BYTES = 400 * MIB
"""Maximum bytes beyond a T4's context on a GPU whose number of multiprocessors is unknown.

This applies to compute capabilities that are not in ``MULTIPROCESSORS``.
"""


def context_range(execution: ExecutionConfig) -> tuple[int, int, int]:
    """Return the smallest, expected and largest bytes of the CUDA context with its kernels.

    They are calculated from the number of multiprocessors. The expected value is the middle of the range; on
    an A100, it is the measured context. If the number is unknown, the expected value is a T4's context, and
    the largest value is calculated for the largest GPU with the same compute capability. If that is unknown
    too, it is ``UNKNOWN_CONTEXT_BYTES`` more than a T4's context.
    """
    count, capability = execution.multiprocessors, execution.capability
    if capability == (8, 0):
        count = count or 108
    (least, most), kernels = CONTEXT_MIB_PER_MULTIPROCESSOR, KERNELS_MIB[capability >= BFLOAT16_CAPABILITY]
    low = int((least * (count or 40) + kernels[0]) * MIB)
    largest = count or MULTIPROCESSORS.get(capability)
    if largest is None:
        return low, T4_CONTEXT_BYTES, T4_CONTEXT_BYTES + UNKNOWN_CONTEXT_BYTES
    high = int((most * largest + kernels[1]) * MIB)
    if capability == (8, 0):
        return low, A100_CONTEXT_BYTES, max(high, A100_CONTEXT_BYTES)
    return low, T4_CONTEXT_BYTES if count is None else (low + high) // 2, high


RUNTIME_BYTES = 535 * MIB
"""Memory of a trainer on the CPU without tensors and tokenizer.

Measured with torch's CPU build: 482 MiB once torch, transformers (which imports pandas and pyarrow), peft and
bitsandbytes are imported, of which 126 are library files; 29 for library files that are loaded later, with
weights and first kernel calls. The rest are Python objects for data, modules and optimizer.
"""
TOKENIZER_BYTES_PER_TOKEN = 500
"""Bytes per vocabulary token.

Measured with tokenizers 0.23: 472 bytes for 49,152 tokens (SmolLM2), 511 for 262,144 (Gemma 3). Memory that
was free again after the file had been read is not included. The tokenizer holds the words twice, the merges,
and the JSON text itself.
"""
CUDA_LIBRARIES_BYTES = 640 * MIB
"""Additional memory with a CUDA build of torch, with or without a GPU.

Its libraries are loaded and their kernels registered. Measured with torch 2.15 for CUDA 13.2: 725 MiB instead
of 221 once torch is imported, and 1,117 instead of 475 with the other libraries and Triton.
"""
RUNTIME_UNCERTAINTY_BYTES = RUNTIME_BYTES // 10
"""Uncertainty of ``RUNTIME_BYTES`` for other versions and builds of the libraries."""
HEAP_HOLES = 6
"""Ratio of the bytes that a step allocates to the gaps that these allocations leave in the heap.

Rows and samples of different lengths leave gaps that are too small for the next allocations, and glibc
returns only the memory at the top of the heap. Measured in the demo, in float32 and in bfloat16.
"""
CHECKPOINT_HOLES = 2
"""Bytes of gaps in the heap for each byte of kept layer inputs.

Each input lies in the heap among larger tensors of its layer, which are freed soon after it; the next layer's
tensors do not fit between two inputs. Measured with ``mallinfo2`` on models of 10 to 30 layers in float32:
1.8 to 2.6. With 8 layers and inputs of 8, 24 and 40 MiB, a process grew by 541, 1,632 and 1,813 MiB; the
predictions were 424, 1,274 and 1,538 MiB. The inputs of 40 MiB are mapped separately. If glibc returned all
freed memory immediately (``M_MMAP_THRESHOLD``), there would be no gaps, but a step would be a fifth slower.
"""
MAPPED_BYTES = 32 * MIB
"""Minimum size of a block that glibc maps separately and returns completely (``DEFAULT_MMAP_THRESHOLD_MAX``).
"""


def _on_cpu(allocated: int, doubt: _Doubt, checkpoint_bytes: int, layout: Layout) -> MemoryLevels:
    architecture, execution = layout.architecture, layout.execution
    moving_bytes = doubt.moving_bytes
    kernels = kernel_bytes(layout) if moving_bytes else 0
    # Larger layer inputs are mapped separately, and leave no such gaps.
    gaps_bytes = checkpoint_bytes if layer_input_bytes(layout) < MAPPED_BYTES else 0
    slack = max(0, moving_bytes - gaps_bytes - _mapped_bytes(layout)) // HEAP_HOLES
    slack += CHECKPOINT_HOLES * gaps_bytes
    tokenizer = architecture.vocab_size * TOKENIZER_BYTES_PER_TOKEN
    reserved = allocated + slack + kernels + tokenizer
    runtime = RUNTIME_BYTES + (CUDA_LIBRARIES_BYTES if execution.cuda_libraries else 0)
    process = reserved + runtime
    doubt_bytes = doubt.of(allocated) + slack + kernels // 2 + RUNTIME_UNCERTAINTY_BYTES
    return MemoryLevels(
        allocated,
        reserved,
        process,
        {"runtime": runtime, "tokenizer": tokenizer, "kernels": kernels, "fragmentation": slack},
        UncertaintyBand(
            process - doubt_bytes,
            process + doubt_bytes,
            "other libraries, and an allocator that returns memory late",
        ),
    )


def _mapped_bytes(layout: Layout) -> int:
    """Return the bytes of the chunked loss's tensors that the allocator maps separately, without gaps."""
    execution = layout.execution
    if execution.loss != "chunked":
        return 0
    rows = min(LOSS_CHUNK_ROWS, layout.tokens)
    chunk = rows * layout.vocabulary * execution.compute_itemsize
    block = min(LOSS_BLOCK_ROWS["cpu"], rows) * layout.vocabulary * FLOAT
    copies = 1 + (execution.compute_itemsize != FLOAT)
    return (chunk if chunk >= MAPPED_BYTES else 0) + (copies * block if block >= MAPPED_BYTES else 0)


KEPT_BYTES = 300 * 1024
KERNEL_BYTES = 268 * 1024
TOKEN_MULTIPLE = 32
"""Multiple to which rows, samples and loss chunks are padded, in tokens (training/compute_device.py).

A kernel takes milliseconds to generate. Without padding there would be about 10 kernels for each new sample
length, and about 25 for each new row length.
"""
ATTENTION_PRODUCTS = 5
"""Number of product shapes for each sample length: the matrix products in attention's backward.

The backward is in training/fused/cpu_attention.py. The forward generates no kernel.
"""
FULL_ROWS = 4
"""Assumed number of different lengths among packed sequences, which are all nearly full."""


def kernel_bytes(layout: Layout) -> int:
    """Return the heap bytes of kernels for samples of every length; 0 except for bfloat16 on a CPU."""
    execution = layout.execution
    if execution.device != "cpu" or execution.compute_itemsize != 2 or execution.float16:
        return 0
    lengths = -(-layout.length // TOKEN_MULTIPLE)
    rows = min(FULL_ROWS, lengths) if execution.packing else lengths
    chunks = min(lengths, LOSS_CHUNK_ROWS // TOKEN_MULTIPLE)
    shapes = _products(layout) * rows + ATTENTION_PRODUCTS * lengths + 2 * chunks
    return ONEDNN_CACHE_CAPACITY * KEPT_BYTES + shapes * KERNEL_BYTES


def _products(layout: Layout) -> int:
    """Return the number of shapes of matrix products over one row.

    There are two for each shape of a weight, and three for each shape of an adapter matrix.
    """
    linears = {module for layer in layout.layers for module in layer.modules}
    weights = {(linear.inputs, linear.outputs) for linear in linears}
    halves = {(linear.inputs, "A") for linear in linears if linear.rank}
    halves |= {(linear.outputs, "B") for linear in linears if linear.rank}
    return 2 * len(weights) + 3 * len(halves)


def corrected(
    levels: MemoryLevels,
    moving_bytes: int,
    layout: Layout,
    correction: Correction,
    *,
    traced: bool = False,
) -> MemoryLevels:
    """Apply the correction from past runs on the machine.

    Allocated bytes are counted exactly and do not change.
    """
    allocated = levels.allocated_bytes
    reserved = max(allocated, int(levels.reserved_bytes * correction.factor))
    added = dict(levels.added)
    rest = reserved - allocated
    for key in ("tokenizer", "kernels"):
        if key in added:
            added[key] = min(added[key], rest)
            rest -= added[key]
    added["fragmentation"] = rest
    if correction.outside_bytes is not None:
        added["runtime" if "runtime" in added else "context"] = correction.outside_bytes
    process = allocated + sum(added.values())
    doubt = _Doubt(moving_bytes, step_uncertainty(layout, traced=traced))
    doubt_bytes = doubt.of(allocated)
    return MemoryLevels(
        allocated,
        reserved,
        process,
        added,
        UncertaintyBand(
            max(0, int(process * min(correction.low, 1)) - doubt_bytes),
            int(process * max(correction.high, 1)) + doubt_bytes,
            f"the spread of {correction.runs} runs on this machine, and {doubt.words}",
        ),
    )


LIBRARIES_BYTES = 335 * MIB
"""Bytes of a conversion for its libraries (with torch and transformers) and a block of float32 rows."""
BYTES_PER_TOKEN = 920
"""Bytes of a conversion per vocabulary token: words and merges, and the tokenizer built from them."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that is still to be done."""

    file: str
    """Name of the GGUF file."""
    peak_bytes: int
    """Peak resident set size of the conversion process, in bytes."""

    def words(self, run_bytes: int | None) -> str:
        """Return one sentence on the conversion's memory.

        ``run_bytes`` is the peak of a run on the CPU, with which the conversion's peak is compared; None for
        a run on a GPU, whose memory the conversion does not use.
        """
        beside = " of the machine's memory"
        if run_bytes is not None:
            beside = f", {'more' if self.peak_bytes > run_bytes else 'less'} than the run itself"
        return (
            f"Before the first run, {self.file} is converted in a separate process, which takes "
            f"{format_bytes(self.peak_bytes)}{beside}."
        )


def peak_bytes(*, file_bytes: int, vocabulary: int) -> int:
    """Return the largest resident set of a conversion, in bytes.

    The whole GGUF file is mapped, and counts as it is read. Measured: 472 MiB for SmolLM2 135M in Q4_1, 805
    for Gemma 3 270M in Q4_K_M.
    """
    return LIBRARIES_BYTES + file_bytes + vocabulary * BYTES_PER_TOKEN
