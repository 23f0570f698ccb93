"""RMSNorm, rotary positions and the gated product of an MLP, each as one Triton kernel per direction.

torch computes each in a chain of kernels that read and write the whole tensor: nine for a norm, ten for the
rotation of queries and keys, five for the backward of a gated product. Here a program reads a row, a token,
or a block of elements, once. Values are converted to fp32 when they are loaded and rounded where transformers
rounds. Imports Triton, which CUDA builds of torch include; :mod:`.kernel_choice` decides whether the kernels
are used.

`make check-kernels` compiles each launch for the supported GPUs, and runs the kernels on the CPU with
Triton's interpreter (``TRITON_INTERPRET=1``): bfloat16 stores truncate there instead of rounding, and float16
ones round. The compiler rejects some code that the interpreter accepts, such as parameters annotated with
anything but ``tl.constexpr``, so the kernels' parameters have no types.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any, Literal, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

GatedActivation: TypeAlias = Literal["silu", "gelu_tanh"]
_BLOCK = 1024
_WIDEST_ROW = 1 << 14
"""Maximum number of elements in a row that one program can hold in the registers of its warps."""
_ELEMENTS_PER_WARP = 512
"""16 elements per thread: with eight times as many, the backward of a norm spills registers."""


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _rms_forward(
    x,
    weight,
    out,
    inv_rms,
    rows,
    width,
    eps,
    offset,
    FP32: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < width)
    values = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / width + eps)
    tl.store(inv_rms + row, inverse, mask=row < rows)
    factor = tl.load(weight + i, mask=i < width, other=0.0).to(tl.float32) + offset
    normed = values * inverse
    if not FP32:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + i, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _rms_backward(
    grad, x, weight, inv_rms, out, rows, width, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < width)
    inverse = tl.load(inv_rms + row, mask=row < rows, other=0.0)
    normed = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32) * inverse
    factor = tl.load(weight + i, mask=i < width, other=0.0).to(tl.float32) + offset
    scaled = tl.load(grad + row * width + i, mask=inside, other=0.0).to(tl.float32) * factor
    projection = tl.sum(scaled * normed, 1, keep_dims=True) / width
    result = (scaled - normed * projection) * inverse
    tl.store(out + row * width + i, result.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(gate, SILU: tl.constexpr):
    """Return the activation and its derivative."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    # 0.5 · (1 + tanh(x)) is sigmoid(2x). The complement has its own exponential, because 1 - sigmoid cancels.
    sigmoid, complement = 1.0 / (1.0 + tl.exp(-inner)), 1.0 / (1.0 + tl.exp(inner))
    return gate * sigmoid, sigmoid + gate * sigmoid * complement * slope


@triton.jit  # type: ignore[untyped-decorator]
def _gated_forward(gate, up, out, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    activated, _ = _activate(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32), SILU)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)
    product = activated * tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, product.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_backward(grad, gate, up, grad_up, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    upstream = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activate(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32), SILU)
    activated = activated.to(gate.dtype.element_ty).to(tl.float32)
    through = (upstream * tl.load(up + i, mask=inside, other=0.0).to(tl.float32)).to(grad.dtype.element_ty)
    tl.store(grad_up + i, (upstream * activated).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad + i, (through.to(tl.float32) * slope).to(grad.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_token(
    x,
    out,
    x_head,
    heads,
    cos,
    sin,
    half,
    width,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Rotate the heads of one token at ``x``, which are ``x_head`` elements apart.

    Products are rounded to the wider dtype of x and cos, and sums to the dtype of x, as torch rounds them.
    """
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (i < half)
    low = tl.load(x + head * x_head + i, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + head * x_head + half + i, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + i, mask=i < half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + half + i, mask=i < half, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + i, mask=i < half, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + half + i, mask=i < half, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    if BACKWARD:
        across_low, across_high = high * sin_high, -(low * sin_low)
    else:
        across_low, across_high = -(high * sin_low), low * sin_high
    table = cos.dtype.element_ty
    low = (low * cos_low).to(table).to(tl.float32) + across_low.to(table).to(tl.float32)
    high = (high * cos_high).to(table).to(tl.float32) + across_high.to(table).to(tl.float32)
    tl.store(out + head * width + i, low.to(dtype), mask=inside)
    tl.store(out + head * width + half + i, high.to(dtype), mask=inside)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)[None, :]
        beyond = (head < heads) & (j < width)
        tl.store(out + head * width + j, tl.load(x + head * x_head + j, mask=beyond), mask=beyond)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _rotate(
    q,
    k,
    cos,
    sin,
    out_q,
    out_k,
    tokens,
    half,
    width,
    q_heads,
    k_heads,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    cos_row,
    cos_token,
    BACKWARD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    cos += row * cos_row + token * cos_token
    sin += row * cos_row + token * cos_token
    q += row * q_row + token * q_token
    k += row * k_row + token * k_token
    out_q += place * q_heads * width
    out_k += place * k_heads * width
    _rotate_token(q, out_q, q_head, q_heads, cos, sin, half, width, BACKWARD, Q_HEADS, HALF, REST)
    _rotate_token(k, out_k, k_head, k_heads, cos, sin, half, width, BACKWARD, K_HEADS, HALF, REST)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Return weight · x / rms(x) over the last dimension, and 1 / rms of each row.

    Args:
        x: (…, width).
        weight: (width,); ``offset`` is added to it.
        in_fp32: multiply by the weight in fp32 and round last; otherwise round the normed row first.

    Returns:
        The output in the shape of ``x``, and (…, 1), fp32.
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    dtype = x.dtype if in_fp32 else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    inv_rms = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    count, width = rows.shape
    tile, block = _tile_of(width)
    _rms_forward[(triton.cdiv(count, tile),)](
        rows,
        weight,
        out,
        inv_rms,
        count,
        width,
        eps,
        offset,
        FP32=in_fp32,
        ROWS=tile,
        BLOCK=block,
        **_launch_options(tile * block),
    )
    return out, inv_rms


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inv_rms: Tensor, *, offset: float) -> Tensor:
    """Return the gradient of x for a frozen weight, in the dtype and shape of x."""
    rows = x.contiguous().view(-1, x.shape[-1])
    out = torch.empty_like(rows)
    count, width = rows.shape
    tile, block = _tile_of(width)
    _rms_backward[(triton.cdiv(count, tile),)](
        grad.contiguous(),
        rows,
        weight,
        inv_rms,
        out,
        count,
        width,
        offset,
        ROWS=tile,
        BLOCK=block,
        **_launch_options(tile * block),
    )
    return out.view(x.shape)


def gated_product(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """Return activation(gate) · up; both steps round to the dtype of ``gate``, as in transformers."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    count = gate.numel()
    _gated_forward[(triton.cdiv(count, _BLOCK),)](
        gate, up, out, count, SILU=activation == "silu", BLOCK=_BLOCK, **_launch_options(_BLOCK)
    )
    return out


def gated_product_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: GatedActivation
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up.

    The gradient of gate overwrites ``grad``, which must be contiguous.
    """
    assert grad.is_contiguous()
    gate, up = gate.contiguous(), up.contiguous()
    grad_up = torch.empty_like(up)
    count = grad.numel()
    _gated_backward[(triton.cdiv(count, _BLOCK),)](
        grad,
        gate,
        up,
        grad_up,
        count,
        SILU=activation == "silu",
        BLOCK=_BLOCK,
        **_launch_options(_BLOCK),
    )
    return grad, grad_up


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys: ``x · cos + rotate_half(x) · sin`` over their first ``rotary`` columns.

    Args:
        q: (batch, heads, tokens, width), in any layout with adjacent columns; k may have fewer heads.
        cos: (1 or batch, tokens, rotary), in the dtype of q or fp32; rotary is even, and at most width.
        sin: like cos.
        backward: compute the gradients of q and k from those of the results instead.

    Returns:
        Both in the shapes of q and k, stored token by token as projections store them.
    """
    batch, _, tokens, width = q.shape
    rotary = cos.shape[-1]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (x.contiguous().expand(batch, -1, -1) for x in (cos, sin))
    out_q, out_k = (
        torch.empty((batch, tokens, x.shape[1], width), dtype=x.dtype, device=x.device) for x in (q, k)
    )
    q_heads, k_heads, half = (_power_of_2(size) for size in (q.shape[1], k.shape[1], rotary // 2))
    _rotate[(batch * tokens,)](
        q,
        k,
        cos,
        sin,
        out_q,
        out_k,
        tokens,
        rotary // 2,
        width,
        q.shape[1],
        k.shape[1],
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        BACKWARD=backward,
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        HALF=half,
        REST=_power_of_2(width - rotary) if rotary < width else 0,
        **_launch_options(q_heads * half),
    )
    return out_q.transpose(1, 2), out_k.transpose(1, 2)


def fits_row(width: int) -> bool:
    """Return whether a row of this width fits in one program."""
    return width <= _WIDEST_ROW


def _tile_of(width: int) -> tuple[int, int]:
    """Return rows and columns of one program's tile, both powers of two.

    A wide row has its own program; the short rows of head norms share one.
    """
    block = _power_of_2(width)
    return max(1, _BLOCK // block), block


def _launch_options(elements: int) -> dict[str, Any]:
    """Return launch options for a tile of ``elements``: the number of warps, and no fused multiply-add, so
    that products are rounded as in torch.
    """
    warps = min(max(elements // _ELEMENTS_PER_WARP, 4), 16)
    return {"num_warps": warps, "enable_fp_fusion": False}


def _power_of_2(size: int) -> int:
    return int(triton.next_power_of_2(size))
