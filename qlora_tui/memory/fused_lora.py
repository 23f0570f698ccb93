"""This project's fused functions, which save less than the library's (``training/fused``)."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.ops import Linear, Ops


def linear(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay base and adapter as one function that saves its uncast input."""
    needs, entered, numel = x.needs_grad, x.itemsize, x.numel
    itemsize = ops.compute if ops.autocast else entered

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return _linear_backward(ops, module, numel, entered, itemsize, needs=needs)

    out, saved_input, thin = _linear_forward(ops, x, module, itemsize)
    out.node = ops.tape.node((x, *ops.adapter_leaves(x)), fn, (x, saved_input, thin))
    return out


def group(ops: Ops, x: Tensor, modules: Sequence[Linear]) -> list[Tensor]:
    """Replay several modules that read ``x`` as one function that saves it once; return their outputs."""
    needs, entered, numel = x.needs_grad, x.itemsize, x.numel
    itemsize = ops.compute if ops.autocast else entered
    waiting: list[Tensor] = []

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        waiting.append(grad)
        if len(waiting) < len(modules):
            return (None,) * (1 + 2 * len(modules))
        gradients = _group_backward(ops, modules, numel, entered, itemsize, needs=needs)
        waiting.clear()
        return gradients

    rows, rank = numel // modules[0].inputs, sum(module.rank for module in modules)
    outputs = []
    for module in modules:
        workspace = _weight(ops, module, ops.compute)
        outputs.append(ops.new(rows * module.outputs, entered))
        del workspace
    narrow = _narrowed(ops, numel, entered, itemsize)
    with ops.meter.attribute_to("adapter_inputs"):
        stacked = _stacked(ops, rank * modules[0].inputs, itemsize)
        xa = ops.new(rows * rank, itemsize)
    del narrow, stacked
    leaves = [leaf for _ in modules for leaf in ops.adapter_leaves(x)]
    for i, output in enumerate(outputs):
        # The first node runs last, when the gradients of all outputs are there.
        output.node = ops.tape.node((x, *leaves), fn, (x, xa) if i == 0 else ())
    return outputs


def _group_backward(
    ops: Ops, modules: Sequence[Linear], numel: int, entered: int, itemsize: int, *, needs: bool
) -> Grads:
    """Replay the backward; return the gradients of the inputs, and of A and B of each module."""
    inputs, rank = modules[0].inputs, sum(module.rank for module in modules)
    rows = numel // inputs
    parts = [ops.new(rows * module.rank, itemsize) for module in modules]
    with ops.meter.attribute_to("gradients"):
        grads_b = [ops.new(module.rank * module.outputs, itemsize) for module in modules]
    grad_xa = ops.new(rows * rank, itemsize)
    narrow = _narrowed(ops, numel, entered, itemsize)
    with ops.meter.attribute_to("gradients"):
        grad_a = ops.new(rank * inputs, itemsize)
        del narrow
        grads_a = [grad_a.view(None) for _ in modules]  # the rows of each
        if itemsize != ops.adapter:
            grads_a = [ops.new(module.rank * inputs, ops.adapter) for module in modules]
            grads_b = [ops.new(grad.numel, ops.adapter) for grad in grads_b]
        del grad_a
    grads = [grad for pair in zip(grads_a, grads_b, strict=True) for grad in pair]
    if not needs:
        return (None, *grads)
    grad_x: Tensor | None = None
    for module in modules:
        weight = _weight(ops, module, itemsize)
        grad_x = grad_x or ops.new(numel, itemsize)
        del weight
    stacked = _stacked(ops, rank * inputs, itemsize)
    del stacked, parts, grad_xa
    if entered != itemsize:
        grad_x = ops.new(numel, entered)
    return (grad_x, *grads)


def gated(ops: Ops, gate: Tensor, up: Tensor, module: Linear, *, one_kernel: bool = False) -> Tensor:
    """Replay ``down(act(gate) * up)`` as two functions that save gate and up, and recompute the rest.

    The second saves nothing, so that a recomputation ends before it; it pins the inputs times A. With
    ``one_kernel`` the product and its backward are a Triton kernel each; the second overwrites the gradient.
    """
    numel, itemsize = gate.numel, gate.itemsize
    rows = numel // module.inputs
    grads_of_xa: list[Tensor] = []

    def product_fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        activated = None if one_kernel else ops.new(numel, itemsize)
        product = ops.new(numel, itemsize)
        with ops.meter.attribute_to("dropout"):
            dropped = ops.new(numel, itemsize) if ops.dropout else None
        grad_a = _gradient(ops, module.rank * module.inputs, itemsize)
        del dropped, product
        _adapter_grad(ops, numel, itemsize)
        grad_up = ops.new(numel, itemsize)
        grad_gate = grad.view(None) if one_kernel else ops.new(numel, itemsize)
        grads_of_xa.clear()
        del activated
        return (grad_gate, grad_up, grad_a)

    def down_fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        grads_of_xa.append(ops.new(rows * module.rank, itemsize))
        grad_b = _gradient(ops, module.rank * module.outputs, itemsize)
        weight = _weight(ops, module, itemsize)
        grad_product = ops.new(numel, itemsize)
        del weight
        return (grad_product, grad_b)

    activated = None if one_kernel else ops.new(numel, itemsize)
    product = ops.new(numel, itemsize)
    del activated
    saved_mask, xa = _adapter_inputs(ops, numel, itemsize, itemsize, module)
    leaf_a, leaf_b = ops.adapter_leaves(gate)
    product.node = ops.tape.node((gate, up, leaf_a), product_fn, (gate, up, saved_mask))
    weight = _weight(ops, module, ops.compute)
    out = ops.new(rows * module.outputs, itemsize)
    del weight
    out.node = ops.tape.node((product, leaf_b), down_fn)
    if out.node is not None:
        out.node.pinned = (xa,)
    return out


def _linear_forward(
    ops: Ops, x: Tensor, module: Linear, itemsize: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Replay the forward; return the outputs, the dropout result, and the inputs times A."""
    rows, numel = x.numel // module.inputs, x.numel
    workspace = _weight(ops, module, ops.compute)
    out = ops.new(rows * module.outputs, x.itemsize)
    del workspace
    return out, *_adapter_inputs(ops, numel, x.itemsize, itemsize, module)


def _adapter_inputs(
    ops: Ops, numel: int, entered: int, itemsize: int, module: Linear
) -> tuple[Tensor | None, Tensor]:
    """Replay the product with A; return the dropout mask, and the inputs times A."""
    narrow = _narrowed(ops, numel, entered, itemsize)
    with ops.meter.attribute_to("dropout"):
        saved_mask = ops.new(numel, 1) if ops.dropout else None
        dropped = ops.new(numel, itemsize) if ops.dropout else None
    with ops.meter.attribute_to("adapter_inputs"):
        xa = ops.new(numel // module.inputs * module.rank, itemsize)
    del dropped, narrow
    return saved_mask, xa


def _adapter_grad(ops: Ops, numel: int, itemsize: int) -> None:
    """Replay adding the adapter's gradient of the inputs, in place where there is no dropout."""
    if ops.dropout:
        with ops.meter.attribute_to("dropout"):
            through = ops.new(numel, itemsize)
            masked = ops.new(numel, itemsize)
        del through, masked


def _stacked(ops: Ops, weights: int, itemsize: int) -> Tensor | None:
    """Replay joining the rows of several A; there are joined copies where the compute dtype is narrower."""
    return ops.new(weights, itemsize) if itemsize == ops.adapter else None


def _linear_backward(
    ops: Ops, module: Linear, numel: int, entered: int, itemsize: int, *, needs: bool
) -> Grads:
    """Replay the backward; return the gradients of the inputs, of A and of B."""
    narrow = _narrowed(ops, numel, entered, itemsize)
    grad_xa = ops.new(numel // module.inputs * module.rank, itemsize)
    with ops.meter.attribute_to("gradients"):
        grad_b = ops.new(module.rank * module.outputs, itemsize)
    with ops.meter.attribute_to("dropout"):
        dropped = ops.new(numel, itemsize) if ops.dropout else None
    with ops.meter.attribute_to("gradients"):
        grad_a = ops.new(module.rank * module.inputs, itemsize)
        del dropped
        if itemsize != ops.adapter:
            grad_a, grad_b = (ops.new(grad.numel, ops.adapter) for grad in (grad_a, grad_b))
    if not needs:
        return (None, grad_a, grad_b)
    weight = _weight(ops, module, itemsize)
    grad_x = ops.new(numel, itemsize)
    del weight
    _adapter_grad(ops, numel, itemsize)
    if entered != itemsize:
        grad_x = ops.new(numel, entered)
    del grad_xa, narrow
    return (grad_x, grad_a, grad_b)


def _narrowed(ops: Ops, numel: int, entered: int, itemsize: int) -> Tensor | None:
    """Replay the cast of a float32 LayerNorm output for the products under autocast."""
    return ops.new(numel, itemsize) if entered != itemsize else None


def _gradient(ops: Ops, weights: int, itemsize: int) -> Tensor:
    """Replay the gradient of an adapter's weight: computed in the compute dtype, cast to the adapter's."""
    with ops.meter.attribute_to("gradients"):
        gradient = ops.new(weights, itemsize)
        return gradient if itemsize == ops.adapter else ops.new(weights, ops.adapter)


def _weight(ops: Ops, module: Linear, itemsize: int) -> Tensor | None:
    """Return the base weight for a product, dequantized if it is packed."""
    return ops.dequantized(module, itemsize) if module.method in ("nf4", "fp4") else None
