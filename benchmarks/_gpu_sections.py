"""The sections of benchmarks.gpu: what each checks or times, as cases with a label."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import _gpu_kernels
from dla_fast import backend, functional, nn, swap_
from dla_fast.commands import parity, verify
from dla_fast.commands.bench import cases, networks, timing
from dla_fast.commands.bench.cases import Case, Rates
from dla_fast.commands.parity import Spec

# Section -> its share of the time that is left for it and those behind it.
SECTIONS = {
    "parity": 2.0,
    "determinism": 1.0,
    "compile": 1.0,
    "networks": 2.0,
    "launch": 0.5,
    "sanitizer": 1.5,
    "bandwidth": 1.0,
    "latency": 0.5,
    "ops": 2.0,
    "roots": 6.0,
    "peers": 5.0,
}
Run = Callable[[], list[dict[str, Any]]]
_REPEATS = 20


def is_fatal(error: BaseException) -> bool:
    """Whether a process cannot use its device any more: after an illegal access every call fails."""
    text = str(error).lower()
    return any(words in text for words in ("illegal memory access", "misaligned address", "unspecified launch failure"))


def cases_of(section: str, device: str, small: bool) -> Iterator[tuple[str, Run]]:
    """The cases of a section, with their labels."""
    return _FOUND[section](torch.device(device), small)


def _passed(label: str, ok: bool, detail: str = "") -> list[dict[str, Any]]:
    return [{"check": label, "ok": ok, "detail": detail}]


def _served(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [
        name
        for name in backend.BACKENDS
        if name != "reference" and backend.can_run(name, op, device.type, dtype) is None
    ]


def _parity(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    work = [job for job in verify.jobs() if job[2] == device.type and job[1] != "reference"]
    for job in work[:: 7 if small else 1]:
        op, name, _, dtype = job
        label = f"{op} {name} {'gradcheck' if dtype is None else str(dtype).removeprefix('torch.')}"

        def run(job: verify.Job = job, label: str = label) -> list[dict[str, Any]]:
            row = verify.check(job)
            return _passed(label, row.ok, row.missed or f"worst error {row.worst:.2f} of its bound, {row.cases} cases")

        yield label, run
    dtypes = (torch.float32,) if small else (torch.float32, torch.float16, torch.bfloat16)
    for dtype, layout in itertools.product(dtypes, parity.LAYOUTS):
        for name in _served("aggregate", device, dtype):
            label = f"roots {name} {str(dtype).removeprefix('torch.')} {layout}"
            yield label, lambda a=(name, dtype, layout, device), label=label: _passed(label, *_root_parity(*a))
    for name in _served("batch_norm_act", device, torch.float32):
        yield f"moments {name}", lambda name=name: _passed(f"moments {name}", *_moments(name, device))


def _root_parity(name: str, dtype: torch.dtype, layout: str, device: torch.device) -> tuple[bool, str]:
    """Nodes as large as those of the networks, on the tiles that are chosen for them."""
    pool = parity.Pool(device)
    common: dict[str, Any] = {"dtype": dtype, "layout": layout, "batch": 2}
    with backend.use_backend(name):
        for residual in (False, True):
            pool.add(
                parity.aggregate(
                    Spec(channels=(64, 64), out_channels=64, height=28, width=28, residual=residual, **common)
                )
            )
        shape = {"channels": (256, 256, 128, 256), "out_channels": 256, "height": 14, "width": 14}
        pool.add(parity.aggregate(Spec(**shape, **common)))
    return not pool.failures(), pool.failures() or f"worst error {pool.worst():.2f} of its bound"


def _moments(name: str, device: torch.device) -> tuple[bool, str]:
    """Variance of a map whose mean is a thousand deviations away, against float64's."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 64, 56, 56, generator=generator) + 1000).to(device)
    mean, var = torch.zeros(64, device=device), torch.ones(64, device=device)
    with backend.use_backend(name), torch.no_grad():
        functional.batch_norm_act(x, None, None, mean, var, training=True, momentum=1.0)
    exact = x.double().var((0, 2, 3))
    error = ((var.double() - exact).abs() / exact).max().item()
    return error < 1e-6, f"relative error of the variance {error:.1e}, 1e-6 is allowed"


def _determinism(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    dtypes = (torch.float32,) if small or device.type == "cpu" else (torch.float32, torch.bfloat16)
    for op, dtype, layout in itertools.product(backend.OPS, dtypes, parity.LAYOUTS):
        for name in _served(op, device, dtype):
            label = f"{op} {name} {str(dtype).removeprefix('torch.')} {layout}"

            def run(
                op: str = op, dtype: torch.dtype = dtype, layout: str = layout, name: str = name, label: str = label
            ) -> list[dict[str, Any]]:
                side = 8 if small else 28
                spec = Spec(dtype, layout, (64, 64), 64, 4, side, side, residual=op in ("aggregate", "batch_norm_act"))
                problem = parity.PROBLEMS[op](spec)
                with backend.use_backend(name):
                    dy = parity.safe_gradient(problem, device)
                    first = parity.execute(problem, functional, dy, None)
                    for repeat in range(1, _REPEATS):
                        again = parity.execute(problem, functional, dy, None)
                        differing = [key for key, t in first.items() if not torch.equal(t, again[key])]
                        if differing:
                            return _passed(label, False, f"repeat {repeat} differs in {', '.join(differing)}")
                return _passed(label, True, f"{_REPEATS} times the same bits")

            yield label, run


def _node(device: torch.device, dtype: torch.dtype) -> tuple[nn.AggregationNode, list[Tensor]]:
    torch.manual_seed(0)
    node = nn.AggregationNode([64, 64], 64, residual=True).to(device=device, dtype=dtype)
    node = node.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layout = torch.channels_last
    return node, [torch.randn(2, 64, 28, 28, device=device, dtype=dtype).to(memory_format=layout) for _ in range(2)]


def _close(mine: Tensor, theirs: Tensor) -> tuple[bool, str]:
    error = timing.difference(mine, theirs)
    bound = timing.tolerance(mine.dtype, mine.device)
    return error <= bound, f"difference {error:.1e} of the largest value, {bound:.0e} is allowed"


def _compile(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    modes = (None,) if small or device.type == "cpu" else (None, "reduce-overhead")

    def compiled(mode: str | None, training: bool, label: str) -> list[dict[str, Any]]:
        node, xs = _node(device, dtype)
        node.train(training)
        # A copy: a training call moves the running statistics.
        expected = copy.deepcopy(node)(*xs)
        torch._dynamo.reset()
        function = torch.compile(node, fullgraph=True, mode=mode)
        if training:
            y = function(*xs)
            y.float().square().mean().backward()
            return _passed(label, *_close(y.detach(), expected.detach()))
        with torch.no_grad():
            for _ in range(3):
                y = function(*xs).clone()
        return _passed(label, *_close(y, expected.detach()))

    for mode, training in itertools.product(modes, (False, True)):
        label = f"torch.compile fullgraph {mode or 'default'} {'training' if training else 'inference'}"
        yield label, lambda a=(mode, training, label): compiled(*a)

    def captured(label: str) -> list[dict[str, Any]]:
        node, xs = _node(device, dtype)
        node.eval()
        with torch.no_grad():
            expected = node(*xs)
            call = timing.graph_of([lambda: node(*xs)], device)
            if call is None:
                return _passed(label, False, "could not be captured")
            (y,) = call()  # type: ignore[misc]
        return _passed(label, *_close(y, expected))

    def trained(label: str) -> list[dict[str, Any]]:
        node, xs = _node(device, dtype)
        twin = copy.deepcopy(node)
        xs = [x.requires_grad_() for x in xs]
        graphed = torch.cuda.make_graphed_callables(node, tuple(x.detach().requires_grad_() for x in xs))
        got = torch.autograd.grad(graphed(*xs).float().square().mean(), xs)
        wanted = torch.autograd.grad(twin(*xs).float().square().mean(), xs)
        return _passed(label, *_close(got[0], wanted[0]))

    if device.type == "cuda":
        yield "CUDA graph of inference", lambda: captured("CUDA graph of inference")
        yield "CUDA graph of training", lambda: trained("CUDA graph of training")


def _networks(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    def prove(name: str, mode: str, size: int, label: str) -> list[dict[str, Any]]:
        state = networks.initial_state(name)
        networks.check_float64(name, mode, state, label, device)
        settings = timing.Settings(device, peers=("eager",), rounds=3, seconds=2.0)
        networks.prove(networks.Network(name, size, 2), mode, settings, [])
        return _passed(label, True, "agrees with eager in float64 and float32")

    for name, size in (("dla46_c", 64),) if small else (("dla34", 224), ("dla102x", 224), ("dla34up", 256)):
        for mode in ("inference", "training"):
            label = f"{name} {mode}"
            yield label, lambda a=(name, mode, size, label): prove(*a)

    def swapped(label: str) -> list[dict[str, Any]]:
        import timm

        torch.manual_seed(0)
        model = timm.create_model("dla34").to(device)
        images = torch.randn(2, 3, 64, 64, device=device)
        expected = copy.deepcopy(model)(images)
        report = swap_(model)
        y = model(images)
        y.square().mean().backward()
        ok, detail = _close(y.detach(), expected.detach())
        return _passed(label, ok and len(report.swapped) > 0, f"{len(report.swapped)} nodes, {detail}")

    yield "swapped dla34", lambda: swapped("swapped dla34")


def _launch(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def cost(training: bool, label: str) -> list[dict[str, Any]]:
        node, xs = _node(device, dtype)
        node.train(training)
        if training:
            xs = [x.requires_grad_() for x in xs]
            grad = torch.ones_like(node(*xs))
            parameters = [*xs, *node.parameters()]

            def call() -> object:
                return torch.autograd.grad(node(*xs), parameters, grad)
        else:

            def call() -> object:
                with torch.no_grad():
                    return node(*xs)

        for _ in range(5):
            call()
        microseconds = 1e3 * timing.host_ms(call, device, 20 if small else 200)
        # The goal is set for the host's part of an inference node on a GPU.
        ok = training or device.type == "cpu" or microseconds <= 10
        return [{"check": label, "ok": ok, "detail": f"{microseconds:.1f} us", "host_us": microseconds}]

    for training in (False, True):
        label = f"host cost of a {'training' if training else 'inference'} node"
        yield label, lambda a=(training, label): cost(*a)


_rates: dict[torch.dtype, Rates] = {}


def _timed(
    case: Case, mode: str, batch: int, dtype: str, peers: tuple[str, ...], device: torch.device, small: bool
) -> list[dict[str, Any]]:
    settings = timing.Settings(device, dtype=dtype, peers=peers, rounds=3 if small else 15, seconds=0.1 if small else 1)
    if settings.torch_dtype not in _rates:
        _rates[settings.torch_dtype] = cases.measure_rates(settings.torch_dtype, device)
    outcome = timing.time_case(case, mode, batch, settings, _rates[settings.torch_dtype], suite="gpu")
    left_out = [
        {"check": f"{s['case']} {s['mode']} {s['impl']}", "ok": True, "detail": s["reason"]} for s in outcome.skipped
    ]
    return [*outcome.records, *left_out]


def _cases_timed(
    work: Iterable[tuple[Case, str, int, str]], peers: tuple[str, ...], device: torch.device, small: bool
) -> Iterator[tuple[str, Run]]:
    for case, mode, batch, dtype in work:
        label = f"{case.name} {mode} batch {batch} {dtype}"
        yield label, lambda a=(case, mode, batch, dtype, peers, device, small): _timed(*a)


def _dtype(device: torch.device) -> str:
    return "float32" if device.type == "cpu" else "bfloat16"


def _roots(small: bool) -> list[Case]:
    names = ("dla34",) if small else ("dla34", "dla60", "dla102", "dla169")
    alike: dict[Any, Case] = {}
    for name in names:
        for case in cases.network_cases(name, 32 if small else 224):
            alike.setdefault((case.in_channels, case.out_channels, case.height, case.residual), case)
    return list(alike.values())[: 2 if small else None]


def _time_ops(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    work = [c for c in cases.ida_cases(size=64 if small else 512) if c.op != "aggregate"]
    work += [c for c in cases.op_cases() if c.residual or c.factor > 2]
    if small:
        work = [next(c for c in work if c.op == op) for op in ("merge", "upsample")]
    both = ("inference", "training")
    everything = [(case, mode, 1 if small else 16, _dtype(device)) for case in work for mode in both]
    yield from _cases_timed(everything, ("eager", "library"), device, small)


def _time_roots(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    batches = (1,) if small else (32, 1, 256)
    everything = [
        (case, mode, batch, _dtype(device))
        for batch in batches
        for case in _roots(small)
        for mode in ("inference", "training")
    ]
    if not small:
        others = ("float16", "float32") if device.type == "cuda" else ()
        everything += [
            (case, mode, 32, d) for d in others for case in _roots(small)[:4] for mode in ("inference", "training")
        ]
    yield from _cases_timed(everything, ("eager",), device, small)


def _time_peers(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    """Compiling takes seconds: cases far apart first, so that time that is up leaves the fewest gaps."""
    everything = [
        (case, mode, batch, _dtype(device))
        for batch in ((1,) if small else (32, 1, 256))
        for case in _roots(small)
        for mode in ("inference", "training")
    ]
    stride = 7
    spread = [everything[i] for first in range(stride) for i in range(first, len(everything), stride)]
    peers = ("compile",) if small else ("eager", "compile", "compile_max_autotune", "compile_frozen")
    yield from _cases_timed(spread[: 1 if small else None], peers, device, small)


_FOUND: dict[str, Callable[[torch.device, bool], Iterator[tuple[str, Run]]]] = {
    "parity": _parity,
    "determinism": _determinism,
    "compile": _compile,
    "networks": _networks,
    "launch": _launch,
    "sanitizer": _gpu_kernels.sanitizer,
    "bandwidth": _gpu_kernels.bandwidth,
    "latency": _gpu_kernels.latency,
    "ops": _time_ops,
    "roots": _time_roots,
    "peers": _time_peers,
}
assert list(_FOUND) == list(SECTIONS), "every section has cases"
