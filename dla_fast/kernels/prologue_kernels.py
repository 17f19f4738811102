"""An input that is z of the unit before, on the device: y = act(norm(z) + residual) as it is loaded, and its way back.

``coefficients_kernel`` writes mean, gamma / sigma, beta and 1 / sigma of C channels one behind another: 16 C bytes, so
that a loop over blocks of channels neither roots nor divides, and none keeps them in registers. The rest are parts of
the kernels of a 1 x 1 node, where z and the residual lie as the input does; about 10 flops a value, and no bytes but
the residual's.

y is rounded as the tail would store it, and zero where z is not there.
"""

import triton
import triton.language as tl

from dla_fast.kernels.tile import activate, activate_backward, fetch, inside, norm_of, read


@triton.jit
def coefficients_kernel(
    mean, var, gamma, beta, norm, channels, B: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * B + tl.arange(0, B)
    cols = c < channels
    center, rstd, scale, shift = norm_of(mean, var, gamma, beta, c, cols, EPS, ACC)
    tl.store(norm + c, center, mask=cols)
    tl.store(norm + channels + c, scale, mask=cols)
    tl.store(norm + 2 * channels + c, shift, mask=cols)
    tl.store(norm + 3 * channels + c, rstd, mask=cols)


@triton.jit
def coefficients_of(norm, channels, c, mask):
    """Center, scale and shift of a block of channels, zero outside the mask; 1 / sigma follows them."""
    return fetch(norm + c, mask), fetch(norm + channels + c, mask), fetch(norm + 2 * channels + c, mask)


@triton.jit
def raised(z, residual, offset, mask, center, scale, shift, ACC: tl.constexpr):
    """z - mean of a tile that has been loaded, and what is activated; ``offset`` is where it lay."""
    off = z.to(ACC) - center[None, :]
    u = off * scale[None, :] + shift[None, :]
    if residual is not None:
        u += read(residual + offset, mask, ACC)
    return off, u


@triton.jit
def formed(
    z, residual, offset, mask, center, scale, shift, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """y of a tile that has been loaded, zero outside the mask."""
    _, u = raised(z, residual, offset, mask, center, scale, shift, ACC)
    y = activate(u, ACT, SLOPE)
    if mask is not None:
        y = tl.where(mask, y, 0.0)
    return y.to(z.dtype)


@triton.jit
def formed_if(
    own, z, residual, offset, mask, rows, kin, center, scale, shift,
    EVEN_K: tl.constexpr, ONLY: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """:func:`formed` where the tile is ``own``, else the tile; ONLY: there is no other input that it could be of."""
    if ONLY:
        z = formed(z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
    else:
        # Of another input's tile nothing more is loaded.
        there = inside(rows & own, kin, EVEN_K)
        z = tl.where(own, formed(z, residual, offset, there, center, scale, shift, ACT, SLOPE, ACC), z)
    return z


@triton.jit
def passed_back(
    grad, z, residual, offset, mask, center, scale, shift,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the gradient of y that of what is activated, and its sums over the tile, alone and times z - mean."""
    off, u = raised(z, residual, offset, mask, center, scale, shift, ACC)
    grad = activate_backward(u, grad, ACT, SLOPE)
    if mask is not None:
        grad = tl.where(mask, grad, 0.0)
    return grad, tl.sum(grad, 0), tl.sum(grad * off, 0)


@triton.jit
def is_of(block, blocks, i: tl.constexpr):
    """Whether a block of channels is one of input i."""
    return (block >= blocks[i]) & (block < blocks[i + 1])
