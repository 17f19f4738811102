"""Is it right? Parity of every op and dtype, determinism, graphs, torch.compile, whole networks in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case, Found, Setting, passed
from dla_fast import backend, functional, swap_
from dla_fast.bench import cases, network_timing, networks, timing
from dla_fast.commands import verify
from dla_fast.nn import AggregationNode
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

_REPEATS = 10
# Of verify's rows so many are taken where the smallest shapes alone are run.
EVERY = 9


def served(op: str, setting: Setting, dtype: torch.dtype) -> list[str]:
    """The backends that run an op on the setting's device."""
    device = setting.device.type
    return [b for b in backend.BACKENDS if b != "reference" and backend.can_run(b, op, device, dtype) is None]


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def dla34_roots(small: bool) -> list[cases.Case]:
    """The six roots of dla34, at 224x224."""
    return cases.network_cases("dla34", 32 if small else 224)[: 2 if small else None]


def _root(case: cases.Case, batch: int, layout: str, setting: Setting) -> Found:
    """A root in all its passes, against float64: inference, then forward and every gradient."""
    label = f"{case.name} batch {batch} {name_of(setting.dtype)} {layout}"
    pool = parity.Pool(setting.device)
    for training in (False, True):
        problem = parity.PROBLEMS["aggregate"](case.spec(batch, setting.dtype, layout, training), setting.device)
        if training:
            pool.add(problem)
        else:
            pool.add_inference(problem)
    return passed(label, not pool.failures(), pool.failures() or f"worst error {pool.worst():.2f} of its bound")


def roots(setting: Setting) -> Iterator[Case]:
    """Block "roots": the six roots of dla34 in the dtype that is timed, in the sizes that are timed."""
    for case in dla34_roots(setting.small):
        batch = 2 if setting.small else 32
        yield Case(
            f"{case.name} parity", lambda case=case, batch=batch: _root(case, batch, "channels_last", setting), 2.0
        )
    # The largest maps once more as they are timed: their tiles are others.
    for case in dla34_roots(setting.small)[:1]:
        batch = 3 if setting.small else 256
        yield Case(
            f"{case.name} parity at batch {batch}",
            lambda case=case, batch=batch: _root(case, batch, "channels_last", setting),
            5.0,
        )


def _verified(setting: Setting) -> Iterator[Case]:
    """The rows of ``python -m dla_fast verify``."""
    work = verify.jobs(devices=[setting.device.type])
    for job in work[:: EVERY if setting.small else 1]:

        def run(job: verify.Job = job) -> Found:
            if job.dtype is None and setting.is_drawn:
                # Finite differences are many calls of the same kernels.
                with backend.use_backend(job.backend):
                    for run_once, inputs, _ in verify.gradient_problems(job.op, setting.device):
                        run_once(*inputs).sum().backward()
                return passed(job.label, True)
            row = verify.check(job)
            return passed(job.label, row.ok, row.missed or f"worst {row.worst:.2f} of its bound, {row.cases} cases")

        yield Case(job.label, run, 8.0 if job.dtype is None else 3.0)


def _moments(name: str, setting: Setting) -> Found:
    """Variance of a map whose mean is a thousand deviations away, against float64's."""
    x = torch.randn(8, 64, 56, 56, device=setting.device) + 1000
    mean, var = torch.zeros(64, device=setting.device), torch.ones(64, device=setting.device)
    with backend.use_backend(name), torch.no_grad():
        functional.batch_norm_act(x, None, None, mean, var, training=True, momentum=1.0)
    exact = x.double().var((0, 2, 3))
    error = ((var.double() - exact).abs() / exact).max().item()
    return passed(f"moments {name}", error < 1e-6, f"relative error of the variance {error:.1e}, 1e-6 is allowed")


def _deterministic(op: str, name: str, dtype: torch.dtype, layout: str, label: str, setting: Setting) -> Found:
    side = 8 if setting.small else 28
    spec = Spec(dtype, layout, (64, 64), 64, 4, side, side, residual=op in ("aggregate", "batch_norm_act"))
    problem = parity.PROBLEMS[op](spec, setting.device)
    with backend.use_backend(name):
        dy = parity.safe_gradient(problem, setting.device)
        first = parity.execute(problem, functional, dy, None)
        for repeat in range(1, 2 if setting.is_drawn else _REPEATS):
            again = parity.execute(problem, functional, dy, None)
            differing = [key for key, t in first.items() if not torch.equal(t, again[key])]
            if differing:
                return passed(label, False, f"repeat {repeat} differs in {', '.join(differing)}")
    return passed(label, True, f"{_REPEATS} times the same bits")


def _determinism(setting: Setting) -> Iterator[Case]:
    half = (torch.bfloat16,) if setting.device.type != "cpu" else ()
    dtypes = (torch.float32, *half)[: 1 if setting.small else None]
    for op, dtype, layout in itertools.product(backend.OPS, dtypes, parity.LAYOUTS):
        for name in served(op, setting, dtype):
            label = f"determinism {op} {name} {name_of(dtype)} {layout}"
            yield Case(label, lambda a=(op, name, dtype, layout, label, setting): _deterministic(*a))


def _node(setting: Setting) -> tuple[AggregationNode, list[Tensor]]:
    torch.manual_seed(0)
    node = AggregationNode([64, 64], 64, residual=True).to(device=setting.device, dtype=setting.dtype)
    node = node.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    xs = [torch.randn(2, 64, 28, 28, device=setting.device, dtype=setting.dtype) for _ in range(2)]
    return node, [x.to(memory_format=torch.channels_last) for x in xs]


def _close(mine: Tensor, theirs: Tensor, bound: float | None = None) -> tuple[bool, str]:
    error = timing.difference(mine, theirs)
    bound = timing.tolerance(mine.dtype, mine.device) if bound is None else bound
    return error <= bound, f"difference {error:.1e} of the largest value, {bound:.0e} is allowed"


def _graphs_recorded() -> int:
    """How many CUDA graphs torch.compile's reduce-overhead has recorded in this process."""
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return sum(len(roots) for roots in manager.roots.values()) if manager is not None else 0


def _step(call: Callable[..., Tensor], xs: list[Tensor]) -> list[Tensor]:
    """One training pass: the output and the inputs' gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    y = call(*leaves)
    return [y.detach().clone(), *torch.autograd.grad(y.float().square().mean(), leaves)]


def _compiled(mode: str | None, training: bool, label: str, setting: Setting) -> Found:
    node, xs = _node(setting)
    node.train(training)
    # A copy: a training call moves the running statistics.
    twin = copy.deepcopy(node)
    torch._dynamo.reset()
    function = node if setting.is_drawn else torch.compile(node, fullgraph=True, mode=mode)
    # Graphs are recorded from the second call on and replayed from the third.
    for _ in range(4):
        if setting.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        if training:
            mine, theirs = _step(function, xs), _step(twin, xs)
        else:
            with torch.no_grad():
                mine, theirs = [function(*xs).clone()], [twin(*xs)]
    found = [_close(a, b) for a, b in zip(mine, theirs, strict=True)]
    ok, detail = all(ok for ok, _ in found), "; ".join(text for _, text in found[:2])
    if mode == "reduce-overhead" and setting.on_gpu:
        graphs = _graphs_recorded()
        ok, detail = ok and graphs > 0, f"{detail}; {graphs} graphs recorded"
    return passed(label, ok, detail)


def _captured(label: str, setting: Setting) -> Found:
    node, xs = _node(setting)
    node.eval()
    with torch.no_grad():
        expected = node(*xs)
        call = timing.graph_of([lambda: node(*xs)], setting.device) if setting.on_gpu else lambda: [node(*xs)]
        if call is None:
            return passed(label, False, "could not be captured")
        (y,) = call()  # type: ignore[misc]
    return passed(label, *_close(y, expected))


def _trained(label: str, setting: Setting) -> Found:
    node, xs = _node(setting)
    twin, wanted = copy.deepcopy(node), [x.requires_grad_() for x in xs]
    graphed: Any = node
    if setting.on_gpu:
        graphed = torch.cuda.make_graphed_callables(node, tuple(x.detach().requires_grad_() for x in xs))
    got = torch.autograd.grad(graphed(*wanted).float().square().mean(), wanted)
    expected = torch.autograd.grad(twin(*wanted).float().square().mean(), wanted)
    return passed(label, *_close(got[0], expected[0]))


def _graphs(setting: Setting) -> Iterator[Case]:
    modes = (None, "reduce-overhead") if setting.device.type != "cpu" else (None,)
    for mode, training in itertools.product(modes, (False, True)):
        label = f"torch.compile fullgraph {mode or 'default'} {'training' if training else 'inference'}"
        yield Case(label, lambda a=(mode, training, label, setting): _compiled(*a), 12.0)
    yield Case("CUDA graph of inference", lambda: _captured("CUDA graph of inference", setting))
    yield Case("CUDA graph of training", lambda: _trained("CUDA graph of training", setting))


def _network(name: str, mode: str, label: str, setting: Setting) -> Found:
    network_timing.check_float64(name, mode, networks.initial_state(name, not setting.is_drawn), label, setting.device)
    return passed(label, True, "agrees with eager in float64")


def _swapped(training: bool, label: str, setting: Setting) -> Found:
    """timm's DLA-34 before and after swap_, in float64, where nothing but a mistake can tell them apart."""
    from dla_fast._timm import import_timm

    size = 64 if setting.small else 224
    if setting.is_drawn:
        # On meta tensors a swapped module runs what it replaced.
        for case in cases.network_cases("dla34", size):
            problem = parity.aggregate(case.spec(2, torch.float64, "contiguous", training), setting.device)
            parity.execute(problem, functional, parity.safe_gradient(problem, setting.device), None)
        return passed(label, True)
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model("dla34").to(setting.device, torch.float64).train(training)
    images = torch.randn(2, 3, size, size, dtype=torch.float64).to(setting.device)

    def outputs(model: nn.Module) -> list[Tensor]:
        y = model(images)
        parameters = [p for _, p in sorted(model.named_parameters())]
        return [y.detach(), *torch.autograd.grad(y.square().mean(), parameters)]

    expected = outputs(copy.deepcopy(model))
    report = swap_(model)
    found = [_close(a, b, 1e-8) for a, b in zip(outputs(model), expected, strict=True)]
    worst = next((text for ok, text in found if not ok), found[0][1])
    return passed(
        label, all(ok for ok, _ in found) and len(report.swapped) > 0, f"{len(report.swapped)} modules, {worst}"
    )


def _whole(setting: Setting) -> Iterator[Case]:
    for name in ("dla46_c",) if setting.small else ("dla34", "dla102x", "dla34up"):
        for mode in ("inference", "training"):
            label = f"{name} {mode} in float64"
            yield Case(label, lambda a=(name, mode, label, setting): _network(*a), 6.0)
    for training in (False, True):
        label = f"swapped dla34, {'training' if training else 'evaluation'}"
        yield Case(label, lambda a=(training, label, setting): _swapped(*a), 6.0)


def checks(setting: Setting) -> Iterator[Case]:
    """Block "checks": everything that can be right or wrong."""
    yield from _verified(setting)
    for name in served("batch_norm_act", setting, torch.float32):
        yield Case(f"moments {name}", lambda name=name: _moments(name, setting))
    yield from _determinism(setting)
    yield from _graphs(setting)
    yield from _whole(setting)
