"""The label of each item, and a sentence with the formula of its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tui.formatting import format_bytes
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE, LOSS_BLOCK_ROWS, LOSS_CHUNK_ROWS, ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.levels import TOKENIZER_BYTES_PER_TOKEN
from qlora_tui.memory.weights import expert_method, quantizes
from qlora_tui.recipe.fields import format_value
from qlora_tui.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_tui.memory.estimate import Verdict
    from qlora_tui.memory.step_choice import StepChoice

INSTANT = "~"
"""Prefix of an estimate that is calculated from formulas. An estimate from a traced step has no prefix."""
LABELS: dict[str, str] = {
    "weights": "Quantized weights",
    "scales": "Quantization scales",
    "linear": "Unquantized linear",
    "embedding": "Embedding",
    "head": "Output head",
    "norms": "Other weights",
    "experts": "Experts",
    "vision": "Vision tower",
    "slots": "Streamed layers",
    "adapter": "LoRA weights",
    "gradients": "Gradients",
    "optimizer": "Optimizer states",
    "optimizer_step": "Optimizer workspace",
    "checkpoints": "Layer inputs kept",
    "activations": "Activations of a layer",
    "adapter_inputs": "LoRA inputs",
    "int8_inputs": "int8 inputs kept",
    "dropout": "Dropout",
    "scores": "Attention scores",
    "mask": "Attention mask",
    "dequantized": "Dequantized weight",
    "hidden_gradient": "Loss gradient",
    "logits": "Logits and loss",
    "inputs": "Batch and positions",
    "kv_cache": "General answers",
    "loading": "Loading the weights",
    "workspace": "cuBLAS workspace",
    "unsplit": "Unsplit blocks",
    "kernels": "oneDNN kernels",
    "fragmentation": "Allocator slack",
    "context": "CUDA context",
    "tokenizer": "Tokenizer",
    "runtime": "Python and libraries",
}
"""Label of each item, in the order of the stacked bar."""


def verdict_word(verdict: Verdict, *, can_train: bool = True) -> str:
    """Return the verdict's word. ``fits`` becomes ``would fit`` for a model that cannot be trained."""
    return "would fit" if verdict.word == "fits" and not can_train else verdict.word


def fit_texts(verdict: Verdict, place: str = "", *, can_train: bool = True) -> tuple[str, ...]:
    """Return four wordings of a verdict with its figures, from the most detailed one, such as
    ``fits: uses ~9.5 of 12.0 GiB (RTX 3060), needs at least 6.4``, to the shortest one, such as
    ``fits: uses ~9.5 of 12.0 GiB``. The second one lacks only the device, and the third one only the minimum.

    Args:
        verdict: The verdict. The first figure is the memory that a run will use. If this memory is unknown,
            or if the recipe is not certain to fit, the first figure is the memory that a run needs at least.
        place: Name of the device with the available memory; empty to leave it out.
        can_train: Whether the model can be trained.
    """
    total = format_bytes(verdict.available_bytes)
    unit = f" {total.rpartition(' ')[2]}"
    needed, used = (format_bytes(size) for size in (verdict.needed_bytes, verdict.used_bytes))
    least = f"{'' if verdict.is_exact else INSTANT}{needed.removesuffix(unit)}"
    figure, at_least, verb = least, "", "needs"
    if verdict.used_bytes and verdict.fits_even_if_tight:
        verb = "uses"
        if used != needed:
            figure, at_least = f"{INSTANT}{used.removesuffix(unit)}", f", needs at least {least}"
    sizes = f"{figure} of {total}"
    word, where = verdict_word(verdict, can_train=can_train), f" ({place})" if place else ""
    return (
        f"{word}: {verb} {sizes}{where}{at_least}",
        f"{word}: {verb} {sizes}{at_least}",
        f"{word}: {verb} {sizes}{where}",
        f"{word}: {verb} {sizes}",
    )


def describe_choice(choice: StepChoice) -> str:
    """Return a phrase for each choice by which a run uses free memory; empty if there is no such choice."""
    recipe, training, words = choice.given, choice.recipe.training, []
    if training.micro_batch_size != recipe.training.micro_batch_size:
        split = f"{training.micro_batch_size} × {training.gradient_accumulation}"
        words.append(f"batch {recipe.effective_batch} = {split}")
    if recipe.training.optimizer == "auto" and training.optimizer == "adamw":
        words.append("optimizer states in 32 bits")
    if choice.kept and choice.kept_layers:
        words.append(f"{choice.kept_layers} of {choice.kept.total_layers} layers not recomputed")
    return ", ".join(words)


def describe_speedup(speedup: float) -> str:
    """Return ``33% faster``, or ``2.5 times as fast`` if the speed at least doubles."""
    return f"{speedup - 1:.0%} faster" if speedup < 2 else f"{speedup:.1f} times as fast"


def explanations(layout: Layout) -> dict[str, str]:
    """Return a sentence for each item, with the formula in this recipe's numbers."""
    return {
        **_weight_sentences(layout),
        **_training_sentences(layout),
        **_activation_sentences(layout),
        **_process_sentences(layout),
    }


def _weight_sentences(layout: Layout) -> dict[str, str]:
    recipe, architecture, execution = layout.recipe, layout.architecture, layout.execution
    itemsize = execution.residual_itemsize
    int8 = recipe.quantization.method == "int8"
    quantized = sum(m.weight_params for m in architecture.modules if quantizes(recipe.quantization, m))
    return {
        "weights": f"{_n(quantized)} linear weights × {1 if int8 else 0.5} byte.",
        "scales": _scales_sentence(recipe),
        "linear": f"Linear weights and biases that stay unquantized × {itemsize} bytes.",
        "embedding": f"{_n(architecture.embedding_params)} weights × {itemsize} bytes; never quantized.",
        "head": (
            f"{architecture.vocab_size:,} × {architecture.hidden_size:,} × {itemsize} bytes; never quantized."
        ),
        "norms": "Norms, routers and other parameters, in their own dtype.",
        "experts": _experts_sentence(layout, itemsize),
        "slots": (
            "Two buffers, each as large as the largest of the "
            f"{min(execution.streamed_layers, architecture.layers)} layers whose weights wait in host memory."
        ),
        "vision": f"The vision tower's weights × {itemsize} bytes; frozen.",
    }


def _experts_sentence(layout: Layout, itemsize: int) -> str:
    recipe, architecture = layout.recipe, layout.architecture
    if expert_method(recipe, architecture, layout.execution) == "none":
        why = (
            "quantization.experts is off" if recipe.quantization.method in ("nf4", "fp4") else "not quantized"
        )
        return f"{_n(architecture.expert_params)} weights × {itemsize} bytes: fused parameters, {why}."
    matrices = sum(each.params for each in architecture.parameters if each.is_expert_matrices)
    return f"{_n(matrices)} weights × 0.5 byte, plus scales and biases; each expert is quantized separately."


def _scales_sentence(recipe: Recipe) -> str:
    if recipe.quantization.method == "int8":
        return "One 4-byte scale per output row."
    if recipe.quantization.double_quantization:
        return "One 1-byte scale per 64 weights, 4 bytes per 256 scales, and one code table per module."
    return (
        "One 4-byte scale per 64 weights, and one code table per module; double quantization reduces "
        "this to about a quarter."
    )


def _training_sentences(layout: Layout) -> dict[str, str]:
    execution, trained = layout.execution, _n(layout.adapter_parameters)
    match execution.optimizer:
        case "adafactor":
            moments = "The mean of the second moment for each row and each column of each matrix"
        case "lion_8bit":
            moments = f"One 8-bit moment and its scales: {trained} × about 1 byte"
        case "lion":
            moments = f"One 32-bit moment: {trained} × 4 bytes"
        case optimizer if "8bit" in optimizer:
            moments = f"Two 8-bit moments and their scales: {trained} × about 2 bytes"
        case _:
            moments = f"Two 32-bit moments: {trained} × 8 bytes"
    paged = ", in managed memory that can move to the host" if execution.pages_states else ""
    start = (
        ", twice, because the adapter that it starts from is kept too"
        if layout.recipe.keeps_starting_adapter
        else ""
    )
    return {
        "adapter": (
            f"{trained} trained parameters × {ADAPTER_ITEMSIZE} bytes{_copies(execution)}{start}: "
            f"rank {_ranks(layout.recipe)} × (in + out) per target{_vocabulary(layout)}."
        ),
        "gradients": f"One gradient per trained parameter: {trained} × {ADAPTER_ITEMSIZE} bytes."
        + (" With several GPUs they stay in the buckets of DDP." if layout.recipe.training.gpus != 1 else ""),
        "optimizer": f"{moments}{paged}.",
        "optimizer_step": "Square roots of all second moments at once: 4 bytes per trained parameter."
        if execution.optimizer == "adamw"
        else "Copies of the matrix that is being updated, one matrix at a time.",
    }


def _copies(execution: ExecutionConfig) -> str:
    """Return a description of the LoRA weights' copies in the compute dtype; empty if there are none."""
    has_copies = execution.own_fused and execution.compute_itemsize < ADAPTER_ITEMSIZE
    return f", and {execution.compute_itemsize} for a copy in 16 bits" if has_copies else ""


def _activation_sentences(layout: Layout) -> dict[str, str]:
    execution, layers = layout.execution, layout.architecture.layers
    tokens, hidden = f"{layout.tokens:,} tokens", f"{layout.hidden:,}"
    compute, adapter = execution.compute_itemsize, ADAPTER_ITEMSIZE
    stream = 4 if execution.cast_to_float32 else compute
    return {
        "checkpoints": (
            f"Two layer inputs in transit to or from host memory: 2 × {tokens} × {hidden} × {stream} bytes."
            if execution.offloads_inputs
            else f"One hidden state per layer, to recompute from: {layers} × {tokens} × {hidden} × "
            f"{stream} bytes."
        ),
        "activations": (
            f"Activations of one layer while it is recomputed and differentiated: {tokens} × its widths."
            if execution.checkpointing
            else f"Tensors that all {layers} layers save for the backward pass: {tokens} × their widths."
        ),
        "adapter_inputs": (
            f"Intermediate results between an adapter's two matrices: {tokens} × rank × {compute} bytes."
            if execution.own_fused
            else f"A target's input in the adapter's dtype: {tokens} × width × {adapter} bytes."
        ),
        "int8_inputs": f"The int8 product keeps its input, which is not recomputed: {tokens} × width.",
        "dropout": (
            f"The dropout mask of each target's input: {tokens} × width × 1 byte."
            if execution.own_fused
            else f"A copy of each target's input after dropout, and the dropout mask: {tokens} × width."
        ),
        "scores": (
            f"Attention scores held in full: {layout.rows} × {layout.architecture.heads} heads × "
            f"{layout.length:,}² scores per matrix, several at a time."
        ),
        "mask": f"Attention mask: {layout.length:,}² elements.",
        "dequantized": f"One weight at a time, dequantized to {compute} bytes per element.",
        "hidden_gradient": (
            f"Hidden states at the positions in the loss, and their gradients: 2 × {tokens} × {hidden}."
        ),
        "logits": _logits_sentence(layout),
    }


def _logits_sentence(layout: Layout) -> str:
    execution = layout.execution
    vocabulary = f"{layout.vocabulary:,}"
    if execution.loss == "chunked":
        rows = min(LOSS_CHUNK_ROWS, layout.tokens)
        return (
            f"{rows:,} positions at a time: "
            f"{rows:,} × {vocabulary} logits × {execution.compute_itemsize} bytes, "
            f"{min(LOSS_BLOCK_ROWS[execution.device], rows)} of these positions in 32 bits."
        )
    if execution.loss == "liger":
        return f"Liger processes some rows at a time, {vocabulary} logits per row."
    return (
        f"All logits at once, in 32 bits, with log-softmax and gradients: "
        f"{layout.tokens:,} × {vocabulary} × 12 to 16 bytes."
    )


def _process_sentences(layout: Layout) -> dict[str, str]:
    tokens = layout.architecture.vocab_size
    return {
        "kv_cache": (
            f"Keys and values of {layout.execution.general_prompts} general prompts, answered between steps."
        ),
        "inputs": "Token ids, labels, positions and rotary tables.",
        "loading": (
            "Memory for loading, beyond that of a training step: 16-bit weights before they are quantized."
        ),
        "workspace": "cuBLAS keeps a workspace in the allocator's pool.",
        "unsplit": "Up to 1 MiB per tensor: without expandable segments, the allocator does not split off "
        "smaller remainders.",
        "kernels": "Code that oneDNN compiles and caches for each shape of a product.",
        "fragmentation": (
            "Memory of the allocator in addition to the tensors: free blocks too small for the next tensor, "
            + (
                "which remain after loading and two steps."
                if layout.execution.device == "cuda"
                else "mostly between the layer inputs that are kept."
            )
        ),
        "context": "The CUDA context and loaded kernels, outside torch's allocator.",
        "tokenizer": (
            f"{tokens:,} tokens × {TOKENIZER_BYTES_PER_TOKEN} bytes: vocabulary twice, merges, and the file."
        ),
        "runtime": "The process before the model is loaded: Python, torch, transformers, peft, bitsandbytes.",
    }


def _ranks(recipe: Recipe) -> str:
    own = format_value(recipe.lora.rank_pattern)
    return f"{recipe.lora.rank} ({own})" if recipe.lora.rank_pattern else f"{recipe.lora.rank}"


def _vocabulary(layout: Layout) -> str:
    """Return a description of the trained part of embedding and head."""
    where = "embedding and head" if layout.own_head else "embedding"
    if layout.trained_matrix:
        return f", and all {_n(layout.trained_matrix * (1 + layout.own_head))} weights of {where}"
    return f", and {layout.token_rows} rows of {where}" if layout.token_rows else ""


def _n(count: int) -> str:
    for size, suffix in ((10**9, " billion"), (10**6, " million")):
        if count >= size:
            return f"{count / size:.2f}{suffix}"
    return f"{count:,}"
