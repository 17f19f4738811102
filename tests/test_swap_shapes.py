"""The shapes of docs/swapping.md, a row each: what is swapped, with the same results, and undone to the bit."""

from __future__ import annotations

import copy
import functools
import importlib.machinery
import importlib.util
import io
import sys
import types
import warnings

import pytest
import serving
import torch
from nn_helpers import relative
from swap_shapes import BEGIN, DOCUMENT, END, collect, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dla_fast
from dla_fast import backend

ROWS = collect()
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_row = pytest.mark.parametrize("name", ROWS)


def randomise(module: nn.Module) -> nn.Module:
    """No two channels alike, no norm the identity, nothing zero that training would move."""
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if not t.is_floating_point():
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5)
            elif t.dim() < 2:
                t.uniform_(-0.5, 1.5)
            elif t.any():
                t.mul_(torch.empty_like(t).uniform_(0.5, 1.5))
            else:
                t.normal_(0, 0.2)
    return module


@functools.cache
def _prepared(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, dla_fast.swap.SwapReport]:
    torch.manual_seed(0)
    module = randomise(ROWS[name].make()).to(dtype)
    twin = copy.deepcopy(module)
    return module, twin, dla_fast.swap_(twin)


def pair(name: str, training: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The module as it is, and swapped: copies of those that were made once, whose buffers stay as they were."""
    module, twin, _ = copy.deepcopy(_prepared(name, dtype))
    return module.train(training), twin.train(training)


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors of arguments or of a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def rebuilt(arguments: list, given: list[torch.Tensor]) -> list:
    """Arguments of the same form with other tensors, in lists of their own."""
    left = iter(given)

    def build(value):
        if isinstance(value, torch.Tensor):
            return next(left)
        return [build(item) for item in value] if isinstance(value, list) else value

    return [build(value) for value in arguments]


def form(value: object) -> object:
    """Types all the way down."""
    return (type(value), [form(item) for item in value] if isinstance(value, (list, tuple)) else None)


def outcome(module: nn.Module, arguments: list, gradients: bool = True) -> tuple[object, dict[str, torch.Tensor]]:
    """The form of what a call gives and writes, and every tensor of it, with the gradients and the buffers after it."""
    torch.manual_seed(1)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_(gradients) for t in tensors(arguments)]
    given = rebuilt(arguments, leaves)
    with torch.set_grad_enabled(gradients):
        result = module(*given)
    held = tensors(given)
    written = [a is not b for a, b in zip(leaves, held, strict=True)]
    same = [result is value for value in given]
    # A node without a result may write into a list alone.
    made = [*tensors(result), *(t for t, new in zip(held, written, strict=True) if new)]
    found = {f"output {i}": t.detach() for i, t in enumerate(made)}
    found |= {f"input {i} after the call": t.detach() for i, t in enumerate(leaves)}
    found |= {name: buffer.detach() for name, buffer in module.named_buffers()}
    if gradients:
        generator = torch.Generator().manual_seed(2)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).mean() for t in made)
        names, parameters = [*zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)]
        grads = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        wanted = [*(f"input {i}" for i in range(len(leaves))), *names]
        found |= {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True) if g is not None}
    return (form(result), same, written), found


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """In float64."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        value = got[name]
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
        # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
        error = (value - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
        assert error <= (1e-8 if name.startswith("gradient") else 1e-9), f"{name}: {error:.1e}"


class Flat(nn.Module):
    """A row's module behind a forward that takes and gives tensors alone, as exporters want it."""

    def __init__(self, module: nn.Module, arguments: list) -> None:
        super().__init__()
        # An exporter puts everything back into the mode of the outermost.
        self.training = module.training
        self.module, self.like = module, rebuilt(arguments, [torch.empty(0)] * len(tensors(arguments)))
        given = rebuilt(arguments, tensors(arguments))
        with torch.no_grad():
            copy.deepcopy(module)(*given)
        held = zip(tensors(given), tensors(arguments), strict=True)
        self.written = [i for i, (a, b) in enumerate(held) if a is not b]

    def forward(self, *xs):
        given = rebuilt(self.like, list(xs))
        made, held = tensors(self.module(*given)), tensors(given)
        return (*made, *(held[i] for i in self.written))


@each_row
def test_what_is_swapped_and_what_stays(name):
    row, (module, twin, report) = ROWS[name], _prepared(name, torch.float32)
    done, left = ({e.name: e.reason for e in entries} for entries in (report.swapped, report.skipped))
    for path, remark in row.swapped.items():
        assert path in done, f"{path}: {left.get(path, 'not in the report')}"
        assert remark in done[path]
        assert type(twin.get_submodule(path)) is not type(module.get_submodule(path))
    for path, reason in row.skipped.items():
        assert path in left, f"{path} is not in the report"
        assert reason in left[path]
        assert type(twin.get_submodule(path)) is type(module.get_submodule(path))


@each_row
@pytest.mark.parametrize("mode", ["training", "norms in evaluation", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_results(name, mode, layout):
    arguments = ROWS[name].inputs(torch.float64)
    arguments = rebuilt(arguments, [t.contiguous(memory_format=LAYOUTS[layout]) for t in tensors(arguments)])
    for gradients in (True, False):
        module, twin = pair(name, mode != "evaluation")
        if mode == "norms in evaluation":
            for part in [*module.modules(), *twin.modules()]:
                part.train(part.training and not isinstance(part, nn.modules.batchnorm._BatchNorm))
        before = {key: buffer.clone() for key, buffer in module.named_buffers()}
        (how, want), (how_now, got) = outcome(module, arguments, gradients), outcome(twin, arguments, gradients)
        assert how_now == how
        assert_same(got, want)
        for key, value in before.items():
            if torch.equal(want[key], value):
                assert torch.equal(got[key], value), f"{key} is frozen"


@each_row
@pytest.mark.skipif(serving.DISABLED or serving.NAMES != ["cpu"], reason="the ops are those of the CPU's kernels")
def test_fused_ops_of_a_call(name):
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    module, twin = pair(name, False, torch.float32)
    arguments = ROWS[name].inputs(torch.float32)
    with torch.no_grad():
        _, want = outcome(module, arguments, False)
        with Record():
            _, got = outcome(twin, arguments, False)
    for key, value in want.items():
        assert relative(got[key].float(), value.float()) <= 1e-5, key
    assert {op: seen.count(op) for op in ROWS[name].ops} == ROWS[name].ops


@each_row
def test_what_is_kept_and_undone(name):
    module = randomise(ROWS[name].make()).eval()
    reference = copy.deepcopy(module)
    arguments, calls = ROWS[name].inputs(torch.float32), []
    parts = dict(module.named_modules())
    hooks = {path: parts[path].register_forward_hook(lambda m, a, y: calls.append(m)) for path in ROWS[name].swapped}

    def state():
        hooked = [(path, list(m._forward_hooks)) for path, m in module.named_modules()]
        values = [(key, t.data_ptr(), t.dtype) for key, t in module.state_dict().items()]
        return [(key, id(p)) for key, p in module.named_parameters()], values, hooked

    def classes():
        return [(path, type(m), list(m.__dict__), list(m._modules)) for path, m in module.named_modules()]

    before, was, rng = state(), classes(), torch.get_rng_state()
    dla_fast.swap_(module)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert not calls
    outcome(module, arguments, False)
    # A hook sees every call, as it did before.
    assert [id(m) for m in calls] == [id(parts[path]) for path in hooks]
    for handle in hooks.values():
        handle.remove()
    again = dla_fast.swap_(module)
    assert not again.swapped, again
    count = sum(type(m) is not cls for (_, cls, *_), m in zip(was, module.modules(), strict=True))
    assert dla_fast.unswap_(module) == count >= len(ROWS[name].swapped)
    assert classes() == was
    (how, want), (how_now, got) = outcome(reference, arguments, False), outcome(module, arguments, False)
    assert how_now == how
    assert all(torch.equal(got[key], value) for key, value in want.items())


@each_row
def test_compiled_in_one_graph(name):
    arguments = ROWS[name].inputs(torch.float64)
    module, twin = pair(name, False)
    torch._dynamo.reset()
    compiled = torch.compile(Flat(twin, arguments), fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = (f(*tensors(arguments)) for f in (compiled, Flat(module, arguments)))
    assert_same({str(i): t for i, t in enumerate(got)}, {str(i): t for i, t in enumerate(want)})


@each_row
def test_exported(name):
    arguments = ROWS[name].inputs(torch.float64)
    module, twin = pair(name, False)
    program = torch.export.export(Flat(twin, arguments), tuple(tensors(arguments)))
    assert not [n.target for n in program.graph.nodes if "dla_fast" in str(n.target)]
    with torch.no_grad():
        got, want = (f(*tensors(arguments)) for f in (program.module(), Flat(module, arguments)))
    assert_same({str(i): t for i, t in enumerate(got)}, {str(i): t for i, t in enumerate(want)})


@pytest.fixture
def exporter(monkeypatch):
    """ONNX's exporter that needs nothing else; at the end it asks the package whether there are functions to add."""
    if importlib.util.find_spec("onnx") is None:
        onnx = types.ModuleType("onnx")
        onnx.__spec__ = importlib.machinery.ModuleSpec("onnx", None)
        onnx.load_model_from_string = lambda text: types.SimpleNamespace(graph=types.SimpleNamespace(node=[]))
        monkeypatch.setitem(sys.modules, "onnx", onnx)


def onnx_of(module: nn.Module, arguments: list) -> bytes:
    file, given = io.BytesIO(), tuple(tensors(arguments))
    names = [f"x{i}" for i in range(len(given))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(Flat(module, arguments), given, file, dynamo=False, input_names=names)
    return file.getvalue()


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.onnx])
def test_onnx(exporter, name):
    """The file is the one that the module gave before, to the byte; computed where ONNX Runtime is installed."""
    module, twin = pair(name, False, torch.float32)
    arguments = ROWS[name].inputs(torch.float32)
    program = onnx_of(twin, arguments)
    assert program == onnx_of(module, arguments)
    assert b"dla_fast" not in program
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        values = {f"x{i}": t.numpy() for i, t in enumerate(tensors(arguments))}
        # What is read by nobody is no input of the file.
        got = session.run(None, {i.name: values[i.name] for i in session.get_inputs()})
        with torch.no_grad():
            want = Flat(module, arguments)(*tensors(arguments))
        for a, b in zip(got, want, strict=True):
            assert relative(torch.from_numpy(a), b) <= 1e-5


def test_the_document_has_a_row_for_each():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table(), "run `PYTHONPATH=. python tests/swap_shapes.py`"


def test_every_row_is_of_a_backend_that_is_there():
    assert backend.resolve("merge", "cpu", torch.float32) == serving.NAMES[0]
