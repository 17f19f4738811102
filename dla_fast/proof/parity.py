"""The numerical contract, as code: what ``verify`` and the tests hold every backend to.

The error of a result is measured against the same op in float64 torch ops, and may be at most twice that of PyTorch's
own unfused ops in the same dtype and layout, plus half a unit in the last place of the largest value: the rounding of
the stored result, which no implementation can go below. Outputs, every gradient and the running statistics are held
to it, in the maximum and in the root-mean-square norm. Errors are pooled over the cases of one shape: the largest of a
few rounding errors is a matter of luck (two equally good orders of summation differ threefold in it), while over many
cases it is not; a wrong result is wrong by orders of magnitude and shows in any pool. For float64 itself there is
nothing more exact to compare with, and the bound is a fixed 1e-10 of the largest value.

Where products of float32 may be TF32 (``torch.backends.cudnn.conv.fp32_precision``), PyTorch's error is that of its ops
with operands rounded to TF32, or its own if that is larger: cuDNN picks a kernel without TF32 for one shape and one
with it for the next, while ours rounds always. Operands that are cut off instead miss the bound. Ops without products
are held to float32's own error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_fast import functional, reference
from dla_fast.ops.precision import fp32_precision
from dla_fast.proof import tf32
from dla_fast.proof.problems import (
    KINKS,
    LAYOUTS,
    PROBLEMS,
    PRODUCTS,
    Problem,
    Spec,
    aggregate,
    batch_norm_act,
    conv_norm_act,
    merge,
    rounds_products,
    safe_gradient,
    upsample,
    upsample_add,
)

# Problems too: who holds an op to the contract takes both from here.
__all__ = [
    "KINKS",
    "LAYOUTS",
    "PROBLEMS",
    "PRODUCTS",
    "Errors",
    "Pool",
    "Problem",
    "Spec",
    "aggregate",
    "batch_norm_act",
    "conv_norm_act",
    "execute",
    "fp32_precision",
    "gradient_function",
    "infer",
    "merge",
    "rounds_products",
    "safe_gradient",
    "upsample",
    "upsample_add",
]


@dataclass
class Errors:
    """Errors of one tensor over a pool of cases: dla_fast's and PyTorch's own, and the largest value there is."""

    eps: float
    largest: float = 0.0
    peer_largest: float = 0.0
    squares: float = 0.0
    peer_squares: float = 0.0
    values: int = 0
    scale: float = 0.0
    worst_case: str = ""

    def add(self, mine: Tensor, peer: Tensor, scale: float, case: str) -> None:
        """Add the errors of a case, elementwise."""
        if mine.numel() == 0:
            return
        largest = mine.abs().max().item()
        # Written so that NaN counts as the largest there is.
        if not largest <= self.largest:
            self.largest, self.worst_case = largest, case
        self.peer_largest = max(self.peer_largest, peer.abs().max().item())
        self.squares += mine.square().sum().item()
        self.peer_squares += peer.square().sum().item()
        self.values += mine.numel()
        self.scale = max(self.scale, scale)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(norm, error, PyTorch's error, bound) in both norms, in units of the largest value."""
        unit, n = self.scale or 1.0, max(self.values, 1)
        out = []
        for norm, error, peer in (
            ("max", self.largest / unit, self.peer_largest / unit),
            ("rms", math.sqrt(self.squares / n) / unit, math.sqrt(self.peer_squares / n) / unit),
        ):
            double = self.eps == torch.finfo(torch.float64).eps
            out.append((norm, error, peer, 1e-10 if double else 2 * peer + self.eps / 2))
        return out


class Pool:
    """Compares ``dla_fast.functional`` with the contract over many cases."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.errors: dict[str, Errors] = {}
        self.cases = 0

    def add(self, problem: Problem) -> None:
        """Run one problem, forward and backward, on the backend in force, and keep its errors."""
        dy = safe_gradient(problem, self.device)
        self._add(problem, dy, lambda module, dtype: execute(problem, module, dy, dtype))

    def add_inference(self, problem: Problem) -> None:
        """Run one problem without gradients, which other kernels serve, and keep the errors of its output."""
        name = "y of inference"
        self._add(problem, None, lambda module, dtype: {name: infer(problem, module, dtype, self.device)})

    def _add(
        self, problem: Problem, dy: Tensor | None, run: Callable[[Any, torch.dtype | None], dict[str, Tensor]]
    ) -> None:
        self.cases += 1
        exact = run(reference, torch.float64)
        mine = run(functional, None)
        # cuDNN's transposed convolutions use TF32 too; an op that is nothing else uses none here.
        with contextlib.nullcontext() if problem.op in PRODUCTS else fp32_precision("ieee"):
            peer = run(reference, None)
        rounding = {}
        if problem.in_tf32(self.device):
            with fp32_precision("ieee"), tf32.RoundedProducts():
                rounding = run(reference, None)
        for name, value in exact.items():
            dtype = problem.dtypes.get(name.removeprefix("d "), problem.spec.dtype)
            scale = value.abs().max().item() if value.numel() else 0.0
            if problem.spec.training and name == "d conv_bias" and dy is not None:
                # Truly zero: measured against the size of the terms that cancel.
                scale = math.sqrt(dy[:, 0].numel())
            if value.isfinite().all() and not peer[name].isfinite().all():
                # PyTorch itself fails: its bfloat16 convolutions on processors with matrix units now and then multiply
                # memory that nobody wrote by zero. The yardstick is then the exact result, rounded.
                peer[name] = value.to(dtype).double()
            if rounding and (rounding[name] - value).norm() > (peer[name] - value).norm():
                peer[name] = rounding[name]
            errors = self.errors.setdefault(name, Errors(torch.finfo(dtype).eps))
            errors.add(mine[name] - value, peer[name] - value, scale, str(problem.spec))

    def worst(self) -> float:
        """The largest ratio of an error to its bound."""
        return max((error / bound for e in self.errors.values() for _, error, _, bound in e.rows()), default=0.0)

    def failures(self) -> str:
        """What misses its bound, a line each; empty when all holds."""
        return "\n".join(
            f"{name} ({norm}): error {error:.2e} over bound {bound:.2e} (PyTorch {peer:.2e}); largest in {e.worst_case}"
            for name, e in self.errors.items()
            for norm, error, peer, bound in e.rows()
            if not error <= bound
        )


def execute(problem: Problem, module: Any, dy: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output, gradients and buffers of the op on ``module`` (functional or reference), as float64 tensors."""
    tensors = problem.materialise(dtype, dy.device)
    y = problem.call(module, tensors, None)
    layout = LAYOUTS[problem.spec.layout]
    y.backward(dy.to(dtype=y.dtype, memory_format=layout))
    out = {"y": y.detach().double()}
    for name, t in tensors.items():
        if name in problem.buffers:
            out[name] = t.double()
        else:
            assert t.grad is not None, f"no gradient for {name}"
            assert t.grad.dtype == t.dtype
            assert t.grad.shape == t.shape
            out[f"d {name}"] = t.grad.double()
    return out


def infer(problem: Problem, module: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Output of the op on ``module`` without gradients, as float64."""
    tensors = problem.materialise(dtype, device)
    with torch.no_grad():
        return problem.call(module, tensors, None).double()


def gradient_function(
    problem: Problem, device: torch.device | str = "cpu"
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as gradcheck wants it: a function of its differentiable tensors in float64, and those tensors."""
    tensors = problem.materialise(torch.float64, torch.device(device))
    names = problem.differentiable

    def run(*values: Tensor) -> Tensor:
        # Fresh buffers: gradcheck calls many times, and a call must not see what another wrote.
        fresh = {name: tensors[name].clone() for name in problem.buffers}
        return problem.call(functional, {**fresh, **dict(zip(names, values, strict=True))}, None)

    return run, [tensors[name] for name in names]
