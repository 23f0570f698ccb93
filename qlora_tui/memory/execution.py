"""Describes the code that a run executes, as far as it affects memory.

:func:`trainer_execution` returns the execution of this project's trainer for a recipe and a :class:`Device`.
The same recipe takes different amounts of memory in different trainers. It depends on whether the frozen
weights were cast to float32, which logits the loss keeps, and which attention kernel runs.
``tests/memory/test_published.py`` compares estimates for several versions of transformers with published
measurements. The differences between the versions were read from ``models/*/modeling_*.py`` and
``loss/loss_utils.py`` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_tui.memory.calibration import Correction, TransferSpeed
from qlora_tui.memory.traces import NO_TRACES, KnownTraces
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.training_settings import RecipeOptimizer

if TYPE_CHECKING:
    from qlora_tui.catalog.architecture_types import Architecture


Version = tuple[int, int]
"""Major and minor version of transformers."""

CURRENT: Version = (5, 24)
FUSED_EXPERTS: Version = (5, 0)
"""First version in which experts are two 3-D parameters; before, each matrix was a linear module."""
_THREADED_READING: tuple[Version, Version] = ((5, 0), (5, 4))
"""(first version that reads weights in threads while quantizing, first version that no longer does)."""
_LABELS_SHIFTED: Version = (4, 49)
"""First version in which ``ForCausalLMLoss`` pads and shifts the labels in place of the logits."""
_LOSS_FUNCTION: Version = (4, 48)
"""First version in which all measured families call ``ForCausalLMLoss``."""

LossCode = Literal["rebound", "shifted", "padded"]
"""Variants of the stock loss.

* rebound: the model's own loss on a shifted copy of the logits in float32. The 16-bit logits are freed once
  they are cast.
* shifted: ``ForCausalLMLoss`` on a shifted copy of the logits in float32. The caller still holds the 16-bit
  logits.
* padded: ``ForCausalLMLoss`` pads and shifts the labels. So it casts the logits to float32, but makes no
  shifted copy of them.
"""

ADAPTER_ITEMSIZE = 4
"""Bytes per element of the LoRA matrices, and therefore of their gradients."""

Loss = Literal["stock", "chunked", "liger"]
"""Implementations of the loss.

* stock: the model's own loss or ``ForCausalLMLoss`` of transformers, in the variant
  :attr:`ExecutionConfig.loss_code`.
* chunked: this project's, a few rows of logits at a time.
* liger: Liger's fused linear cross-entropy, in our trainer.
"""

Kernel = Literal["flash", "efficient", "math", "eager"]
"""Kernels of attention.

* flash: FlashAttention (from its own library or SDPA).
* efficient: SDPA's memory-efficient kernel.
* math: SDPA without a fused kernel.
* eager: transformers' own code, which saves the scores.
"""

Optimizer = Literal["adamw_fused", RecipeOptimizer]
"""Here ``adamw_fused`` is the recipe's ``adamw``, and ``adamw`` is torch's multi-tensor AdamW."""

AttentionPath = Literal["varlen", "segments", "eager"]
"""How attention is computed.

* ``varlen``: all samples of a packed sequence in one call of FlashAttention.
* ``segments``: one call per sample (:mod:`qlora_tui.training.packed_attention`).
* ``eager``: padded sequences, with transformers' code.
"""

LEAN_OPTIMIZER: RecipeOptimizer = "paged_adamw_8bit"
"""The optimizer that ``optimizer = "auto"`` uses if memory is short: two bytes per trained parameter."""
_OPTIMIZERS: dict[RecipeOptimizer, Optimizer] = {"adamw": "adamw_fused", "auto": LEAN_OPTIMIZER}

FlashObstacle = Literal["no GPU", "float32", "old GPU", "old torch"]

LOSS_CHUNK_ROWS = 256
"""Number of positions whose logits our trainer holds at a time.

These are enough rows for an efficient matrix product. With a vocabulary of 152,000, their logits take 78 MB
in 16 bits.
"""

LOSS_BLOCK_ROWS = {"cpu": 32, "cuda": 128}
"""Number of the ``LOSS_CHUNK_ROWS`` rows that are in float32 at a time, by kind of device.

On a CPU, they must fit in the cache. On a GPU, the kernels use one multiprocessor per row, so there must be
enough rows to keep the multiprocessors busy.
"""

ATTENTION_BLOCK_ROWS = 512
"""Number of queries whose scores our attention backward on a CPU holds at a time.

It holds two tensors of scores (heads, queries, tokens). With more queries, it would compute more of the
masked upper triangle; with fewer, the matrix products would be too small.
"""
SAMPLE_PADDING_ROWS = 128
"""Rows that the varlen kernel's backward adds to its float32 sums for each sample.

See ``mha_varlen_bwd`` in torch's ``flash_api.cpp``.
"""
EXTRA_COLUMNS = 3
"""Number of columns that our attention backward on a CPU appends to its matrices.

With these columns of queries, keys, gradients and values, a matrix product also subtracts one number per
query.
"""

GATED_MLP = ("gate_proj", "up_proj", "down_proj")
"""Names of the MLP modules that our function for gated MLPs computes."""
GROUPS = (("q_proj", "k_proj", "v_proj"), GATED_MLP[:2])
"""Names of modules that read the same input and are computed together, in the order of their calls."""

BFLOAT16_CAPABILITY = (8, 0)
"""Lowest compute capability of GPUs that compute bfloat16 natively (Ampere)."""


CONSUMER_CAPABILITIES = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
"""(lowest, highest) compute capability of the RTX 30 and 40 series, and of the RTX 50 series."""


@dataclass(frozen=True)
class Device:
    """The device of the run."""

    kind: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int] = (8, 6)
    """CUDA compute capability; 8.6 (RTX 30) if no GPU is known."""
    multiprocessors: int | None = None
    """Number of the GPU's streaming multiprocessors, on which the size of its CUDA context depends."""
    native_bfloat16: bool = False
    """Whether a CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    cuda_libraries: bool = False
    """Whether torch is a CUDA build, whose libraries a process loads even on a CPU."""
    liger: bool = False
    """Whether the device is a GPU and Liger's kernels are installed."""
    expandable_segments: bool = True
    """Whether the CUDA allocator grows its segments.

    The trainer requests this by default, except on WSL2; the user's own allocator settings take precedence.
    """
    managed_memory: bool = True
    """Whether a paged optimizer keeps its states in CUDA's managed memory, which it does except on WSL2."""
    triton: bool = False
    """Whether Triton is installed.

    Our kernels for norms, rotary positions and gated MLPs on a GPU need it.
    """
    varlen: bool = True
    """Whether torch can run FlashAttention on all samples of a packed sequence in one call (since 2.11)."""
    correction: Correction | None = None
    """Correction from past runs on the device."""
    speed: TransferSpeed | None = None
    """Measured speed of copies and of computing, on a GPU; None without a measurement."""
    host_bytes: int | None = None
    """Host memory of the GPU's machine; None if it is unknown."""
    traces: KnownTraces = NO_TRACES
    """Traced steps, whose estimates are exact."""


@dataclass(frozen=True)
class ExecutionConfig:
    """Properties of the code that affect the peak."""

    compute_itemsize: int = 2
    """Bytes per element of the compute dtype, that of activations and dequantized weights."""
    float16: bool = False
    """Whether a two-byte compute dtype is float16 rather than bfloat16."""
    cast_to_float32: bool = False
    """Whether norms, embedding and head, and therefore the residual stream, are in float32.

    peft's ``prepare_model_for_kbit_training`` casts them.
    """
    autocast: bool = False
    """Whether the forward runs under ``torch.autocast``, as with ``Trainer(bf16=True)``."""
    loss: Loss = "chunked"
    transformers: Version = CURRENT
    """Version of transformers whose modeling code runs."""
    logits_alive_in_backward: bool = False
    """Whether the model's output, and therefore the logits, is still referenced during the backward."""
    checkpointing: bool = True
    kept_layers: int = 0
    """Number of layers at the end of the model that keep their activations despite checkpointing."""
    offloads_inputs: bool = False
    """Whether a run on a GPU keeps the inputs of checkpointed layers in host memory until the backward."""
    streamed_layers: int = 0
    """Number of layers whose frozen weights are in host memory, and copied to device buffers in turn."""
    reentrant: bool = False
    """Whether checkpointing is reentrant, so that it reruns whole layers and holds their outputs."""
    attention: Kernel = "flash"
    optimizer: Optimizer = "adamw"
    accumulates: bool = False
    """Whether gradients already have memory when the forward begins, from an earlier micro-step or step."""
    packing: bool = False
    segments: bool = False
    """Whether the micro-batch is one long sequence of samples that do not attend to each other."""
    varlen: bool = False
    """Whether attention to all samples of a ``segments`` sequence is one kernel call, not one per sample."""
    samples: int = 0
    """Number of samples in the micro-batch, set only if memory use depends on it; 0 means one sample per
    sequence.
    """
    device: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int] = (8, 6)
    """CUDA compute capability of a GPU."""
    multiprocessors: int | None = None
    """Streaming multiprocessors of a GPU; None if they are unknown."""
    cuda_libraries: bool = False
    """Whether torch is a CUDA build. This matters only for a run on a CPU."""
    own_fused: bool = False
    """Whether our fused functions are used, which keep fewer tensors for the backward.

    They compute adapters on 4- and 16-bit weights, gated MLPs, RMSNorm, and attention on a CPU
    (``training/fused``).
    """
    triton: bool = False
    """Whether Triton kernels compute norms, rotary positions and gated MLPs.

    The kernels are in ``training/fused/triton_kernels.py``.
    """
    expandable_segments: bool = True
    """Whether the allocator grows its segments (our trainer requests it), so that blocks are cut to size."""
    managed_memory: bool = True
    """Whether a paged optimizer keeps its states in CUDA's managed memory, outside torch's pool."""
    general_prompts: int = 0
    """Number of general prompts that are answered between steps, for the forgetting curve."""

    @property
    def residual_itemsize(self) -> int:
        """Return the bytes per element of the residual stream, norms, embedding and head."""
        return 4 if self.cast_to_float32 else self.compute_itemsize

    @property
    def loss_code(self) -> LossCode:
        """Return the variant of the stock loss in the version that runs."""
        if self.transformers >= _LABELS_SHIFTED:
            return "padded"
        return "shifted" if self.transformers >= _LOSS_FUNCTION else "rebound"

    @property
    def separate_experts(self) -> bool:
        """Return whether each expert's matrices are linear modules, which bitsandbytes quantizes."""
        return self.transformers < FUSED_EXPERTS

    @property
    def reads_in_threads(self) -> bool:
        """Return whether weights are read ahead while earlier ones are quantized."""
        first, end = _THREADED_READING
        return first <= self.transformers < end

    @property
    def pages_states(self) -> bool:
        """Return whether the optimizer's states are in managed memory, outside torch's pool."""
        return self.optimizer.startswith("paged") and self.device == "cuda" and self.managed_memory


def trainer_execution(
    recipe: Recipe, device: Device, architecture: Architecture | None = None
) -> ExecutionConfig:
    """Return the execution of this project's trainer.

    Norms, embedding and head are not cast to float32, and full logits exist only for classes that need them.
    Non-reentrant checkpointing covers every layer, even with ``auto``, unless the recipe turns it off or the
    class does not support it; set ``kept_layers`` separately. Without an architecture, Liger is assumed to be
    off, because it is slower than our loss for some models.
    """
    compute = _compute_itemsize(recipe, device)
    attention = _attention(recipe, device, compute)
    obstacle = flash_obstacle(
        cuda=device.kind == "cuda",
        compute_itemsize=compute,
        ampere=device.capability >= BFLOAT16_CAPABILITY,
        torch_has_varlen=device.varlen,
    )
    path = attention_path(recipe.model.attention, obstacle)
    float16 = compute == 2 and _is_float16(recipe, device)
    checkpointing = recipe.training.gradient_checkpointing
    if architecture is not None and architecture.keeps_activations:
        checkpointing = "off"
    return ExecutionConfig(
        compute_itemsize=compute,
        float16=float16,
        # This is Trainer's fp16 mode: autocast, with scaled gradients.
        autocast=float16 and device.kind == "cuda",
        own_fused=True,
        triton=device.triton and device.kind == "cuda" and recipe.model.kernels == "auto",
        loss=_loss(recipe, device, architecture, float16=float16),
        checkpointing=checkpointing != "off",
        offloads_inputs=checkpointing == "offload" and device.kind == "cuda",
        streamed_layers=recipe.quantization.streamed_layers,
        attention=attention,
        optimizer=_OPTIMIZERS.get(recipe.training.optimizer, recipe.training.optimizer),
        # DDP's buckets keep the memory of gradients that are cleared (``gradient_as_bucket_view``).
        accumulates=recipe.training.gradient_accumulation > 1 or recipe.training.gpus != 1,
        packing=recipe.data.packing,
        segments=path != "eager",
        varlen=path == "varlen",
        device=device.kind,
        capability=device.capability,
        multiprocessors=device.multiprocessors,
        cuda_libraries=device.cuda_libraries,
        expandable_segments=device.expandable_segments,
        managed_memory=device.managed_memory,
        general_prompts=recipe.training.general_prompts,
    )


def _loss(recipe: Recipe, device: Device, architecture: Architecture | None, *, float16: bool) -> Loss:
    if architecture is not None and architecture.whole_logits:
        return "stock"
    # Liger would keep float16 gradients in 16 bits.
    return "liger" if device.liger and not float16 and _liger_pays(recipe, architecture) else "chunked"


def flash_obstacle(
    *, cuda: bool, compute_itemsize: int, ampere: bool, torch_has_varlen: bool
) -> FlashObstacle | None:
    """Return what prevents FlashAttention on a packed sequence in one call; None if nothing does."""
    if not cuda:
        return "no GPU"
    if compute_itemsize != 2:
        return "float32"
    if not ampere:
        return "old GPU"
    return None if torch_has_varlen else "old torch"


def flash_trains(capability: tuple[int, int], head_dim: int) -> bool:
    """Return whether FlashAttention has a backward for heads of this width, on an Ampere or newer GPU.

    Some widths do not fit in the shared memory of consumer cards, and torch refuses to train them
    (``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`` in ``sdp_utils.cpp``); its
    varlen function does not check.
    """
    consumer = any(first <= capability <= last for first, last in CONSUMER_CAPABILITIES)
    return not (consumer and 192 < head_dim <= 224)


def accumulator_width(head_dim: int) -> int:
    """Return the width of a head in the sums of the varlen kernel's backward (``head_size_rounded``)."""
    multiple = 32 if head_dim <= 128 else 64
    return -(-head_dim // multiple) * multiple


def attention_path(attention: str, obstacle: FlashObstacle | None) -> AttentionPath:
    """Return the attention path for ``model.attention``.

    The trainer tries this path first, and the estimate assumes it.
    """
    if attention == "eager":
        return "eager"
    return "segments" if attention == "sdpa" or obstacle else "varlen"


def liger_rows(tokens: int, hidden: int, vocabulary: int) -> int:
    """Return the rows of logits that Liger computes at a time (``fused_linear_cross_entropy.py``)."""
    rows = -(-tokens // -(-vocabulary // hidden))
    return min(1 << (rows - 1).bit_length(), tokens)


def _liger_pays(recipe: Recipe, architecture: Architecture | None) -> bool:
    """Return whether Liger's chunks have enough rows for its loss to be as fast as ours.

    Liger reads the head (about 1 GB for 7B) twice per chunk. It supports neither a trained head or trained
    rows of it, nor preference methods, which need the loss of each token. False also without an architecture.
    """
    lora = recipe.lora
    if architecture is None or lora.trainable_tokens or lora.train_embeddings:
        return False
    if recipe.preference_method is not None:
        return False
    tokens = recipe.rows_per_pass * recipe.data.max_length
    return liger_rows(tokens, architecture.hidden_size, architecture.vocab_size) >= LOSS_CHUNK_ROWS


def _compute_itemsize(recipe: Recipe, device: Device) -> int:
    compute_dtype = recipe.quantization.compute_dtype
    if compute_dtype == "float32":
        return 4
    if compute_dtype == "auto" and device.kind == "cpu" and not device.native_bfloat16:
        return 4
    return 2


def _is_float16(recipe: Recipe, device: Device) -> bool:
    compute_dtype = recipe.quantization.compute_dtype
    old_gpu = device.kind == "cuda" and device.capability < BFLOAT16_CAPABILITY
    return compute_dtype == "float16" or (compute_dtype == "auto" and old_gpu)


def _attention(recipe: Recipe, device: Device, compute: int) -> Kernel:
    """Return the attention kernel.

    It is eager if the recipe requests it. A GPU that is older than Ampere, or that computes in float32, uses
    SDPA's memory-efficient kernel. Otherwise it is flash.
    """
    if recipe.model.attention == "eager":
        return "eager"
    if device.kind == "cuda" and (compute == 4 or device.capability < BFLOAT16_CAPABILITY):
        return "efficient"
    return "flash"
