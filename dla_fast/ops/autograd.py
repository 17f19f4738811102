"""Autograd formulas for operators that also update running statistics.

``torch.library.register_autograd`` refuses operators with mutable arguments, so the formula is registered at the
Autograd key by hand: a ``torch.autograd.Function`` in ``setup_context`` style around a redispatch below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dla_fast.ops.layout import accumulation_dtype


class Differentiable(Protocol):
    """What an operator brings: its kernel, how to remember its inputs, and its backward."""

    def forward(self, *args: Any) -> Any: ...

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]: ...


def requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is computed of these tensors has to be differentiable."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether functorch is about, or has wrapped one of these tensors, which it stays when a transform is over."""
    if torch._C._are_functorch_transforms_active():
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(t is not None and wrapped(t) for t in tensors)


def by_reference(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass is one that kernels cannot do, see :func:`second_order`.

    It is differentiated itself (``create_graph=True``, forward mode), or runs for a batch of gradients at once: what
    ``is_grads_batched=True``, ``vectorize=True`` and :func:`torch.vmap` hand out are no tensors that a kernel can read.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    for t in grads:
        if t is not None:
            # Of a batch is the first of them, or none.
            return _is_wrapped(t) or _is_batched(t)
    return False


_is_wrapped, _is_batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor


def register_autograd(
    library: torch.library.Library, op: Any, formula: Differentiable, *, differentiable: int, lists: int = 0
) -> Callable[..., Any]:
    """Register ``formula`` at the Autograd key of ``op``.

    Args:
        library: the library that defines the operator.
        op: the overload, whose first or only output is the differentiable one.
        formula: see :class:`Differentiable`; its backward returns one gradient per differentiable input, those of a
            list one by one.
        differentiable: how many leading arguments can have a gradient; the rest is handed through as it is.
        lists: how many of those, from the first on, are lists of tensors.

    Returns:
        The operator for eager calls, of whose outputs only the first is to be used: the same kernels and formula,
        called from here instead of through the dispatcher, whose two round trips cost more than the launch of a kernel.
    """

    def nest(flat: tuple[Any, ...], lengths: tuple[int, ...]) -> tuple[Any, ...]:
        if not lengths:
            return flat
        nested: list[Any] = []
        start = 0
        for length in lengths:
            nested.append(list(flat[start : start + length]))
            start += length
        return (*nested, *flat[start:])

    def flatten(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if lists == 0:
            return args[:differentiable]
        return (*chain.from_iterable(args[:lists]), *args[lists:differentiable])

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(run: Callable[..., Any], rest: tuple[Any, ...], lengths: tuple[int, ...], *flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return run(*nest(flat, lengths), *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
            formula.setup_context(ctx, (*nest(inputs[3:], inputs[2]), *inputs[1]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if grads[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            return (None, None, None, *formula.backward(ctx, grads[0], list(ctx.needs_input_grad[3:])))

    class Eager(torch.autograd.Function):
        """:class:`Function` where no transform is about: what is saved beside the first output stays inside."""

        @staticmethod
        def forward(ctx: Any, args: tuple[Any, ...], *flat: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = formula.forward(*args)
            ctx.set_materialize_grads(False)
            formula.setup_context(ctx, args, output)
            return output[:1] if isinstance(output, tuple) else output

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
            if dy is None:
                return (None,) * len(ctx.needs_input_grad)
            return (None, *formula.backward(ctx, dy, list(ctx.needs_input_grad[1:])))

    # Function.apply inspects forward's signature for defaults, on every call: a third of a small call's time.
    apply_eager = super(torch.autograd.Function, Eager).apply  # type: ignore[misc]

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        run = partial(op.redispatch, keyset & torch._C._after_autograd_keyset)
        flat = flatten(args)
        if requires_grad(flat):
            return Function.apply(run, args[differentiable:], tuple(map(len, args[:lists])), *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    def eager(*args: Any) -> Any:
        flat = flatten(args)
        if requires_grad(flat):
            if is_transformed(flat):
                return Function.apply(formula.forward, args[differentiable:], tuple(map(len, args[:lists])), *flat)
            return apply_eager(args, *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return formula.forward(*args)

    library.impl(op._schema.name.split("::")[1], autograd_kernel, "Autograd", with_keyset=True)
    return eager


def frozen_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, conv_bias: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of z and the variance that frozen running statistics stand for, as new tensors."""
    assert running_mean is not None
    assert running_var is not None
    dtype = accumulation_dtype(z.dtype)
    mean = running_mean.to(dtype, copy=True)
    if conv_bias is not None:
        mean = mean - conv_bias.to(dtype)
    return mean, running_var.to(dtype, copy=True)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def norm_gradients(
    ctx: Any,
    sums: tuple[Tensor | None, Tensor | None],
    var: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution's bias, gamma and beta from sum(dy') and sum(dy' * x_hat)."""
    sum_dy, sum_dy_xhat = sums
    need_bias, need_gamma, need_beta = needed
    dbias = dgamma = dbeta = None
    if need_bias and conv_bias is not None:
        assert sum_dy is not None
        if ctx.training:
            assert sum_dy_xhat is not None
            # Zero, unless something is not finite.
            dbias = cast(sum_dy_xhat * 0, conv_bias.dtype)
        else:
            scale = (var + ctx.eps).rsqrt() if bn_weight is None else bn_weight * (var + ctx.eps).rsqrt()
            dbias = (sum_dy * scale).to(conv_bias.dtype)
    if need_gamma and bn_weight is not None and sum_dy_xhat is not None:
        dgamma = cast(sum_dy_xhat, bn_weight.dtype)
    if need_beta and bn_bias is not None and sum_dy is not None:
        dbeta = cast(sum_dy, bn_bias.dtype)
    return dbias, dgamma, dbeta


def second_order(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """First-order gradients that can be differentiated again, or of a batch of gradients: through the reference.

    Mean and variance are functions of z there, so second derivatives are complete. Kernels serve first order only.

    Args:
        run: what the operator computes, of ``inputs``: a tensor or several.
        inputs: as they were given.
        needed: whose gradients are wanted.
        grads: one for each of what ``run`` gives, None where nothing came back.
    """
    device = next(t.device.type for t in inputs if t is not None)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # One input may come from another: what goes through that is not this operator's.
        own = [t.view_as(t) if n and t is not None else t for t, n in zip(inputs, needed, strict=True)]
        wanted = [t for t, n in zip(own, needed, strict=True) if n and t is not None]
        made = run(*own)
        outputs = made if isinstance(made, tuple) else (made,)
        there = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if dy is not None]
        ys, dys = zip(*there, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=differentiable, allow_unused=True))
    return [next(found) if n and t is not None else None for t, n in zip(inputs, needed, strict=True)]
