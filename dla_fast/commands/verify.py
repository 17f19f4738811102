"""``python -m dla_fast verify``: parity and gradients of every op on this machine."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from dla_fast import backend
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Row:
    """One line of the table: an op on a backend in a dtype, over layouts, modes and variants."""

    op: str
    backend: str
    device: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    missed: str = ""

    @property
    def ok(self) -> bool:
        return not self.missed


def _specs(op: str, dtype: torch.dtype) -> Iterator[Spec]:
    for layout, training in itertools.product(parity.LAYOUTS, (True, False)):
        common: dict[str, Any] = {"dtype": dtype, "layout": layout, "training": training}
        if op in ("aggregate", "batch_norm_act"):
            # Every pair of activation and residual, in one of the modes: on a GPU each is kernels to compile.
            for act, residual in (("relu", training), ("silu", not training)):
                yield Spec(
                    **common, channels=(64, 24, 5), out_channels=64, height=9, width=17, act=act, residual=residual
                )
            yield Spec(**common, channels=(5,), out_channels=24, act="hardswish", conv_bias=True)
        elif op == "merge":
            for kernel in (1, 3):
                yield Spec(**common, channels=(8, 8), out_channels=8, height=5, width=6, kernel=kernel)
        elif op == "conv_norm_act":
            common |= {"channels": (8, 8), "out_channels": 8, "height": 5, "width": 6}
            yield Spec(**common, kernel=3, stride=2, residual=True, act="silu")
            yield Spec(**common, kernel=3, dilation=2, residual_input=1)
            yield Spec(**common, kernel=1, stride=2)
            yield Spec(**common, kernel=1, residual=True)
            yield Spec(**common, kernel=5, groups=2)
        elif training:
            for factor in (2, 3, 4):
                yield Spec(**common, out_channels=24, factor=factor)


@dataclass(frozen=True)
class Job:
    """What makes one row.

    Attributes:
        op: one of :data:`dla_fast.backend.OPS`.
        backend: who serves it.
        device: a device type.
        dtype: of the tensors; None stands for gradcheck.
        tf32: products of float32 may be TF32; else they are exact.
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype | None
    tf32: bool = False

    @property
    def kind(self) -> str:
        """What stands under ``dtype`` in the table."""
        if self.dtype is None:
            return "gradcheck"
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """The job in a few words."""
        return f"{self.op} {self.backend} {self.kind}"

    def __iter__(self) -> Iterator[Any]:
        """As (op, backend, device, dtype)."""
        return iter((self.op, self.backend, self.device, self.dtype))

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


def _row(job: Job) -> Row:
    return Row(job.op, job.backend, job.device, job.kind)


def _parity_row(job: Job, dtype: torch.dtype) -> Row:
    row, pool = _row(job), parity.Pool(job.device)
    for spec in _specs(job.op, dtype):
        pool.add(parity.PROBLEMS[job.op](spec))
        if job.op in parity.PRODUCTS and not spec.training:
            pool.add_inference(parity.PROBLEMS[job.op](spec))
    row.cases, row.worst, row.missed = pool.cases, pool.worst(), pool.failures().split("\n")[0]
    return row


def gradient_problems(op: str, device: str) -> Iterator[tuple[Callable[..., Tensor], list[Tensor], Spec]]:
    """An op as gradcheck wants it, in both layouts and with both kinds of statistics: function, inputs, description."""
    for layout, training in itertools.product(parity.LAYOUTS, (True, False)):
        geometry: dict[str, Any] = {"kernel": 3, "stride": 2} if op == "conv_norm_act" else {}
        spec = Spec(
            dtype=torch.float64,
            layout=layout,
            channels=(3, 2),
            out_channels=3,
            height=2,
            width=3,
            act="silu",
            training=training,
            residual=op != "merge",
            **geometry,
        )
        yield *parity.gradient_function(parity.PROBLEMS[op](spec), device), spec


def _gradient_row(job: Job) -> Row:
    row = _row(job)
    for run, inputs, spec in gradient_problems(job.op, job.device):
        row.cases += 1
        try:
            torch.autograd.gradcheck(run, inputs)
            torch.autograd.gradgradcheck(run, inputs)
        except GradcheckError as error:
            row.missed = row.missed or f"{spec}: {str(error).strip().splitlines()[0]}"
    return row


def _work(devices: Sequence[str]) -> list[tuple[str, str, str]]:
    """Every op on every backend that can run it here, and the reference where none can."""
    work = []
    for op, device in itertools.product(backend.OPS, devices):
        able = [n for n in backend.BACKENDS[1:] if backend.can_run(n, op, device, torch.float32) is None]
        work += [(op, name, device) for name in able or ["reference"]]
    return work


def jobs(ops: Sequence[str] = backend.OPS, devices: Sequence[str] | None = None) -> list[Job]:
    """All there is to check on some devices; by default on all that this machine has."""
    found = []
    for op, name, device in _work(devices or ["cpu"] + ["cuda"] * torch.cuda.is_available()):
        for dtype in (*DTYPES, None):
            if op in ops and backend.can_run(name, op, device, dtype or torch.float64) is None:
                found.append(Job(op, name, device, dtype))
                if dtype == torch.float32 and parity.rounds_products(op, name, device):
                    found.append(Job(op, name, device, dtype, tf32=True))
    return found


def check(job: Job) -> Row:
    """Do one of the :func:`jobs`."""
    with backend.use_backend(job.backend), parity.fp32_precision("tf32" if job.tf32 else "ieee"):
        return _gradient_row(job) if job.dtype is None else _parity_row(job, job.dtype)


def render(rows: list[Row]) -> str:
    """The rows as an aligned table."""
    table = [["op", "backend", "device", "dtype", "cases", "worst error / bound", ""]]
    for r in rows:
        worst = "" if r.dtype == "gradcheck" else f"{r.worst:.2f}"
        table.append([r.op, r.backend, r.device, r.dtype, str(r.cases), worst, "ok" if r.ok else f"MISS {r.missed}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1] + [0]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``verify``."""
    parser.add_argument("--ops", nargs="+", default=list(backend.OPS), choices=backend.OPS, metavar="OP")


def run(args: argparse.Namespace) -> int:
    """Check everything; 0 when every result holds, 1 on a miss, 130 if interrupted: what was checked is shown."""
    from tqdm import tqdm

    work, rows, interrupted = jobs(args.ops), list[Row](), False
    try:
        for job in tqdm(work, unit="check", disable=not sys.stderr.isatty(), leave=False):
            rows.append(check(job))
    except KeyboardInterrupt:
        interrupted = True
    print(render(rows))
    missed = [r for r in rows if not r.ok]
    print(
        f"verify: {len(rows) - len(missed)} of {len(rows)} hold; the bound is twice PyTorch's own error against "
        "float64 plus the rounding of the result; tf32: of its ops with operands rounded to TF32; gradcheck and "
        "gradgradcheck in float64"
    )
    if interrupted:
        print(f"verify: interrupted; {len(rows)} of {len(work)} were checked", file=sys.stderr)
        return 130
    return 1 if missed else 0
