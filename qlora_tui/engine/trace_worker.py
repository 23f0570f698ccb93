"""A training step run on torch's ``meta`` device with every storage counted: a reference for the estimate.

Nothing is computed and no weight is read, but the code is the real one: transformers' model, peft's adapter,
bitsandbytes' 4-bit product, this project's loss and attention. A dispatch mode sees each tensor created, and
a weak reference reports when its storage is freed, so the peak follows from actual lifetimes.

Where torch chooses an implementation by device, ``meta`` would take a slower path than a GPU.
:func:`_kernels_of` makes the GPU's choices instead (fused attention, fused dropout, one-pass softmax).

:func:`trace` is a job, which :mod:`qlora_tui.engine.trace_client` starts.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.engine.trace_client import TraceRequest
from qlora_tui.errors import UserError, first_line
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.memory.execution import LOSS_BLOCK_ROWS
from qlora_tui.memory.step import StepTrace
from qlora_tui.memory.weights import quantized_experts
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import packed_attention


def trace(request: TraceRequest) -> StepTrace:
    """Do the job. Raises UserError for a model that the libraries cannot build."""
    try:
        with faster_imports():
            import peft  # noqa: F401
        return trace_request(request)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(
            "The step could not be traced",
            what=f"{type(error).__name__}: {first_line(error)}",
            why=f"transformers {version('transformers')} cannot run this model without its weights.",
            fix="The estimate without a trace is still valid.",
        ) from error


def trace_request(request: TraceRequest) -> StepTrace:
    """Build the model on ``meta``, run one forward and backward, and count its memory."""
    architecture = parse_architecture(request.config)
    dtype = getattr(torch, request.dtype)
    model, padding_free = _build(request, architecture, dtype)
    frozen = sum(_size(p.untyped_storage()) for p in model.parameters() if not p.requires_grad)
    frozen += _scale_bytes(model)
    adapter = sum(_size(p.untyped_storage()) for p in model.parameters() if p.requires_grad)
    batch = _inputs(request, padding_free=padding_free)
    model.train()
    with _kernels_of(request.device), StorageCounter() as counter:
        if request.recipe.training.gradient_accumulation > 1:
            model(**batch).loss.sum().backward()
            counter.restart()
        loss = model(**batch).loss.sum()
        forward_bytes, kept_bytes = counter.peak_bytes, counter.live_bytes
        counter.restart()
        loss.backward()
    # In float32, gradients that were computed together are the rows of one tensor.
    storages = (p.grad.untyped_storage() for p in model.parameters() if p.grad is not None)
    gradients = sum({storage._cdata: _size(storage) for storage in storages}.values())
    return StepTrace(
        parameter_bytes=frozen,
        adapter_bytes=adapter,
        forward_bytes=forward_bytes,
        backward_bytes=counter.peak_bytes,
        gradient_bytes=gradients,
        kept_bytes=kept_bytes,
    )


def _build(request: TraceRequest, architecture: Architecture, dtype: torch.dtype) -> tuple[Any, bool]:
    """Build the trainer's model without weights; also return whether packed samples are isolated."""
    from qlora_tui.training import model as model_loading
    from qlora_tui.training.adapter import add_lora
    from qlora_tui.training.experts.routing import replace_experts
    from qlora_tui.training.loss import find_head, use_loss
    from qlora_tui.training.model_class import build_on_meta

    recipe = request.recipe
    attention = "eager" if recipe.model.attention == "eager" else "sdpa"
    model = build_on_meta(request.config, dtype=dtype, attention=attention)
    if recipe.quantization.method in ("nf4", "fp4"):
        _quantize(model, recipe, architecture, dtype)
        if quantized_experts(recipe.quantization, architecture) != "none":
            replace_experts(model, recipe.quantization.method, nested=recipe.quantization.double_quantization)
    model_loading.freeze(model)
    segments = attention != "eager" and packed_attention.use_packed_attention(
        model, "varlen" if request.varlen else "segments"
    )
    if recipe.training.gradient_checkpointing != "off":
        model_loading.checkpoint_activations(model, preserve_rng_state=False)
    model.enable_input_require_grads()
    is_chunked = request.loss == "chunked" or recipe.preference_method is not None
    use_loss(model, find_head(model) if is_chunked else "the stock loss is traced")
    with torch.device("meta"):
        return add_lora(
            model, recipe.lora, architecture, range(len(set(recipe.lora.trainable_tokens)))
        ), segments


def _inputs(request: TraceRequest, *, padding_free: bool) -> dict[str, Any]:
    """Build one micro-batch with every token in the loss, packed into one sequence where possible."""
    recipe = request.recipe
    rows, length = recipe.rows_per_pass, recipe.data.max_length
    shape = (1, rows * length) if padding_free else (rows, length)
    labels = torch.zeros(shape, dtype=torch.long, device="cpu" if request.loss == "chunked" else "meta")
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device="meta"),
        "labels": labels,
    }
    if recipe.preference_method is not None:
        batch |= {"per_token": True, "loss_positions": torch.arange(labels.numel() - 1)}
    if padding_free:
        batch["position_ids"] = torch.zeros(shape, dtype=torch.long, device="meta")
        batch["segments"] = [length] * rows
    else:
        # On the CPU, where transformers can read it and find nothing masked.
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return batch


def _quantize(model: nn.Module, recipe: Recipe, architecture: Architecture, dtype: torch.dtype) -> None:
    """Insert bitsandbytes modules with packed weights and scales of the right sizes but no values."""
    from bitsandbytes import functional as quantization
    from bitsandbytes.nn import Linear4bit, Params4bit

    method, nested = recipe.quantization.method, recipe.quantization.double_quantization
    for module in architecture.modules:
        if not module.quantizable:
            continue
        parent, _, leaf = module.name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:  # text model extracted from a multimodal one
            continue
        layer = Linear4bit(
            module.in_features, module.out_features, bias=module.bias, compute_dtype=dtype, device="meta"
        )
        count = module.weight_params
        blocks = -(-count // 64)
        inner = None
        if nested:
            inner = quantization.QuantState(
                absmax=torch.empty(-(-blocks // 256), device="meta"),
                code=torch.empty(256, device="meta"),
                blocksize=256,
                dtype=torch.float32,
            )
        state = quantization.QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"),
            shape=torch.Size((module.out_features, module.in_features)),
            code=torch.empty(16, device="meta"),
            blocksize=64,
            quant_type=method,
            dtype=dtype,
            offset=torch.empty((), device="meta") if nested else None,
            state2=inner,
        )
        layer.weight = Params4bit(
            torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta"),
            requires_grad=False,
            quant_state=state,
            quant_type=method,
            compress_statistics=nested,
            bnb_quantized=True,
        )
        layer.quant_state = state
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        setattr(holder, leaf, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft goes by


def _scale_bytes(model: nn.Module) -> int:
    from qlora_tui.training.experts.routing import experts_4bit

    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for tensor in (state.absmax, state.code, getattr(state, "offset", None)):
                total += _size(tensor.untyped_storage()) if isinstance(tensor, Tensor) else 0
            state = getattr(state, "state2", None)
    scales = (buffer for _, experts in experts_4bit(model) for buffer in experts.buffers())
    return total + sum(_size(buffer.untyped_storage()) for buffer in scales)


def _size(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // 512) * 512


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts storages created under this mode until they are freed; earlier ones do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def restart(self) -> None:
        """Reset the peak to the bytes that are allocated now."""
        gc.collect()
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor) and given.untyped_storage()._cdata not in self._known:
                self._watch(given, 0)
        workspace = self._workspace(func, args)
        result = func(*args, **(kwargs or {}))
        for output in tree_iter(result):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in self._known:
                self._watch(output, _size(output.untyped_storage()))
        del workspace
        return result

    def _workspace(self, func: Any, args: Any) -> Tensor | None:
        """Return the workspace that a device's kernel allocates and the meta kernel does not.

        A 4-bit product dequantizes the weight; ``logsumexp`` takes the exponentials of all its input
        (``logsumexp_out_impl`` in aten/src/ATen/native/ReduceOps.cpp); a GPU's softmax backward multiplies
        gradient and result first (``softmax_backward_cuda_out`` in aten/src/ATen/native/cuda/SoftMax.cu).
        """
        name = str(func)
        if name.startswith("bitsandbytes.gemm_4bit"):
            workspace = torch.empty(args[2], dtype=args[0].dtype, device="meta")
        elif name.startswith(("aten.logsumexp", "aten._softmax_backward_data")):
            workspace = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        else:
            return None
        self._watch(workspace, _size(workspace.untyped_storage()))
        return workspace

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._on_freed, storage._cdata)

    def _on_freed(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key, 0)


@contextlib.contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Make torch's device-dependent choices those of ``device`` in the body of ``with``."""
    from qlora_tui.training import loss

    replacements: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", _attention),
        (torch, "autocast", _no_autocast),
        (loss, "block_rows", lambda _: LOSS_BLOCK_ROWS[device]),
    ]
    if device == "cuda":
        replacements += [
            (functional, "dropout", _dropout),
            (packed_attention, "supports", lambda query, value, samples: True),
            (packed_attention, "attend", _varlen_attention),
        ]
    else:
        row_attention = (packed_attention, "prefers_row_attention", lambda q: q.dtype == torch.bfloat16)
        replacements.append(row_attention)
    with contextlib.ExitStack() as undo:
        for owner, name, value in replacements:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


class _FusedAttention(torch.autograd.Function):
    """Memory of FlashAttention: saves q, k, v, its output and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[-1])).transpose(
            1, 2
        )
        row_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, row_sums = ctx.saved_tensors
        delta = torch.empty_like(row_sums)
        sums = query.new_empty(query.shape, dtype=torch.float32) if query.element_size() == 2 else None
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        if query.shape[1] != key.shape[1]:
            spread = torch.empty_like(query), query.new_empty((*query.shape[:3], value.shape[-1]))
            del spread
        del delta, sums
        return gradients


_unfused_attention = functional.scaled_dot_product_attention
"""torch's own, which on ``meta`` is decomposed as in its fallback on a GPU."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.shape[1] != key.shape[1] and not kwargs.get("enable_gqa"):
        return _unfused_attention(query, key, value, *args, **kwargs)  # no fused kernel broadcasts heads
    attended: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch's own
    return attended


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    attended: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch's own
    return attended.transpose(1, 2)


def _no_autocast(*args: Any, **kwargs: Any) -> contextlib.nullcontext[None]:
    """Replace autocast: the meta device has none, and the traced path uses none."""
    return contextlib.nullcontext()


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    return torch.native_dropout(input, p, True)[0]
