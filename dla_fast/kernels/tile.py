"""What the kernels share on the device: addresses of a tile, the norm of a channel block, activations, dz.

A tile is (pixels, channels). Pixels are numbered through all images, so that small maps fill tiles too; a value lies at
``at(m, ...)[:, None] + along(c, ...)[None, :]``, in either layout. ``m`` is int64 where a tensor passes 2^31 values.

ALIGN is what is known to divide an image's pixels, 16 at most: as many neighbours of a contiguous map are one access.
Where a mask asks for the pixels of all images, they have to be ``multiple(total, ALIGN)``.
"""

import triton
import triton.language as tl


@triton.jit
def pixel_range(first, BM: tl.constexpr, I64: tl.constexpr):
    """Numbers of a tile's pixels, counted from ``first`` times its size."""
    if I64:
        first = tl.full((), 0, tl.int64) + first
    return first * BM + tl.arange(0, BM)


@triton.jit
def program_of(CL: tl.constexpr):
    """(group of tiles, block of channels) of a program: those that run at a time lie side by side in memory."""
    if CL:
        group, block = tl.program_id(1), tl.program_id(0)
    else:
        group, block = tl.program_id(0), tl.program_id(1)
    return group, block


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """``n``, which ALIGN divides, as a product from which the compiler sees it: widths of accesses follow from that."""
    if ALIGN > 1:
        n = n // ALIGN * ALIGN
    return n


@triton.jit
def at(m, pixels, channels, CL: tl.constexpr, ALIGN: tl.constexpr = 1):
    """Offset of channel 0 at each pixel; ``pixels`` of an image."""
    if CL:
        offset = m * channels
    else:
        pixels = multiple(pixels, ALIGN)
        offset = m // pixels * channels * pixels + m % pixels
    return offset


@triton.jit
def along(c, pixels, CL: tl.constexpr, I64: tl.constexpr, ALIGN: tl.constexpr = 1):
    """Offset of each channel from channel 0."""
    if I64:
        c = c.to(tl.int64)
    if CL:
        offset = c
    else:
        offset = c * multiple(pixels, ALIGN)
    return offset


@triton.jit
def inside(rows, cols, EVEN: tl.constexpr, WHOLE: tl.constexpr = False):
    """Mask of a tile. EVEN: its columns all exist, so that only rows are asked; WHOLE: its rows do. None for both."""
    if EVEN:
        mask = None if WHOLE else rows[:, None]
    else:
        mask = cols[None, :] if WHOLE else rows[:, None] & cols[None, :]
    return mask


@triton.jit
def fetch(pointer, mask):
    """A tile's values, zero outside the mask, if there is one."""
    if mask is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=mask, other=0.0)
    return value


@triton.jit
def read(pointer, mask, ACC: tl.constexpr):
    """:func:`fetch`, in the accumulation dtype."""
    return fetch(pointer, mask).to(ACC)


@triton.jit
def per_channel(pointer, c, mask, other: tl.constexpr, ACC: tl.constexpr):
    """A vector's values for a block of channels; ``other`` where there is no vector."""
    if pointer is None:
        value = tl.full(c.shape, other, ACC)
    else:
        value = tl.load(pointer + c, mask=mask, other=other).to(ACC)
    return value


@triton.jit
def finite_or_zero(x):
    """What sums are taken around: what an infinity adds up to is infinite, less itself it is NaN."""
    return tl.where(x - x == 0, x, 0.0)


@triton.jit
def reciprocal_deviation(var, EPS: tl.constexpr):
    """1 / sqrt(var + eps), rounded as exactly as the dtype allows: it scales every value of a channel."""
    if var.dtype == tl.float64:
        value = 1.0 / tl.sqrt(var + EPS)
    else:
        value = tl.div_rn(1.0, tl.sqrt_rn(var + EPS))
    return value


@triton.jit
def tf32(x, PRECISION: tl.constexpr):
    """float32 rounded to TF32 where a product reads no more of it: to nearest, ties away from zero, NaN as it is.

    Left to itself a matrix unit cuts off what it does not read: twice the error, and all of it toward zero. It costs
    three instructions a value, as cvt.rna.tf32 does. Loads stay asynchronous; on sm_90 a product then takes activations
    from registers, and weights go through shared memory a second time. Weights alone would save half the instructions,
    but none of the waiting (by the machine code; not measured).
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # Half a unit more than the bits of CUDA's NaN would be minus zero.
        x = tl.where(x == x, rounded, x)
    return x


# Comparisons are written so that NaN takes the branch that keeps it.
@triton.jit
def activate(u, ACT: tl.constexpr, SLOPE: tl.constexpr):
    if ACT == "relu":
        if u.dtype == tl.float64:
            u = tl.where(u < 0, 0.0, u)
        else:
            # One instruction.
            u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "leaky_relu":
        u = tl.where(u > 0, u, u * SLOPE)
    elif ACT == "silu":
        u = u / (1.0 + tl.exp(-u))
    elif ACT == "hardswish":
        t = u + 3.0
        t = tl.where(t < 0, 0.0, t)
        u = u * tl.where(t > 6, 6.0, t) / 6.0
    return u


@triton.jit
def activate_backward(u, dy, ACT: tl.constexpr, SLOPE: tl.constexpr):
    if ACT == "relu":
        dy = tl.where(u <= 0, 0.0, dy)
    elif ACT == "leaky_relu":
        dy = tl.where(u > 0, dy, dy * SLOPE)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-u))
        dy = dy * (s * (1.0 + u * (1.0 - s)))
    elif ACT == "hardswish":
        part = dy * (u / 3.0 + 0.5)
        dy = tl.where(u < -3, 0.0, tl.where(u > 3, dy, part))
    return dy


@triton.jit
def norm_of(mean, var, gamma, beta, c, cols, EPS: tl.constexpr, ACC: tl.constexpr):
    """A norm's coefficients for a block of channels: mean, 1 / sigma, gamma / sigma, beta. To be formed outside loops:
    a root and a division cost more than all the arithmetic of a value, and nothing hoists them past a store."""
    rstd = reciprocal_deviation(per_channel(var, c, cols, 1.0, ACC), EPS)
    scale = per_channel(gamma, c, cols, 1.0, ACC) * rstd
    return per_channel(mean, c, cols, 0.0, ACC), rstd, scale, per_channel(beta, c, cols, 0.0, ACC)


@triton.jit
def batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, c, cols, ACC: tl.constexpr):
    """What the batch's means of g and g * x_hat take from dz = scale * g - tilt * (z - mean) - drop: (tilt, drop).

    With frozen statistics there are no sums, and both are zero.
    """
    if sum_dy is not None:
        drop = (tl.load(sum_dy + c, mask=cols, other=0.0).to(tl.float64) * inverse_count).to(ACC) * scale
        tilt = (tl.load(sum_dy_xhat + c, mask=cols, other=0.0).to(tl.float64) * inverse_count).to(ACC) * rstd * scale
    else:
        drop, tilt = tl.zeros(c.shape, ACC), tl.zeros(c.shape, ACC)
    return tilt, drop


@triton.jit
def gradient_of(
    dy, z, residual, offset, mask, center, scale, shift, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gradient g before the activation of a tile, and z - mean, by the coefficients of :func:`norm_of`.

    Outside the mask g is zero, z - mean is not.
    """
    off = read(z + offset, mask, ACC) - center[None, :]
    grad = read(dy + offset, mask, ACC)
    if ACT != "identity":
        u = off * scale[None, :] + shift[None, :]
        if residual is not None:
            u += read(residual + offset, mask, ACC)
        grad = activate_backward(u, grad, ACT, SLOPE)
    return grad, off


@triton.jit
def dz_of(grad, off, scale, tilt, drop, FROZEN: tl.constexpr):
    """dz of a tile from :func:`gradient_of` and :func:`batch_terms`; FROZEN: there are no such terms."""
    dz = grad * scale[None, :]
    if not FROZEN:
        dz = dz - (off * tilt[None, :] + drop[None, :])
    return dz
