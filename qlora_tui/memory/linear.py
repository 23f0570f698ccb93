"""Linear modules: the frozen base in 4, 8 or 16 bits and its adapter.

First what a layer calls; then this project's fused functions, which save less than the libraries'
(``training/fused``); then the modules of bitsandbytes and peft.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.ops import FLOAT, Linear, Ops


def linear(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay the whole module: base, and adapter where it is a target."""
    if not module.rank:
        return base(ops, x, module)
    if uses_fused_lora(ops, module):
        return _fused_linear(ops, x, module)
    result = base(ops, x, module)
    if module.method in ("nf4", "fp4"):
        result = ops.copy(result)  # peft/tuners/lora/bnb.py clones the 4-bit result
    out_itemsize = result.itemsize
    if module.dora:
        return ops.cast(_dora(ops, x, result, module), out_itemsize)
    # peft binds the cast input to a name that lives until the end of its forward.
    entered = _entered(ops, x, module)
    update = _adapter(ops, entered, module)
    if module.method != "none" and not ops.autocast:
        update = ops.cast(update, out_itemsize)
    result = ops.add(result, update)
    if module.method == "none":
        del update  # a temporary value in peft's layer.py; bnb.py gives it a name
    return ops.cast(result, out_itemsize)


def group(ops: Ops, x: Tensor, *modules: Linear | None) -> dict[str, Tensor]:
    """Replay those of the modules that our functions compute together; return their outputs by name.

    Empty where each is computed by itself, as with dropout, whose masks differ.
    """
    adapted = [module for module in modules if module and uses_fused_lora(ops, module)]
    if ops.dropout or len(adapted) < 2:
        return {}
    outputs = _fused_group(ops, x, adapted)
    return {module.name: output for module, output in zip(adapted, outputs, strict=True)}


def uses_fused_lora(ops: Ops, module: Linear) -> bool:
    """Return whether module and adapter are one of our functions: not with DoRA, nor on 8-bit weights."""
    return ops.own_fused and bool(module.rank) and not module.dora and module.method != "int8"


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
        dropped = ops.new(numel, itemsize, "dropout") if ops.dropout else None
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


def _fused_linear(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay base and adapter as one function that saves its uncast input."""
    needs, entered, numel = x.needs_grad, x.itemsize, x.numel
    itemsize = ops.compute if ops.autocast else entered

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return _linear_backward(ops, module, numel, entered, itemsize, needs=needs)

    out, saved_input, thin = _linear_forward(ops, x, module, itemsize)
    out.node = ops.tape.node((x, *ops.adapter_leaves(x)), fn, (x, saved_input, thin))
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


def _linear_backward(
    ops: Ops, module: Linear, numel: int, entered: int, itemsize: int, *, needs: bool
) -> Grads:
    """Replay the backward; return the gradients of the inputs, of A and of B."""
    narrow = _narrowed(ops, numel, entered, itemsize)
    grad_xa = ops.new(numel // module.inputs * module.rank, itemsize)
    grad_b = ops.new(module.rank * module.outputs, itemsize, "gradients")
    dropped = ops.new(numel, itemsize, "dropout") if ops.dropout else None
    with ops.meter.attribute_to("gradients"):
        grad_a = ops.new(module.rank * module.inputs, itemsize)
        del dropped
        if itemsize != FLOAT:
            grad_a, grad_b = (ops.new(grad.numel, FLOAT) for grad in (grad_a, grad_b))
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


def _fused_group(ops: Ops, x: Tensor, modules: Sequence[Linear]) -> list[Tensor]:
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
    grads_b = [ops.new(module.rank * module.outputs, itemsize, "gradients") for module in modules]
    grad_xa = ops.new(rows * rank, itemsize)
    narrow = _narrowed(ops, numel, entered, itemsize)
    with ops.meter.attribute_to("gradients"):
        grad_a = ops.new(rank * inputs, itemsize)
        del narrow
        grads_a = [grad_a.view(None) for _ in modules]  # the rows of each
        if itemsize != FLOAT:
            grads_a = [ops.new(module.rank * inputs, FLOAT) for module in modules]
            grads_b = [ops.new(grad.numel, FLOAT) for grad in grads_b]
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


def _adapter_inputs(
    ops: Ops, numel: int, entered: int, itemsize: int, module: Linear
) -> tuple[Tensor | None, Tensor]:
    """Replay the product with A; return the dropout mask, and the inputs times A."""
    narrow = _narrowed(ops, numel, entered, itemsize)
    saved_mask = ops.new(numel, 1, "dropout") if ops.dropout else None
    dropped = ops.new(numel, itemsize, "dropout") if ops.dropout else None
    xa = ops.new(numel // module.inputs * module.rank, itemsize, "adapter_inputs")
    del dropped, narrow
    return saved_mask, xa


def _adapter_grad(ops: Ops, numel: int, itemsize: int) -> None:
    """Replay adding the adapter's gradient of the inputs, in place where there is no dropout."""
    if ops.dropout:
        through = ops.new(numel, itemsize, "dropout")
        masked = ops.new(numel, itemsize, "dropout")
        del through, masked


def _gradient(ops: Ops, weights: int, itemsize: int) -> Tensor:
    """Replay the gradient of an adapter's weight: computed in the compute dtype, cast to the adapter's."""
    gradient = ops.new(weights, itemsize, "gradients")
    return gradient if itemsize == FLOAT else ops.new(weights, FLOAT, "gradients")


def _narrowed(ops: Ops, numel: int, entered: int, itemsize: int) -> Tensor | None:
    """Replay the cast of a float32 LayerNorm output for the products under autocast."""
    return ops.new(numel, itemsize) if entered != itemsize else None


def _stacked(ops: Ops, weights: int, itemsize: int) -> Tensor | None:
    """Replay joining the rows of several A; there are joined copies where the compute dtype is narrower."""
    return ops.new(weights, itemsize) if itemsize == FLOAT else None


def _weight(ops: Ops, module: Linear, itemsize: int) -> Tensor | None:
    """Return the base weight for a product, dequantized if it is packed."""
    return ops.dequantized(module, itemsize) if module.method in ("nf4", "fp4") else None


def base(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay the product with the frozen weight."""
    if module.method in ("nf4", "fp4"):
        return _four_bit(ops, x, module)
    if module.method == "int8":
        return _eight_bit(ops, x, module)
    return _dense(ops, x, module)


def _rows(x: Tensor, module: Linear) -> int:
    return x.numel // module.inputs


def _dense(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay ``F.linear`` with a frozen weight: the backward needs only the weight."""
    if ops.autocast:
        x = ops.cast(x, ops.compute)
    gradient, outputs = (x.numel, ops.compute), _rows(x, module) * module.outputs
    return ops.apply(
        x,
        numel=outputs,
        itemsize=max(ops.compute, x.itemsize),
        backward=lambda grad, saved: (ops.new(*gradient),),
        save=(None,),
    )


def _four_bit(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay ``Linear4bit.forward``: input to the compute dtype, product, result to the input's dtype."""
    entered = x.itemsize
    x = ops.cast(x, ops.compute)
    numel, itemsize = x.numel, ops.compute

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        # MatMul4Bit.backward: dequantize the whole weight, then grad @ weight.
        weight = ops.dequantized(module, grad.itemsize)
        gradient = ops.new(numel, itemsize)
        del weight
        return (gradient,)

    # The packed weight is a plain attribute: the checkpoint packs nothing.
    node = ops.tape.node((x,), fn)
    workspace = ops.dequantized(module, ops.compute)
    out = ops.new(_rows(x, module) * module.outputs, itemsize)
    del workspace
    out.node = node
    return ops.cast(out, entered)


def _eight_bit(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay ``MatMul8bitLt``, which stores its input as an attribute of its context.

    Checkpointing cannot drop it, and it lives as long as the loss, which holds the graph.
    """
    numel, itemsize = x.numel, x.itemsize

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        weight = ops.dequantized(module, itemsize)
        gradient = ops.new(numel, itemsize)
        del weight
        return (gradient,)

    node = ops.tape.node((x,), fn)
    out_numel = _rows(x, module) * module.outputs
    if ops.device == "cpu":  # MatMul8bitFp: dequantize, then F.linear
        workspace = ops.dequantized(module, itemsize)
        out = ops.new(out_numel, itemsize)
        del workspace
    else:
        half = None if ops.float16 else ops.new(numel, 2)
        rows = ops.new(numel, 1)
        del half
        # int32, then float16 from the kernel, then the input's dtype (int8_mm_dequant).
        product = ops.new(out_numel, FLOAT)
        narrow = None if ops.float16 else ops.new(out_numel, 2)
        out = ops.new(out_numel, itemsize)
        del product, narrow, rows
    out.node = node
    if node is not None:
        x.storage.reattribute("int8_inputs")
        node.pinned = (x.view(None),)
    return out


def _entered(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay the cast of the input to the adapter's dtype. On quantized weights peft leaves that to autocast,
    where it is on; on others it always casts (``layer.py``)."""
    if ops.autocast and module.method != "none":
        return x
    with ops.meter.attribute_to("adapter_inputs"):
        return ops.cast(x, FLOAT)


def _adapter(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay ``lora_B(lora_A(dropout(x))) * scaling``."""
    with ops.meter.attribute_to("adapter_inputs"):
        x = _dropout(ops, x)
        if ops.autocast:
            x = ops.cast(x, ops.compute)
    rows, itemsize = _rows(x, module), (ops.compute if ops.autocast else FLOAT)
    thin = _trained(ops, x, module.inputs, module.rank, rows, itemsize)
    del x
    wide = _trained(ops, thin, module.rank, module.outputs, rows, itemsize)
    del thin
    return ops.times_number(wide)


def _trained(ops: Ops, x: Tensor, inputs: int, outputs: int, rows: int, itemsize: int) -> Tensor:
    """Replay a linear layer with a trained weight: saves its input, and computes the weight's gradient."""
    numel, weights, adapter, needs = x.numel, inputs * outputs, FLOAT, x.needs_grad

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        toward_input = ops.new(numel, itemsize) if needs else None
        gradient = ops.new(weights, itemsize, "gradients")
        # Under autocast the weight was cast, and its gradient is cast back.
        toward_weight = gradient if itemsize == adapter else ops.new(weights, adapter, "gradients")
        return (toward_input, toward_weight)

    weight = Tensor(x.storage, 0, adapter, ops.tape.leaf())
    cast = None
    if itemsize != adapter:  # the product saves autocast's copy
        cast = ops.new(weights, itemsize, "adapter")
    node = ops.tape.node((x, weight), fn, (x, cast))
    out = ops.new(rows * outputs, itemsize)
    out.node = node
    return out


def _dropout(ops: Ops, x: Tensor) -> Tensor:
    """Replay ``nn.Dropout``: CUDA's fused kernel saves a one-byte mask; a CPU multiplies by float noise."""
    if not ops.dropout:
        return x
    numel, itemsize = x.numel, x.itemsize
    mask = ops.new(numel, 1 if ops.device == "cuda" else itemsize, "dropout")
    node = ops.tape.node((x,), lambda grad, saved: (ops.new(numel, itemsize),), (mask,))
    out = ops.new(numel, itemsize, "dropout")
    out.node = node
    return out


def _dora(ops: Ops, x: Tensor, result: Tensor, module: Linear) -> Tensor:
    """Replay DoRA, which rebuilds the weight for its norms and scales the result
    (peft/tuners/lora/dora.py)."""
    with ops.meter.attribute_to("dequantized"):
        weight = ops.new(module.weights, ops.compute)
        update = ops.new(module.weights, FLOAT)
        total = ops.new(module.weights, FLOAT)
        del weight, update, total
    lora = _adapter(ops, _entered(ops, x, module), module)
    with ops.meter.attribute_to("adapter_inputs"):
        scaled = _times_magnitude(ops, result, module)
        return ops.add(scaled, _times_magnitude(ops, lora, module))


def _times_magnitude(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    numel, itemsize = x.numel, max(x.itemsize, FLOAT)
    return ops.apply(
        x,
        numel=numel,
        itemsize=itemsize,
        backward=lambda grad, saved: (ops.new(numel, itemsize),),
        save=(x,),
    )
