"""Frozen linear modules and their adapters as one autograd function, in place of peft's forward.

peft copies the base's output, casts the input of each target to the adapter's fp32, saves that copy (and with
dropout a second one), and multiplies in fp32. Here the input is saved unchanged, so that targets that read
the same hidden state share it; dropout saves one byte per element; the products are in the compute dtype, as
under autocast; and the backward adds both gradients of the input in place.

Shapes of SmolLM2-135M's ``gate_proj`` at rank 16, for a packed sequence of 100 tokens::

    x     (1, 100, 576)     saved as it is, shared with up_proj
    A     (16, 576)         fp32, like B: small updates would vanish in 16 bits
    B     (1536, 16)
    xa    (100, 16)         (mask ⊙ x) · Aᵀ, saved: 16 numbers per token
    out   (1, 100, 1536)    x · Wᵀ, into which scale · xa · Bᵀ is added in place

    backward, for grad (100, 1536):
    grad_xa  (100, 16)      scale · grad · B
    grad_B   (1536, 16)     scale · gradᵀ · xa
    grad_A   (16, 576)      grad_xaᵀ · (mask ⊙ x)
    grad_x   (100, 576)     grad · W, into which grad_xa · A is added in place; W is dequantized for it

The mask is the dropout mask, all ones without dropout. The mask is not rescaled: ``scale`` includes 1 / (1 -
p). With dropout, grad_xa · A is masked first and therefore not added in place.

Adapted modules that read the same input are computed by one function: queries, keys and values; gate and up.
Their A matrices are multiplied as the rows of one matrix, and the products themselves add the gradients of
the common input, while autograd would add three tensors. This saves about 20 kernels per layer and step, and
on a CPU avoids products that are too thin to be efficient.

Shapes of SmolLM2-135M's attention at rank 16, for a packed sequence of 100 tokens::

    x         (1, 100, 576)                          saved once
    A         (48, 576)                              the rows of all three
    xa        (100, 48)                              x · Aᵀ, saved; 16 columns for each module
    outputs   (1, 100, 576), (1, 100, 192) twice     x · Wᵀ, into which scale · xa · Bᵀ is added, for each

    backward, given one gradient for each output:
    grad_xa   (100, 48)                              scale · grad · B, for each module
    grad_A    (48, 576)                              grad_xaᵀ · x
    grad_x    (100, 576)                             the sum of grad · W, then of grad_xa · A, in place

The library's code calls one module after another. The first call computes the outputs of all, and the later
modules take their outputs from it if they receive the same tensor. With dropout each module has its own mask,
so each is computed separately. The base's weights are dequantized one after another, each into its own
tensor. A buffer for all layers would not save kernels, and would still be allocated when the logits need the
most memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.memory.execution import GROUPS
from qlora_tui.training.fused.patching import patch_forward

Stack: TypeAlias = tuple[nn.Parameter, ...]
"""Adapter weights of the same width that are multiplied by the same input in one matrix product."""


class AdapterCasts:
    """16-bit copies of some parameters, which are valid from a refresh until a parameter changes.

    Without the copies, a step casts each fp32 weight three times (forward, recomputation, backward), in
    kernels that take a GPU longer to launch than to run: 42 of about 300 launches per layer. Here one call
    casts all weights. The copies of a stack of parameters of equal width are the rows of one tensor.
    """

    def __init__(self) -> None:
        self._stacks: list[Stack] = []
        self._stacked_copies: list[Tensor] = []
        """One tensor for each stack, with the copies of its parameters as rows."""
        self._copies: list[Tensor] = []
        """Views of the stacked copies, one for each parameter."""
        self._by_parameter: dict[int, tuple[Tensor, int]] = {}
        """The copy of each parameter, keyed by its id, with the parameter's version when it was copied."""
        self._by_stack: dict[tuple[int, ...], Tensor] = {}
        """The copies of each stack, keyed by the ids of its parameters."""

    def refresh_in(self, decoder: nn.Module, stacks: list[Stack]) -> None:
        """Refresh the copies of these parameters before each forward of ``decoder``.

        A model with an adapter runs its decoder before anything else, whichever way it is called.
        """
        self._stacks = stacks
        decoder.register_forward_pre_hook(self._before_forward)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``parameter`` in ``dtype``: the copy if it is valid, otherwise a new cast."""
        copy = self._valid_copy(parameter, dtype)
        return parameter.to(dtype) if copy is None else copy

    def cast_stack(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the rows of all parameters in ``dtype``: the copies if the parameters form a stack and all
        copies are valid, otherwise new casts.
        """
        if len(parameters) == 1:
            return self.cast(parameters[0], dtype)
        stacked = self._by_stack.get(tuple(map(id, parameters)))
        if stacked is None or any(self._valid_copy(parameter, dtype) is None for parameter in parameters):
            return torch.cat([parameter.to(dtype) for parameter in parameters])
        return stacked

    def _valid_copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        copy, version = self._by_parameter.get(id(parameter), (None, -1))
        return copy if copy is not None and copy.dtype == dtype and version == parameter._version else None

    @torch.no_grad()
    def _before_forward(self, decoder: nn.Module, args: Any) -> None:
        parameters = [parameter for stack in self._stacks for parameter in stack]
        # Dtype of the frozen weights that are not quantized.
        dtype = product_dtype(
            next(p for p in decoder.parameters() if p.is_floating_point() and not p.requires_grad)
        )
        if not parameters or dtype.itemsize >= parameters[0].element_size():
            self._stacked_copies, self._copies, self._by_parameter, self._by_stack = [], [], {}, {}
            return
        if not self._copies or self._copies[0].dtype != dtype:
            self._allocate(dtype)
        torch._foreach_copy_(self._copies, list[Tensor](parameters))
        self._by_parameter = {
            id(parameter): (copy, parameter._version)
            for parameter, copy in zip(parameters, self._copies, strict=True)
        }

    def _allocate(self, dtype: torch.dtype) -> None:
        rows = [[len(parameter) for parameter in stack] for stack in self._stacks]
        self._stacked_copies = [
            stack[0].new_empty((sum(each), stack[0].shape[1]), dtype=dtype)
            for stack, each in zip(self._stacks, rows, strict=True)
        ]
        self._copies = [
            copy
            for stacked, each in zip(self._stacked_copies, rows, strict=True)
            for copy in torch.split(stacked, each)
        ]
        self._by_stack = {
            tuple(map(id, stack)): stacked
            for stack, stacked in zip(self._stacks, self._stacked_copies, strict=True)
        }


_WORDS = 4
"""Number of dropout decisions taken from one 64-bit random number."""
_VALUES = 1 << 15
"""Number of values of the 15 random bits of a decision: on a CPU a probability is exact to 1/32,768."""
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


WeightLoader: TypeAlias = Callable[[], Tensor]
"""Returns the frozen weight (outputs, inputs), dequantized to 16 or 32 bits."""


@dataclass(frozen=True)
class LoraParameters:
    """The active adapter of one frozen module."""

    a: Tensor
    b: Tensor
    base: nn.Module
    weight: WeightLoader
    scaling: float
    p: float
    """Dropout probability."""
    casts: AdapterCasts

    def b_in(self, dtype: torch.dtype) -> Tensor:
        """Return B in the dtype of the products."""
        return self.casts.cast(self.b, dtype)

    @property
    def scale(self) -> float:
        """LoRA scaling times dropout's factor 1 / (1 - p). Applying this factor here costs less than scaling
        the inputs.
        """
        return self.scaling / (1 - self.p)


@dataclass(frozen=True)
class AdaptedModule:
    """A module with a plain LoRA adapter."""

    module: Any
    weight: WeightLoader
    casts: AdapterCasts

    def adapter(self) -> LoraParameters | None:
        """Return the active adapter; None if there is not exactly one, or if it is disabled or merged."""
        module = self.module
        names = module.active_adapters
        if module.disable_adapters or module.merged or len(names) != 1:
            return None
        (name,) = names
        return LoraParameters(
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            module.get_base_layer(),
            self.weight,
            module.scaling[name],
            getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0,
            self.casts,
        )


def plain_weight(module: Any) -> WeightLoader | None:
    """Return the function that reads the frozen weight under a plain adapter. None if the module has no plain
    adapter, or if its weight cannot be read.
    """
    if not hasattr(module, "lora_A") or getattr(module, "lora_variant", None):
        return None
    return _weight_of(module.get_base_layer())


def _weight_of(base: Any) -> WeightLoader | None:
    if type(base).__name__ != "Linear4bit":
        # Some families subclass nn.Linear (Falcon), and bitsandbytes' 8-bit weights are integers.
        known = isinstance(base, nn.Linear) and base.weight.is_floating_point()
        return (lambda: base.weight) if known else None
    from bitsandbytes.functional import dequantize_4bit

    def dequantized() -> Tensor:
        packed = base.weight
        weight: Tensor = dequantize_4bit(packed.data.view(-1, 1), packed.quant_state)
        return weight

    return dequantized


class FusedLora(torch.autograd.Function):
    """base(x) + scale · dropout(x) · Aᵀ · Bᵀ for one or more adapters with the same input x (…, inputs).

    Returns a tuple with one output for each adapter. Several adapters share a call only without dropout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, adapters: list[LoraParameters], *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(adapter.base(x) for adapter in adapters)
        dropout_mask, xa = adapter_inputs(x, adapters)
        for output, part, adapter in zip(outputs, _by_adapter(xa, adapters), adapters, strict=True):
            add_adapter_outputs(output, part, adapter)
        ctx.save_for_backward(x, dropout_mask, xa)
        ctx.adapters = adapters
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, dropout_mask, xa = ctx.saved_tensors
        adapters: list[LoraParameters] = ctx.adapters
        grads, parts, grads_b = [], [], []
        for output, part, adapter in zip(grad_outputs, _by_adapter(xa, adapters), adapters, strict=True):
            grad, grad_part, grad_b = grad_of_outputs(output, part, adapter)
            grads.append(grad)
            parts.append(grad_part)
            grads_b.append(grad_b)
        grad_xa = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        grad_a = grad_of_a(grad_xa, x, dropout_mask)
        grads_a = _by_adapter(grad_a, adapters, dim=0)
        cast = cast_grads([*grads_a, *grads_b], adapters[0].a.dtype)
        del grad_a, grads_a, grads_b
        of_a, of_b = cast[: len(adapters)], cast[len(adapters) :]
        grads_of_weights = [grad for pair in zip(of_a, of_b, strict=True) for grad in pair]
        if not ctx.needs_input_grad[0]:
            return None, None, *grads_of_weights
        grad_x: Tensor | None = None
        for grad, adapter in zip(grads, adapters, strict=True):
            weight = adapter.weight().to(grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            del weight  # before the next weight is dequantized
        assert grad_x is not None
        add_adapter_grad(grad_x, grad_xa, dropout_mask, adapters)
        return grad_x.view(x.shape).to(x.dtype), None, *grads_of_weights


def adapted_outputs(x: Tensor, adapters: list[LoraParameters]) -> tuple[Tensor, ...]:
    """Return the outputs of adapted modules that all read x (…, inputs)."""
    weights = [weight for adapter in adapters for weight in (adapter.a, adapter.b)]
    outputs: tuple[Tensor, ...] = FusedLora.apply(x, adapters, *weights)  # type: ignore[no-untyped-call]  # torch's own
    return outputs


def adapter_inputs(x: Tensor, adapters: Sequence[LoraParameters]) -> tuple[Tensor | None, Tensor]:
    """Return the dropout mask or None, and dropout(x) · Aᵀ (rows, all ranks), for x (…, inputs)."""
    device = x.device.type
    dtype = product_dtype(x)
    with without_autocast(device):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropout_mask = _dropout_mask(rows, adapters[0].p) if adapters[0].p else None
        return dropout_mask, apply_dropout(rows, dropout_mask) @ _stacked_a(adapters, dtype).t()


def add_adapter_outputs(out: Tensor, xa: Tensor, adapter: LoraParameters) -> None:
    """Add scale · xa · Bᵀ in place to the base's outputs (…, outputs)."""
    device = out.device.type
    with without_autocast(device):
        flat, b = out.view(-1, out.shape[-1]), adapter.b_in(xa.dtype)
        if out.dtype == xa.dtype:
            flat.addmm_(xa, b.t(), alpha=adapter.scale)
        else:
            flat.add_(xa @ b.t(), alpha=adapter.scale)


def grad_of_outputs(grad: Tensor, xa: Tensor, adapter: LoraParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the outputs as (rows, outputs), and the gradients of ``xa`` and B.

    The gradient of B is in the dtype of ``xa``.
    """
    b, nothing = adapter.b_in(xa.dtype), xa.new_empty(())
    grad = grad.reshape(-1, b.shape[0]).to(xa.dtype)
    # The scale is a factor within the product, so it needs no separate kernel.
    grad_xa = torch.addmm(nothing, grad, b, beta=0, alpha=adapter.scale)
    grad_b = torch.addmm(nothing, grad.t(), xa, beta=0, alpha=adapter.scale)
    return grad, grad_xa, grad_b


def grad_of_a(grad_xa: Tensor, x: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """Return the gradient of A for inputs x (…, inputs), in the dtype of ``grad_xa``."""
    rows = x.reshape(-1, x.shape[-1]).to(grad_xa.dtype)
    return grad_xa.t() @ apply_dropout(rows, dropout_mask)


def cast_grads(grads: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return gradients in the dtype of the adapter, cast by one kernel on a GPU."""
    if grads[0].dtype == dtype:
        return list(grads)
    cast = [torch.empty_like(grad, dtype=dtype) for grad in grads]
    torch._foreach_copy_(cast, list(grads))
    return cast


def add_adapter_grad(
    grad_x: Tensor, grad_xa: Tensor, dropout_mask: Tensor | None, adapters: Sequence[LoraParameters]
) -> None:
    """Add the adapters' part in place to the base's gradient of the inputs (rows, inputs)."""
    a = _stacked_a(adapters, grad_xa.dtype)
    if dropout_mask is None and grad_x.dtype == grad_xa.dtype:
        grad_x.addmm_(grad_xa, a)
    else:
        grad_x += apply_dropout(grad_xa @ a, dropout_mask)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; if autocast is already off, one that does nothing and costs less."""
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the adapter's products. Under autocast x may be the fp32 output of a norm."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x.device.type) else x.dtype


def _dropout_mask(values: Tensor, p: float) -> Tensor:
    """Return a dropout mask of one byte per element: bool on a GPU; int8 on a CPU, -1 to keep and 0 to drop.

    On a CPU one 64-bit random number decides for four elements with 15 bits each: drawing one number per
    element would take a third of the step.
    """
    if values.device.type != "cpu":
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p)
    count = values.numel()
    drawn = torch.empty(-(-count // _WORDS), dtype=torch.int64, device=values.device)
    words = drawn.random_(-(1 << 63), None).view(torch.int16)[:count].bitwise_and_(_VALUES - 1)
    # A share p of the elements has 15 random bits below p · 32,768. All other elements become negative here,
    # and the arithmetic shift spreads the sign bit: -1 (all bits set) to keep, 0 to drop.
    words.neg_().add_(round(p * _VALUES) - 1).bitwise_right_shift_(15)
    return words.to(torch.int8).view(values.shape)


def apply_dropout(values: Tensor, dropout_mask: Tensor | None) -> Tensor:
    """Set the dropped elements to 0.

    Uses a bitwise AND on a CPU, where mixed-dtype arithmetic is many times slower.
    """
    if dropout_mask is None:
        return values
    if dropout_mask.dtype == torch.bool:
        return values * dropout_mask
    bits = _BITS[values.dtype]
    return dropout_mask.to(bits).bitwise_and_(values.view(bits)).view(values.dtype)


def fuse_lora(model: nn.Module, decoder: nn.Module, casts: AdapterCasts) -> list[Stack]:
    """Fuse every plain LoRA module; DoRA, and bases whose weight is not accessible, keep peft's forward.

    Returns:
        The adapter weights of the fused modules, grouped by the matrix product in which they are multiplied.
    """
    weights = {module: weight for module in model.modules() if (weight := plain_weight(module))}
    stacks: list[Stack] = []
    for modules in _modules_by_input(model, weights):
        shared = SharedInput([AdaptedModule(module, weights[module], casts) for module in modules])
        for member in shared.members:
            _patch_forward(member, shared)
        if len(modules) > 1:
            decoder.register_forward_pre_hook(shared.before_forward)
        names = modules[0].lora_A.keys()
        stacks += [tuple(module.lora_A[name].weight for module in modules) for name in names]
        stacks += [(module.lora_B[name].weight,) for module in modules for name in names]
    return stacks


def _modules_by_input(model: nn.Module, adapted: dict[Any, WeightLoader]) -> list[list[Any]]:
    """Return all adapted modules, in groups that are expected to read the same input."""
    groups: list[list[Any]] = []
    for parent in model.modules():
        for names in GROUPS:
            children: list[Any] = [getattr(parent, name, None) for name in names]
            modules = [module for module in children if module in adapted]
            # Several dropout masks cannot be applied to one input.
            if any(getattr(part, "p", 0.0) for module in modules for part in module.lora_dropout.values()):
                continue
            if len({(module.in_features, tuple(module.lora_A)) for module in modules}) == 1:
                groups.append(modules)
    grouped = {module for modules in groups for module in modules}
    return groups + [[module] for module in adapted if module not in grouped]


class SharedInput:
    """Modules that are computed together, and the outputs for those that are called later."""

    def __init__(self, members: Sequence[AdaptedModule]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._outputs: dict[Any, Tensor] = {}
        """Outputs of modules that have not been called yet."""
        self._is_shared = len(members) > 1

    def before_forward(self, decoder: nn.Module, args: Any) -> None:
        """Stop computing the modules together if the last forward left an output that no module took.

        This is decided only between forward passes, because a recomputation must save the same tensors as its
        forward.
        """
        if self._outputs:
            self._is_shared, self._outputs, self._input = False, {}, None

    def output_of(self, module: Any, x: Tensor) -> Tensor | None:
        """Return the output of one of the modules; None if it must be computed separately."""
        if not (self._is_shared and torch.is_grad_enabled()):
            return None
        if module is self.members[0].module:
            self._compute(x)
        if self._input is not x or module not in self._outputs:
            return None
        output = self._outputs.pop(module)
        if not self._outputs:
            self._input = None
        return output

    def _compute(self, x: Tensor) -> None:
        """Compute all outputs, if every module has an active adapter."""
        self._outputs, self._input = {}, None
        adapters = [adapter for member in self.members if (adapter := member.adapter()) is not None]
        if len(adapters) < len(self.members):
            return
        outputs = adapted_outputs(x, adapters)
        self._outputs = {member.module: output for member, output in zip(self.members, outputs, strict=True)}
        self._input = x


def _patch_forward(member: AdaptedModule, shared: SharedInput) -> None:
    original_forward = member.module.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return original_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        output = shared.output_of(self, x)
        if output is not None:
            return output
        adapter = member.adapter()
        if adapter is None:
            return original_forward(x)  # type: ignore[no-any-return]
        return adapted_outputs(x, [adapter])[0]

    patch_forward(member.module, forward, "lora")


def _stacked_a(adapters: Sequence[LoraParameters], dtype: torch.dtype) -> Tensor:
    """Return the factors A of all adapters, stacked as rows."""
    return adapters[0].casts.cast_stack([adapter.a for adapter in adapters], dtype)


def _by_adapter(stacked: Tensor, adapters: Sequence[LoraParameters], dim: int = 1) -> tuple[Tensor, ...]:
    """Split ``stacked`` into each adapter's columns, or into each adapter's rows if ``dim`` is 0."""
    if len(adapters) == 1:
        return (stacked,)
    return torch.split(stacked, [len(adapter.a) for adapter in adapters], dim=dim)
