"""Fused kernels, which save less: Unsloth's, those of FOAK derived from them, Liger's.

FOAK is Fused Operations and Kernels, a plugin of IBM's fms-acceleration.

RMSNorm saves its input and writes its gradient over the incoming one; rotary positions rotate queries and
keys in place; a LoRA projection (FOAK's) is one function that saves its input and the result of dropout, but
no mask; the product of a gated MLP (Liger's) saves both halves and writes their gradients over them.
"""

from __future__ import annotations

from qlora_tui.memory.autograd import Grads, Tensor
from qlora_tui.memory.ops import Linear, Ops


def rms_norm(ops: Ops, x: Tensor) -> Tensor:
    """Replay RMSNorm, which saves its input and one number per row."""
    spread = ops.new(ops.tokens, 4)
    node = ops.tape.node((x,), lambda grad, saved: (grad,), (x, None, spread))
    out = ops.new(x.numel, x.itemsize)
    out.node = node
    return out


def rotate(ops: Ops, x: Tensor) -> Tensor:
    """Replay rotary positions in place, forward and backward."""
    return x.view(ops.tape.node((x,), lambda grad, saved: (grad,), (None, None)))


def gated(ops: Ops, gate: Tensor, up: Tensor) -> Tensor:
    """Replay ``silu(gate) * up`` (``LigerSiLUMulFunction``)."""
    node = ops.tape.node((gate, up), lambda grad, saved: (saved[0], saved[1]), (gate, up))
    out = ops.new(gate.numel, gate.itemsize)
    out.node = node
    return out


def lora(ops: Ops, x: Tensor, module: Linear) -> Tensor:
    """Replay a 4-bit projection and its adapter as one function; gradients of both in one backward."""
    rows, numel, itemsize = x.numel // module.inputs, x.numel, x.itemsize

    def fn(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        with ops.meter.attribute_to("gradients"):
            thin = ops.new(module.rank * module.inputs, ops.adapter)
            wide = ops.new(module.rank * module.outputs, ops.adapter)
        weight = ops.dequantized(module, itemsize)
        x_gradient = ops.new(numel, itemsize)
        del weight
        through_adapter = ops.new(numel, itemsize)
        where = ops.new(numel, 1)
        masked = ops.new(numel, itemsize)
        del through_adapter, where, masked
        return (x_gradient, thin, wide)

    dropped = x
    if ops.dropout:
        with ops.meter.attribute_to("dropout"):
            dropped = ops.new(numel, itemsize)
            mask = ops.new(numel, 1)
            del mask
    leaves = (Tensor(x.storage, 0, 4, ops.tape.leaf()), Tensor(x.storage, 0, 4, ops.tape.leaf()))
    node = ops.tape.node((x, *leaves), fn, (x, None, None, dropped))
    weight = ops.dequantized(module, itemsize)
    out = ops.new(rows * module.outputs, itemsize)
    del weight
    out.node = node
    return out
