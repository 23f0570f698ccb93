"""Linear modules: the frozen base in 4, 8 or 16 bits and its adapter, as in bitsandbytes and peft."""

from __future__ import annotations

from qlora_tui.memory import fused_lora
from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.ops import FLOAT, Linear, Ops


def linear(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay the whole module: base, and adapter where it is a target."""
    if not module.rank:
        return base(ops, x, module)
    if uses_fused_lora(ops, module):
        return fused_lora.linear(ops, x, module)
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
    outputs = fused_lora.group(ops, x, adapted)
    return {module.name: output for module, output in zip(adapted, outputs, strict=True)}


def uses_fused_lora(ops: Ops, module: Linear) -> bool:
    """Return whether module and adapter are one of our functions: not with DoRA, nor on 8-bit weights."""
    return ops.own_fused and bool(module.rank) and not module.dora and module.method != "int8"


def base(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay the product with the frozen weight."""
    if module.method in ("nf4", "fp4"):
        return _four_bit(ops, x, module)
    if module.method == "int8":
        return _eight_bit(ops, x, module)
    return _dense(ops, x, module, ops.weight)


def _rows(x: Tensor, module: Linear) -> int:
    return x.numel // module.inputs


def _dense(ops: Ops, x: Tensor, module: Linear, itemsize: int) -> Tensor:
    """Replay ``F.linear`` with a frozen weight: the backward needs only the weight."""
    if ops.autocast:
        x = ops.cast(x, ops.compute)
        itemsize = ops.compute
    numel = x.numel

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    node = ops.tape.node((x,), fn, (None,))
    out = ops.new(_rows(x, module) * module.outputs, max(itemsize, x.itemsize))
    out.node = node
    return out


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
        return ops.cast(x, ops.adapter)


def _adapter(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay ``lora_B(lora_A(dropout(x))) * scaling``."""
    with ops.meter.attribute_to("adapter_inputs"):
        x = _dropout(ops, x)
        if ops.autocast:
            x = ops.cast(x, ops.compute)
    rows, itemsize = _rows(x, module), (ops.compute if ops.autocast else ops.adapter)
    thin = _trained(ops, x, module.inputs, module.rank, rows, itemsize)
    del x
    wide = _trained(ops, thin, module.rank, module.outputs, rows, itemsize)
    del thin
    return ops.times_number(wide)


def _trained(ops: Ops, x: Tensor, inputs: int, outputs: int, rows: int, itemsize: int) -> Tensor:
    """Replay a linear layer with a trained weight: saves its input, and computes the weight's gradient."""
    numel, weights, adapter, needs = x.numel, inputs * outputs, ops.adapter, x.needs_grad

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        toward_input = ops.new(numel, itemsize) if needs else None
        with ops.meter.attribute_to("gradients"):
            gradient = ops.new(weights, itemsize)
            # Under autocast the weight was cast, and its gradient is cast back.
            toward_weight = gradient if itemsize == adapter else ops.new(weights, adapter)
        return (toward_input, toward_weight)

    weight = Tensor(x.storage, 0, adapter, ops.tape.leaf())
    cast = None
    if itemsize != adapter:  # the product saves autocast's copy
        with ops.meter.attribute_to("adapter"):
            cast = ops.new(weights, itemsize)
    node = ops.tape.node((x, weight), fn, (x, cast))
    out = ops.new(rows * outputs, itemsize)
    out.node = node
    return out


def _dropout(ops: Ops, x: Tensor) -> Tensor:
    """Replay ``nn.Dropout``: CUDA's fused kernel saves a one-byte mask; a CPU multiplies by float noise."""
    if not ops.dropout:
        return x
    numel, itemsize = x.numel, x.itemsize

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    with ops.meter.attribute_to("dropout"):
        mask = ops.new(numel, 1 if ops.device == "cuda" else itemsize)
    node = ops.tape.node((x,), fn, (mask,))
    with ops.meter.attribute_to("dropout"):
        out = ops.new(numel, itemsize)
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

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        return (ops.new(numel, itemsize),)

    node = ops.tape.node((x,), fn, (x,))
    out = ops.new(numel, itemsize)
    out.node = node
    return out
