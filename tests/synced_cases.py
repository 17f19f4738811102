"""What ``test_synced.py`` runs on two processes: each computes the joint batch alone, op by op, and its part of it.

Each writes ``FOLDER/RANK.json``: of each case the errors of what it computed, and how many collectives it took.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from block_helpers import BasicBlock, BottleneckX, Small
from nn_helpers import randomise
from swap_helpers import Root
from test_swap_ida import DetectorIDAUp, SegmenterIDAUp
from torch import nn
from torch.nn import functional as F

import dla_fast
from dla_fast.nn.batch_norm_act import run_batch_norm_act
from dla_fast.nn.unit import run_unit

WORLD = 2
CALLS: list[str] = []


def count_collectives() -> None:
    def counted(name, run, *args, **kwargs):
        CALLS.append(name)
        return run(*args, **kwargs)

    for name in ("all_gather", "all_reduce"):
        setattr(dist, name, partial(counted, name, getattr(dist, name)))


class Unit(nn.Module):
    """A unit on its inputs, through the door of all units or op by op."""

    def __init__(self, conv, *, act="relu", residual=None, upsample=(), **norm):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels, **norm)
        self.act, self.residual, self.factors = act, residual, upsample
        channels = conv.in_channels // max(1, len(upsample))
        self.ups = nn.ParameterList([torch.randn(channels, 1, 2 * f, 2 * f) / f for f in upsample if f > 1])

    def forward(self, *xs):
        residual = self.residual
        if residual == "tensor":
            *xs, residual = xs
        weights = iter(self.ups)
        ups = [None if f == 1 else (next(weights), f) for f in self.factors]
        if dla_fast_runs:
            return run_unit(xs, self.conv, self.bn, act=self.act, residual=residual, upsample=ups or None)
        full = xs if not ups else [x if up is None else upsampled(x, *up) for x, up in zip(xs, ups, strict=True)]
        y = self.bn(self.conv(torch.cat(list(full), 1)))
        if residual is not None:
            y = y + (residual if isinstance(residual, torch.Tensor) else xs[residual])
        return {"relu": torch.relu, "silu": F.silu, "identity": lambda y: y}[self.act](y)


class NormAct(nn.Module):
    """A norm without a convolution that is fused before it."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x, residual):
        if dla_fast_runs:
            return run_batch_norm_act(x, self.bn, residual, "silu")
        return F.silu(self.bn(x) + residual)


class Range(nn.Module):
    """A ladder that writes into the list it is given."""

    def __init__(self):
        super().__init__()
        self.ladder = DetectorIDAUp()

    def forward(self, *layers):
        work = list(layers)
        self.ladder(work, 0, len(work))
        return work[-1]


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.ladder = SegmenterIDAUp()

    def forward(self, *layers):
        return self.ladder(list(layers))[0]


# Whether the modules above are fused.
dla_fast_runs = False


def upsampled(x, weight, factor):
    return F.conv_transpose2d(x, weight, None, factor, factor // 2, groups=x.shape[1])


def conv(inputs, outputs=6, kernel=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": options.get("dilation", 1) * (kernel // 2), **options})


def levels(images):
    return [(images, 6, 8, 8), (images, 8, 4, 4), (images, 5, 2, 2)]


def runs():
    layers = [layer for i in range(3) for layer in (conv(3 if i == 0 else 6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())]
    return nn.Sequential(*layers)


# Of each: what makes the module, shapes of the joint inputs, how many images are the first process's, units and options
# of swap_, None where the module is not to be swapped.
CASES = {
    "unit": (lambda: Unit(conv(6, 6, 3), residual=0), [(5, 6, 4, 3)], 2, 1, None),
    "inputs": (
        lambda: Unit(conv(13, bias=False), residual="tensor", act="silu"),
        [(5, 6, 4, 3), (5, 7, 4, 3), (5, 6, 4, 3)], 1, 1, None,
    ),
    "upsampled": (lambda: Unit(conv(12, 6, 3), upsample=(1, 2)), [(3, 6, 8, 4), (3, 6, 4, 2)], 2, 1, None),
    "strides": (lambda: Unit(conv(6, 4, 3, stride=2, dilation=2), act="identity"), [(4, 6, 9, 7)], 3, 1, None),
    "groups": (lambda: Unit(conv(6, 6, 3, groups=3)), [(4, 6, 5, 4)], 3, 1, None),
    "other convolution": (lambda: Unit(conv(6, 6, 2), residual=None), [(4, 6, 5, 4)], 1, 1, None),
    "average": (lambda: Unit(conv(6), momentum=None), [(4, 6, 5, 4)], 1, 1, None),
    "untracked": (lambda: Unit(conv(6), track_running_stats=False), [(4, 6, 5, 4)], 1, 1, None),
    "plain": (lambda: Unit(conv(6), affine=False, momentum=0.5, eps=0.1), [(4, 6, 5, 4)], 1, 1, None),
    "none here": (lambda: Unit(conv(6, 6, 3), residual=0), [(3, 6, 4, 3)], 0, 1, None),
    "none there": (lambda: Unit(conv(6, 6, 3, groups=2)), [(3, 6, 4, 3)], 3, 1, None),
    "one value each": (lambda: Unit(conv(6)), [(2, 6, 1, 1)], 1, 1, None),
    "norm": (NormAct, [(5, 6, 4, 3), (5, 6, 4, 3)], 2, 1, None),
    "norm of none": (NormAct, [(2, 6, 4, 3), (2, 6, 4, 3)], 0, 1, None),
    "root": (lambda: Root(18, 6, residual=True), [(4, 6, 5, 3)] * 3, 3, 1, {}),
    "sequential": (runs, [(4, 3, 5, 4)], 1, 3, {}),
    "block of none": (lambda: BasicBlock(8, 8), [(3, 8, 5, 4)], 0, 2, {}),
    "block": (lambda: BasicBlock(8, 8), [(4, 8, 5, 4)], 1, 2, {}),
    "bottleneck": (BottleneckX, [(4, 8, 5, 4)], 3, 3, {"memory": "low"}),
    "network": (Small, [(3, 3, 12, 8)], 1, 10, {}),
    "network, low": (Small, [(3, 3, 12, 8)], 2, 10, {"memory": "low"}),
    "ladder": (Levels, levels(3), 1, 4, {}),
    "ladder that adds": (Range, levels(3), 2, 4, {}),
}  # fmt: skip


def inputs_of(shapes):
    return [torch.randn(shape, dtype=torch.float64) + 0.5 for shape in shapes]


def converted(module, **options):
    return nn.SyncBatchNorm.convert_sync_batchnorm(module, **options)


def error(got, want) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1))


def step(module, xs, dy, own):
    """Outputs, gradients of inputs and parameters, and buffers, of some of the images."""
    leaves = [x[own].clone().requires_grad_() for x in xs]
    module.zero_grad()
    y = module(*leaves)
    y.backward(dy[own])
    return y, [x.grad for x in leaves], [p.grad for p in module.parameters()], list(module.buffers())


def joint(rank, name, backend, first) -> dict:
    """A case on both processes, beside the joint batch on this one alone; first: converted before it is swapped."""
    global dla_fast_runs
    make, shapes, split, units, options = CASES[name]
    torch.manual_seed(1)
    made = make()
    simple = name in ("untracked", "plain")
    module = (made if simple else randomise(made)).double()
    twin = copy.deepcopy(module)
    CALLS.clear()
    if options is not None:
        twin = converted(twin) if first else twin
        report = dla_fast.swap_(twin, verify=backend == "auto", **options)
        assert report.swapped, str(report)
    twin = converted(twin)
    found = {"collectives of swap_": list(CALLS), "errors": {}, "calls": []}
    own = slice(0, split) if rank == 0 else slice(split, None)
    for _ in range(2):
        xs = inputs_of(shapes)
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(module)(*xs))
        dla_fast_runs = False
        y, dxs, dps, buffers = step(module, xs, dy, slice(None))
        dla_fast_runs = True
        CALLS.clear()
        with dla_fast.use_backend(backend):
            got_y, got_dxs, got_dps, got_buffers = step(twin, xs, dy, own)
        dla_fast_runs = False
        found["calls"].append(list(CALLS))
        for grad in got_dps:
            dist.all_reduce(grad)
        errors = found["errors"]
        for kind, got, want in (
            ("outputs", [got_y], [y[own]]),
            ("inputs", got_dxs, [dx[own] for dx in dxs]),
            ("parameters", got_dps, dps),
            ("buffers", got_buffers, buffers),
        ):
            worst = max((error(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
            errors[kind] = max(errors.get(kind, 0.0), worst)
    found["units"] = units
    return found


def groups(rank) -> dict:
    """A group of its own for both, and one for each."""
    both, alone = dist.new_group([0, 1]), [dist.new_group([i]) for i in range(WORLD)][rank]
    torch.manual_seed(1)
    module = randomise(Root(12, 6)).double()
    xs = inputs_of([(4, 6, 5, 3)] * 2)
    own = slice(0, 1) if rank == 0 else slice(1, None)
    found = {}
    for name, group, part in (("both", both, slice(None)), ("alone", alone, own)):
        twin = converted(copy.deepcopy(module), process_group=group)
        CALLS.clear()
        assert dla_fast.swap_(twin).swapped
        want = copy.deepcopy(module)(*[x[part] for x in xs])
        found[name] = error(twin(*[x[own] for x in xs]), want[own] if name == "both" else want)
        found[f"{name}, calls"] = list(CALLS)
    # In evaluation it is the stock module, which then runs on a CPU.
    twin, kept = (converted(copy.deepcopy(module)).eval() for _ in range(2))
    dla_fast.swap_(twin)
    CALLS.clear()
    found["evaluation"] = error(twin(*xs), kept(*xs))
    twin.bn.running_mean = twin.bn.running_var = kept.bn.running_mean = kept.bn.running_var = None
    found["evaluation of a batch"] = error(twin(*xs), kept(*xs))
    found["evaluation, calls"] = list(CALLS)
    return found


def parallel(rank) -> dict:
    """Two steps of DistributedDataParallel, beside those of one process with all images."""
    torch.manual_seed(1)
    module = randomise(Small()).double()
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    twin = nn.parallel.DistributedDataParallel(twin)
    # It refuses such norms on a CPU, where PyTorch's own do not run.
    converted(twin.module)
    own = slice(0, 2) if rank == 0 else slice(2, None)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (module, twin)]
    for _ in range(2):
        (x,) = inputs_of([(4, 3, 12, 8)])
        for m, part, optimizer in zip((module, twin), (slice(None), own), optimizers, strict=True):
            optimizer.zero_grad()
            m(x[part]).square().mean().backward()
            optimizer.step()
    got, want = twin.module.state_dict(), module.state_dict()
    return {name: error(got[name], want[name]) for name in want}


def low_precision(rank) -> dict:
    """Halves of a batch in few digits, beside the whole in those of float64."""
    torch.manual_seed(1)
    module = randomise(Small())
    x = torch.randn(4, 3, 12, 8)
    own = slice(0, 1) if rank == 0 else slice(1, None)
    want = copy.deepcopy(module).double()(x.double())
    found = {}
    for backend in ("auto", "reference"):
        for name, dtype in (("float32", torch.float32), ("autocast", torch.bfloat16)):
            twin = converted(copy.deepcopy(module))
            assert dla_fast.swap_(twin).swapped
            on = torch.autocast("cpu", dtype) if name == "autocast" else contextlib.nullcontext()
            with dla_fast.use_backend(backend), on:
                y = twin(x[own])
            y.float().square().sum().backward()
            assert all(p.grad.isfinite().all() for p in twin.parameters())
            found[f"{backend}, {name}"] = [str(y.dtype), error(y.double(), want[own])]
    return found


def told(rank) -> dict:
    """What is raised, on both processes."""
    found = {}

    def ask(name, call):
        try:
            call()
            found[name] = ""
        except Exception as raised:
            found[name] = f"{type(raised).__name__}: {raised}"

    unit = converted(Unit(conv(6))).double()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    few = torch.randn(1 - rank, 6, 1, 1, dtype=torch.float64)
    twos = torch.ones(2, dtype=torch.float64)
    for backend in ("auto", "reference"):
        with dla_fast.use_backend(backend):
            before = copy.deepcopy(unit.state_dict())
            ask(f"{backend}, one value", lambda: unit(few))
            # The batch is counted, as PyTorch does before it looks; nothing else is written.
            assert [k for k, v in unit.state_dict().items() if not torch.equal(v, before[k])] == [
                "bn.num_batches_tracked"
            ]
            nothing = unit(x[:0])
            found[f"{backend}, nothing"] = list(nothing.shape)
            changed = [k for k, v in unit.state_dict().items() if not torch.equal(v, before[k])]
            found[f"{backend}, nothing changes"] = changed
            ask(f"{backend}, twice", lambda: torch.autograd.grad(unit(x).sum(), x, create_graph=True))
            ask(f"{backend}, batched", lambda: torch.autograd.grad(unit(x).sum(), x, twos, is_grads_batched=True))
    # Where a call is taken apart the module runs, which wants no tensors of a CPU.
    ask("transformed", lambda: torch.func.grad(lambda x: unit(x).sum())(x))
    ask("traced", lambda: torch.jit.trace(unit, x))
    return found


def wanted(rank) -> dict:
    """The collectives of calls whose gradients are not all wanted, and the norm's where they alone are."""
    torch.manual_seed(1)
    module = randomise(Unit(conv(6, 6, 3), residual=0)).double()
    (x,) = inputs_of([(4, 6, 4, 3)])
    own = slice(0, 1) if rank == 0 else slice(1, None)
    unit = converted(copy.deepcopy(module))
    found = {}
    for backend in ("auto", "reference"):
        with dla_fast.use_backend(backend):
            CALLS.clear()
            with torch.no_grad():
                unit(x[own])
            found[f"{backend}, none"] = list(CALLS)
            for m in (module, unit):
                m.requires_grad_(False).bn.requires_grad_(True).zero_grad()
            CALLS.clear()
            unit(x[own]).square().sum().backward()
            found[f"{backend}, norm"] = list(CALLS)
            got = [p.grad for p in unit.bn.parameters()]
            for grad in got:
                dist.all_reduce(grad)
        torch.relu(module.bn(module.conv(x)) + x).square().sum().backward()
        want = [p.grad for p in module.bn.parameters()]
        found[f"{backend}, error"] = max(map(error, got, want))
    return found


def failing(rank) -> dict:
    """One process fails before it asks the other, and ends; the other is told."""
    unit = converted(Unit(conv(6))).double()
    try:
        unit(torch.randn(2, 6 if rank == 0 else 5, 4, 3, dtype=torch.float64))
    except Exception as raised:
        return {"raised": type(raised).__name__}
    return {"raised": ""}


def main(rank: int, folder: str) -> None:
    global dla_fast_runs
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    count_collectives()
    results: dict = {"joint": {}}
    for name, case in CASES.items():
        for backend in ("auto", "reference"):
            for first in (True, False) if case[-1] is not None and backend == "auto" else (True,):
                key = f"{name} on {backend}, {'converted first' if first else 'swapped first'}"
                results["joint"][key] = joint(rank, name, backend, first)
    dla_fast_runs = True
    for run in (groups, parallel, low_precision, wanted, told, failing):
        results[run.__name__] = run(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
