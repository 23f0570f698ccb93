"""A training step on torch's ``meta`` device with every storage recorded: the exact form of the estimate.

Nothing is computed and no weight is read, but the code is real: transformers' model, peft's adapter,
bitsandbytes' 4-bit product, this project's loss and attention. :mod:`.recorder` records allocations and
frees, :mod:`.device_kernels` selects kernels as on the device of the run, and
:mod:`qlora_tui.memory.recording` replays loading and two such steps in the allocator.
:mod:`qlora_tui.runs.exact_memory` calls :func:`trace` in a child process.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from typing import Any, NamedTuple

import torch
from msgspec import structs
from torch import Tensor, nn

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.engine.device_kernels import kernels_of
from qlora_tui.engine.recorder import MOST_OPERATIONS, StorageRecorder, TooManyOperations
from qlora_tui.engine.repeated_layers import (
    Repetition,
    find_repetition,
    layer_kinds,
    repeat_step,
    shortened,
)
from qlora_tui.engine.traced_model import build, frozen_items
from qlora_tui.errors import UserError
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE
from qlora_tui.memory.loading import LoadedWeight
from qlora_tui.memory.recording import (
    MicroStep,
    StepTrace,
    optimizer_moment,
    run_pool,
    step_moments,
)
from qlora_tui.memory.static_memory import CUBLAS_HANDLES, state_sizes, workspace_bytes
from qlora_tui.memory.weights import (
    SLOTS,
    moves,
    round_to_block,
    streamed_weights,
)
from qlora_tui.runs.exact_memory import TraceRequest
from qlora_tui.training import packed_attention
from qlora_tui.training.description import architecture_of
from qlora_tui.training.model_class import checkpointing_layers, reason_of

INDEX_BYTES = 8
BATCH_TENSORS = 4
"""Number of tensors in a micro-batch, each with one integer per token: ids, labels, shifted labels and
positions.
"""


def trace(request: TraceRequest) -> StepTrace:
    """Trace a step. Raises UserError if the libraries cannot build the model or run it without values, or if
    the step has too many operations.
    """
    try:
        with faster_imports():
            import peft  # noqa: F401
        return trace_request(request)
    except TooManyOperations as error:
        length = request.recipe.data.max_length
        raise _untraced(
            f"A step of {length:,} tokens has more than {MOST_OPERATIONS:,} operations",
            "The model's layers loop over tokens, or over very many experts, in Python.",
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise _untraced(
            f"The model's code fails on tensors without values ({reason_of(error)})",
            f"transformers {version('transformers')} cannot run this model without its weights.",
        ) from error


def _untraced(what: str, why: str) -> UserError:
    return UserError(
        "The step could not be traced",
        what=f"{what}.",
        why=why,
        fix="Use the estimate without a trace; its range is wider.",
    )


@dataclass(frozen=True)
class Recorded:
    """Allocations of a model without weights."""

    weights: tuple[LoadedWeight, ...]
    """The frozen weights, in the order of the model."""
    frozen: Counter[str]
    """Bytes of the frozen weights by item."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each trained tensor."""
    steps: tuple[MicroStep, ...]
    """The first micro-step and, with gradient accumulation, one that adds to its gradients."""
    mixers: tuple[str, ...]
    """Classes of recurrent layers with a convolution, for which a GPU has other kernels."""


def record(request: TraceRequest) -> Recorded:
    r"""Build the model and run one or two micro-steps. Equal layers are built only as often as necessary.

    If this fails, padded sequences are tried with each of ``_PADDED_WAYS``. The last error is raised if none
    works.
    """
    gc.collect()
    gc.freeze()  # Exclude existing objects from later collections.
    padded = structs.replace(request, execution=replace(request.execution, segments=False, varlen=False))
    last: Exception | None = None
    with kernels_of(request.execution):
        for tried, way in ((request, _Way()), *((padded, way) for way in _PADDED_WAYS)):
            try:
                return _record_layers(tried, way)
            except (RuntimeError, ValueError) as error:
                last = error
    assert last is not None
    raise last


class _Way(NamedTuple):
    """Options for running a model."""

    input_gradients: bool = True
    """Whether the embeddings' outputs get gradients. False for a model that changes these outputs in
    place; for such a model, the trainer does not request gradients either (``training/checks/base.py``)."""
    mask_device: str = "cpu"
    """Device of the attention mask of a padded batch. On ``cpu``, a model's code can check the values of the
    mask. Code that multiplies by the mask, as Mamba's does, needs ``meta``.
    """


_PADDED_WAYS = (_Way(), _Way(mask_device="meta"), _Way(input_gradients=False))
"""Options, in order of trial, for a model that does not support several samples per sequence."""


def _record_layers(request: TraceRequest, way: _Way) -> Recorded:
    architecture = architecture_of(request.config)
    repetition = None
    if not request.execution.kept_layers:
        repetition = find_repetition(layer_kinds(request.config, architecture, request.recipe))
    recorded = None
    if repetition is not None:
        try:
            config = shortened(request.config, repetition.built)
            short = structs.replace(request, config=config)
            recorded = _record(short, architecture_of(config), repetition, way)
        except TooManyOperations:
            raise
        except Exception:  # settings of single layers name layers that are left out
            recorded = None
    recorded = recorded or _record(request, architecture, None, way)
    assert recorded is not None
    return recorded


def _record(
    request: TraceRequest, architecture: Architecture, repetition: Repetition | None, way: _Way
) -> Recorded | None:
    """Record a model; return None if the allocations of its layers do not repeat."""
    model, weights = build(request, architecture)
    base = model.get_base_model()
    if not way.input_gradients:
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.detach())
    elif request.execution.own_fused:
        base.enable_input_require_grads()
    model.train()
    layers, count = checkpointing_layers(model.get_base_model()), 2 if request.execution.accumulates else 1
    numbers = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    prefixes = [f"{names[id(layer)]}." for layer in layers]
    trained = [
        _Trained(name, id(p), tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad
    ]
    layer_of_copy = {each.id: _layer_in(each.name, prefixes) for each in trained}
    steps = [record_micro_step(model, request, layer_of_copy, way.mask_device) for _ in range(count)]
    frozen = Counter[str]()
    for module, items in frozen_items(model):
        is_repeated = repetition is not None and repetition.repeats(numbers.get(id(module)))
        for _ in range(repetition.times + 1 if is_repeated and repetition is not None else 1):
            frozen.update(items)
    shapes = [(_layer_in(each.name, prefixes), each.shape) for each in trained]
    if repetition is not None:
        if len(layers) != repetition.built:
            return None
        repeated = [repeat_step(step, repetition) for step in steps]
        steps = [step for step in repeated if step is not None]
        if len(steps) < count:
            return None
        weights = tuple(_weights_of_all(weights, prefixes, repetition))
        shapes = repetition.spread(shapes, lambda each: each[0], lambda each, layer: (layer, each[1]))
    mixers = {
        type(module).__name__
        for layer in layers
        for module in layer.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    }
    return Recorded(
        weights,
        frozen,
        tuple(shape for _, shape in shapes),
        tuple(steps),
        tuple(sorted(mixers)),
    )


class _Trained(NamedTuple):
    name: str
    id: int
    shape: tuple[int, ...]


def _layer_in(name: str, prefixes: Sequence[str]) -> int | None:
    """Return the index of the layer whose parameter has this name; None if it is outside the layers."""
    return next((layer for layer, prefix in enumerate(prefixes) if prefix in name), None)


def _weights_of_all(
    weights: Sequence[LoadedWeight], prefixes: Sequence[str], repetition: Repetition
) -> list[LoadedWeight]:
    """Return the weights of the whole model."""
    parent = prefixes[0][:-1].rpartition(".")[0]

    def moved(weight: LoadedWeight, layer: int) -> LoadedWeight:
        built = _layer_in(weight.name, prefixes)
        assert built is not None
        return replace(weight, name=f"{parent}.{layer}.{weight.name[len(prefixes[built]) :]}")

    return repetition.spread(weights, lambda weight: _layer_in(weight.name, prefixes), moved)


def record_micro_step(
    model: Any, request: TraceRequest, layer_of_copy: Mapping[int, int | None], mask_device: str = "cpu"
) -> MicroStep:
    """Record forward and backward of one micro-batch. The gradients stay with the model's parameters."""
    execution, recipe = request.execution, request.recipe
    is_packed = packed_attention.packed_attention_of(model.get_base_model()) is not None
    batch = _inputs(request, None if is_packed else mask_device)
    before = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    recorder = StorageRecorder(_vocabulary(model), recipe.data.max_length)
    hooks = _mark_layers(model, recorder, checkpointing=execution.checkpointing)
    with recorder:
        with torch.autocast("cuda", enabled=execution.autocast):
            output = model(**batch)
        loss = output.loss.sum()
        if not execution.logits_alive_in_backward:
            del output
        gc.collect()
        backward_at = len(recorder.events)
        recorder.mark("loss", "loss backward")
        if not hooks:
            recorder.mark("backward", "backward")
        loss.backward()
        output = loss = None
    for hook in hooks:
        hook.remove()
    gradients = set()
    for parameter in model.parameters():
        if parameter.grad is not None and id(parameter) not in before:
            # Gradients that were computed together are rows of one tensor.
            recorder.relabel(parameter.grad, "gradients")
            gradients.add(recorder.number_of(parameter.grad))
    step = MicroStep(
        tuple(recorder.events),
        recorder.items,
        tuple(recorder.marks),
        backward_at,
        frozenset(gradients),
        {
            number: layer
            for number, source in recorder.copied_from.items()
            if (layer := layer_of_copy.get(source)) is not None
        },
    )
    for number in step.lasting - step.gradients:
        recorder.items[number] = "adapter"  # copies of the adapter in the compute dtype
    return step


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _mark_layers(model: Any, recorder: StorageRecorder, *, checkpointing: bool) -> list[Any]:
    """Record where each layer's forward and backward begin, and where the loss begins."""
    layers = checkpointing_layers(model.get_base_model())
    hooks = []
    state = {"forward": True}

    def before_forward(index: int, args: Any, kwargs: Any) -> None:
        if not state["forward"]:
            return
        recorder.mark("forward", f"forward of layer {index}")
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if checkpointing and hidden is not None:
            recorder.relabel(hidden, "checkpoints")

    def after_forward(index: int, output: Any) -> None:
        if not state["forward"]:
            return
        if index == len(layers) - 1:
            recorder.mark("loss", "loss forward")
        hidden = output if isinstance(output, Tensor) else output[0]

        def before_backward(gradient: Tensor) -> None:
            state["forward"] = False
            recorder.mark("backward", f"backward of layer {index}")

        if hidden.requires_grad:
            hidden.register_hook(before_backward)

    for index, layer in enumerate(layers):
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: before_forward(index, args, kwargs),
                with_kwargs=True,
            )
        )
        hooks.append(
            layer.register_forward_hook(
                lambda module, args, output, index=index: after_forward(index, output)
            )
        )
    recorder.mark("forward", "forward of the embedding")
    return hooks


def trace_request(request: TraceRequest) -> StepTrace:
    """Build the model on ``meta``, run a step, and replay its allocations in the allocator."""
    recorded = record(request)
    recipe, execution, shapes = request.recipe, request.execution, recorded.shapes
    architecture = architecture_of(request.config)
    inputs = [round_to_block(recipe.rows_per_pass * recipe.data.max_length * INDEX_BYTES)] * BATCH_TENSORS
    adapters = 2 if recipe.keeps_starting_adapter else 1
    resident = Counter(recorded.frozen)
    slots: list[int] = []
    streamed = streamed_weights(recipe, architecture_of(request.config), execution)
    if streamed is not None:
        count = min(SLOTS, len(streamed.indices))
        slots = [streamed.slot_bytes // count] * count
        resident["slots"] = streamed.slot_bytes
        if execution.device == "cuda":  # On a CPU, host memory is the memory of the device.
            resident.subtract(streamed.items)
    resident["adapter"] = adapters * sum(round_to_block(prod(shape) * ADAPTER_ITEMSIZE) for shape in shapes)
    resident["inputs"] = sum(inputs)
    if not execution.pages_states:
        states = (size for shape in shapes for size in state_sizes(shape, execution))
        resident["optimizer"] = sum(map(round_to_block, states))
    pool = None
    if execution.device == "cuda":
        resident["workspace"] = CUBLAS_HANDLES * workspace_bytes(execution)
        in_host_memory = moves(architecture, recipe)
        pool = run_pool(
            [weight for weight in recorded.weights if weight.name not in in_host_memory],
            recorded.steps,
            shapes,
            inputs,
            execution,
            adapters=adapters,
            slot_sizes=slots,
            room_bytes=request.room_bytes,
        )
    copies = recorded.steps[0].lasting_items["adapter"]
    return StepTrace(
        transformers=version("transformers"),
        resident=dict(+resident),
        moments=(*step_moments(recorded.steps), optimizer_moment(shapes, copies, execution)),
        pool=pool,
        uncertain=recorded.mixers,
    )


def _inputs(request: TraceRequest, mask_device: str | None) -> dict[str, Any]:
    """Build one micro-batch with every token in the loss.

    ``mask_device`` is the device of the mask of a padded batch; None packs all samples into one sequence.
    """
    recipe, execution = request.recipe, request.execution
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    shape = (rows, length) if mask_device else (1, rows * length)
    chunked = execution.own_fused and execution.loss != "stock"
    # The positions in the loss are determined on the CPU.
    labels = torch.zeros(shape, dtype=torch.long, device="cpu" if chunked else "meta")
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device="meta"),
        "labels": labels,
    }
    if recipe.preference_method is not None:
        batch |= {"per_token": True, "loss_positions": torch.arange(labels.numel() - 1)}
    if mask_device:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long, device=mask_device)
    else:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.long, device="meta")
        batch["segments"] = [length] * rows
    return batch
