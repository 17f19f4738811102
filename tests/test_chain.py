"""Units as neighbours: what is formed on load is never written, what can be formed again is not saved, and gradients,
buffers, hooks, double backward and checkpointing are as if it were."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dla_fast
from dla_fast import functional
from dla_fast.nn import AggregationNode, BasicBlock, Bottleneck, ConvLevel, SplitBottleneck, Tree
from dla_fast.nn.memory import MEMORY, set_memory
from dla_fast.nn.unit import run_deferred, run_unit
from dla_fast.ops import ending
from dla_fast.ops.ending import Ending
from dla_fast.proof.measure import saved_bytes

CHAINS = {
    "basic": lambda: BasicBlock(8, 8),
    "strided": lambda: BasicBlock(8, 12, 2),
    "bottleneck": lambda: Bottleneck(8, 8),
    "split": lambda: SplitBottleneck(32, 32, cardinality=8),
    "level": lambda: ConvLevel(8, 6, 3, stride=2),
    "tree": lambda: Tree(1, BasicBlock, 8, 12, 2, level_root=True),
    "deep tree": lambda: Tree(2, Bottleneck, 8, 12, 2, level_root=True),
    "residual tree": lambda: Tree(2, Bottleneck, 8, 12, 1, residual_root=True),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def made(name, memory="default", dtype=torch.float64, layout="contiguous"):
    """A chain, its input, and a shortcut where it needs one."""
    torch.manual_seed(0)
    module = CHAINS[name]().to(dtype).to(memory_format=LAYOUTS[layout]).train()
    set_memory(module, memory)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.0, 1.0)
            nn.init.normal_(norm.bias)
    x = torch.randn(2, 32 if name == "split" else 8, 6, 10, dtype=dtype).to(memory_format=LAYOUTS[layout])
    shortcut = torch.randn(2, 12, 3, 5, dtype=dtype) if name == "strided" else None
    return module, x.requires_grad_(), shortcut


def run(module, x, shortcut=None):
    return module(x) if shortcut is None else module(x, shortcut)


def gradients(module, x, shortcut, backend, **options):
    """Output, gradients of everything, and buffers, of a copy."""
    module = copy.deepcopy(module)
    leaves = [x, *module.parameters()]
    with dla_fast.use_backend(backend):
        y = run(module, x, shortcut)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found = torch.autograd.grad(y, leaves, dy, **options)
    return [y.detach(), *found, *module.buffers()]


def compare(actual, expected, bound=1e-11):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=bound, atol=bound * max(1.0, e.abs().max().item()))


class Called(TorchDispatchMode):
    """Which of this package's operators are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("dla_fast_"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def tails(call):
    with Called() as called:
        call()
    return called.names.count("tail")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_and_buffers_are_those_of_the_reference(name, memory, layout):
    module, *given = made(name, memory, layout=layout)
    found, expected = (gradients(module, *given, backend) for backend in ("auto", "reference"))
    compare(found, expected)
    assert [t.stride() for t in found[:2]] == [t.stride() for t in expected[:2]]


@pytest.mark.parametrize("name, written", [("basic", 1), ("bottleneck", 1), ("split", 1), ("level", 1), ("tree", 3)])
def test_what_the_next_unit_alone_reads_is_never_written(name, written):
    """A block writes its output, a tree that of its first block, its shortcut and its root."""
    module, *given = made(name)
    assert tails(lambda: run(module, *given)) == written
    with torch.no_grad():
        assert tails(lambda: run(module, *given)) == written


@pytest.mark.parametrize("name, maps", [("basic", 2), ("bottleneck", 2), ("level", 3)])
def test_a_block_keeps_its_input_and_every_z(name, maps):
    """And its output where somebody else keeps that: not by itself."""
    module, x, _ = made(name)
    y = run(module, x)
    values = {"basic": 2 * y.numel(), "bottleneck": 2 * y.numel(), "level": 3 * y.numel()}[name]
    saved = saved_bytes(lambda: run(module, x), exclude=[x, *module.parameters(), *module.buffers()])
    # Beside maps a mean and a variance of each unit.
    assert values * 8 <= saved < values * 8 + 3 * 2 * 12 * 8


def test_somebody_who_watches_a_child_sees_its_output():
    module, x, _ = made("tree")
    seen = []
    expected = gradients(module, x, None, "reference")
    for child in (module.tree2, module.root, module.tree2.bn1, module.tree2.conv2):
        handle = child.register_forward_hook(lambda m, args, y: seen.append((type(m), args, y)))
        compare(gradients(module, x, None, "auto"), expected)
        handle.remove()
        assert seen
        assert all(isinstance(t, torch.Tensor) for _, args, y in seen for t in (*args, y))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append((type(m), args, y)))
    try:
        assert tails(lambda: module(x)) > 3
    finally:
        handle.remove()
    assert all(isinstance(t, torch.Tensor) for _, args, y in seen for t in (*args, y))


def test_a_unit_that_cannot_be_deferred_gives_its_output():
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    assert isinstance(run_deferred([x], conv, bn), Ending)
    assert isinstance(run_deferred([x], conv, copy.deepcopy(bn).eval()), torch.Tensor)
    assert isinstance(run_deferred([x], conv, nn.SyncBatchNorm(4).eval()), torch.Tensor)
    with dla_fast.use_backend("reference"):
        assert isinstance(run_deferred([x], conv, bn), torch.Tensor)


@pytest.mark.parametrize("reader", ["sync", "grouped", "residual", "two", "frozen", "reference", "autocast"])
def test_a_reader_that_takes_maps_gets_one(reader):
    """Whatever has become of the unit behind: the result is that of maps."""
    torch.manual_seed(1)
    first, second = (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) for _ in range(2))
    last = nn.Sequential(nn.Conv2d(8, 4, 1, groups=2 if reader == "grouped" else 1), nn.BatchNorm2d(4))
    if reader == "sync":
        last[0].register_forward_hook(lambda m, args, y: None)
    if reader == "frozen":
        last[1].eval()
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    leaves = [x, *first.parameters(), *second.parameters(), *last.parameters()]

    def given(deferred):
        make = run_deferred if deferred else run_unit
        one = make([x], *first)
        other = make([x], *second) if reader == "two" else run_unit([x], *second)
        residual = {"residual": 0}.get(reader)
        backend = "reference" if reader == "reference" else "auto"
        on = reader == "autocast"
        with dla_fast.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = run_unit([one, other], *last, residual=residual)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    compare(given(True), given(False), 1e-4 if reader != "autocast" else 3e-2)


def test_a_map_that_was_written_to_is_kept_as_it_is():
    torch.manual_seed(0)
    units = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double() for _ in range(2)]
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *units[0].parameters(), *units[1].parameters()]

    def found():
        y = run_unit([x], *units[0], act="identity")
        y = y.mul_(2)
        return torch.autograd.grad(run_unit([y], *units[1]).square().sum(), leaves)

    with dla_fast.use_backend("reference"):
        expected = found()
    compare(found(), expected)


def test_a_parameter_that_was_written_to_in_between_is_told():
    module, x, _ = made("basic", "low")
    y = module(module(x))
    with torch.no_grad():
        module.bn2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.bias"])
def test_gradients_that_are_wanted_alone(wanted, memory):
    module, x, _ = made("basic", memory)

    def found(backend):
        module.requires_grad_(False)
        leaf = x.detach().requires_grad_() if wanted == "x" else module.get_parameter(wanted).requires_grad_()
        with dla_fast.use_backend(backend):
            y = module(module(leaf if wanted == "x" else x.detach()))
        return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), leaf)

    compare(found("auto"), found("reference"))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "tree"])
def test_double_backward(name, memory):
    module, x, _ = made(name, memory)

    def found(backend):
        with dla_fast.use_backend(backend):
            y = run(module, x)
            leaves = [x, *module.parameters()]
            dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            first = torch.autograd.grad(y, leaves, dy, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    for a, e in zip(found("auto"), found("reference"), strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * e.abs().max().item())


def test_gradgradcheck_of_a_chain():
    torch.manual_seed(0)
    convs, norms = [nn.Conv2d(2, 2, k, padding=k // 2).double() for k in (1, 3)], [nn.BatchNorm2d(2).double()] * 2
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def chain(x, *_):
        y = run_unit([run_deferred([x], convs[0], norms[0], act="silu")], convs[1], norms[1], act="silu")
        return run_unit([y, x], nn.Conv2d(4, 2, 1).double(), norms[0]) if x.shape[1] == 4 else y

    assert torch.autograd.gradcheck(chain, (x, *convs[0].parameters(), *norms[0].parameters()))
    assert torch.autograd.gradgradcheck(chain, (x, *convs[0].parameters(), *norms[0].parameters()))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, memory):
    module, x, _ = made("tree", memory)
    level = ConvLevel(8, 8).double()

    def found(recompute):
        y = level(x)
        y = checkpoint(module, y, use_reentrant=reentrant) if recompute else module(y)
        return torch.autograd.grad(y.square().sum(), [*level.parameters(), *module.parameters()], allow_unused=True)

    if reentrant:
        loss = checkpoint(module, level(x), use_reentrant=True).square().sum()
        loss.backward()
        compare([p.grad for p in module.parameters()], found(False)[3:])
    else:
        compare(found(True), found(False))


@pytest.mark.parametrize("memory", MEMORY)
def test_saved_tensors_can_be_kept_elsewhere(memory):
    module, x, _ = made("tree", memory)
    expected = gradients(module, x, None, "auto")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        compare(gradients(module, x, None, "auto"), expected, 0.0)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_graph_is_gone_through_twice(memory):
    module, x, _ = made("deep tree", memory)
    leaves = [x, *module.parameters()]
    loss = module(x).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    compare(torch.autograd.grad(loss, leaves), first, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_what_was_saved_is_freed_by_the_backward_pass():
    """While the loss still holds the graph, as it does in a loop until the next step's loss is there."""
    module, x, _ = made("basic", "low")
    y = module(x)
    z = weakref.ref(ending.recall(y).z)
    loss = module(y).sum()
    assert z() is not None
    loss.backward()
    del y
    gc.collect()
    assert z() is None
    assert loss.grad_fn is not None


@pytest.mark.parametrize("memory", MEMORY)
def test_an_output_keeps_nothing_alive_when_the_graph_is_gone(memory):
    stack = nn.Sequential(*[BasicBlock(8, 8) for _ in range(4)]).double()
    set_memory(stack, memory)
    y = stack(torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True))
    assert ending.recall(y) is not None
    y.sum().backward()
    assert ending.recall(y) is None


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("what", ["bn weight", "bn bias", "residual", "data"])
def test_what_an_output_was_formed_of_may_change_before_it_is_read(what, memory):
    """Only the reader's gradients are wanted: nobody else would notice."""
    module, x, _ = made("basic", memory)
    head = AggregationNode([8], 8).double()
    set_memory(head, memory)

    def found(backend):
        block, given = copy.deepcopy(module), x.detach().clone() + 0
        with dla_fast.use_backend(backend):
            y = block(given.requires_grad_() if what == "data" else given)
            with torch.no_grad():
                if what == "bn weight":
                    block.bn2.weight.mul_(2)
                elif what == "bn bias":
                    block.bn2.bias.add_(1)
                elif what == "residual":
                    given.add_(1)
                else:
                    y.data = y.data * 2
            loss = head(y).square().sum()
        return torch.autograd.grad(loss, list(head.parameters()))

    compare(found("auto"), found("reference"))


def test_a_call_without_gradients_spoils_nothing():
    first, second = (ConvLevel(8, 8).double() for _ in range(2))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)

    def found(backend):
        with dla_fast.use_backend(backend):
            y = first(x)
            with torch.no_grad():
                second(y)
            return torch.autograd.grad(second(y).square().sum(), x, create_graph=True)

    compare([g.detach() for g in found("auto")], [g.detach() for g in found("reference")])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("outer", ["save_on_cpu", "checkpoint"])
def test_checkpointing_inside_of_hooks(outer, memory):
    first, (module, x, _) = ConvLevel(8, 8).double(), made("tree", memory)
    leaves = [*first.parameters(), *module.parameters()]

    def inner(y):
        return checkpoint(module, y, use_reentrant=False)

    def found():
        y = first(x)
        if outer == "checkpoint":
            return torch.autograd.grad(checkpoint(inner, y, use_reentrant=False).square().sum(), leaves)
        with torch.autograd.graph.save_on_cpu():
            loss = inner(y).square().sum()
        return torch.autograd.grad(loss, leaves)

    compare(found(), torch.autograd.grad(module(first(x)).square().sum(), leaves))


def test_an_activation_in_another_ones_place():
    level, x = ConvLevel(8, 8, 2).double(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    seen = []
    level[2].register_forward_hook(lambda m, args, y: seen.append(y))
    level(x)
    assert len(seen) == 1
    level[5] = nn.SiLU()
    with dla_fast.use_backend("reference"):
        expected = nn.Sequential.forward(level, x)
    torch.testing.assert_close(level(x), expected)


def test_no_output_is_kept_alive():
    module, x, _ = made("basic")
    y = module(x)
    gone = weakref.ref(y)
    del y
    assert gone() is None
    assert not len(ending._made)


def test_outputs_can_be_copied_and_saved(tmp_path):
    module, x, _ = made("basic")
    y = module(x)
    torch.save(y, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)


@pytest.mark.parametrize("memory", MEMORY)
def test_autocast(memory):
    module, x, _ = made("tree", memory, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (gradients(module, x, None, backend) for backend in ("auto", "reference"))
    exact = gradients(module.double(), x.double().detach().requires_grad_(), None, "reference")
    for a, p, e in zip(found, plain, exact, strict=True):
        error, eager = ((t.double() - e).double().norm().item() for t in (a, p))
        e = e.double()
        assert error <= 2 * eager + 1e-2 * e.norm().item()


@pytest.mark.parametrize("memory", MEMORY)
def test_functional_units_in_a_row(memory):
    """The maps of calls of the functional API are formed again, too, where that costs nothing."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 4 * n, k, k, dtype=torch.float64, requires_grad=True) for n, k in ((1, 3), (2, 1))]
    gamma = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def found(backend):
        with dla_fast.use_backend(backend):
            y = functional.conv_norm_act([x], weights[0], gamma, None, None, None, training=True)
            y = functional.aggregate([y, x], weights[1], gamma, None, None, None, training=True, residual=True)
            return [y, *torch.autograd.grad(y.square().sum(), [x, gamma, *weights])]

    compare(found("auto"), found("reference"))


def test_a_node_in_front_of_a_node():
    """A root whose first input another root gave: default and low keep it once."""
    torch.manual_seed(0)
    first, second = AggregationNode([4, 4], 4).double(), AggregationNode([4, 4], 4, residual=True).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def found(backend):
        with dla_fast.use_backend(backend):
            y = second(first(x, x), x)
        return torch.autograd.grad(y.square().sum(), [x, *first.parameters(), *second.parameters()])

    expected = found("reference")
    for memory in MEMORY:
        for node in (first, second):
            set_memory(node, memory)
        compare(found("auto"), expected)


CARRYING = [
    ((2, 8, 6, 7), 8, 3, 1, "contiguous"),
    ((2, 40, 9, 8), 36, 3, 1, "channels_last"),
    ((2, 40, 9, 8), 36, 3, 1, "contiguous"),
    ((2, 8, 6, 7), 4, 3, 2, "channels_last"),
    ((2, 24, 9, 9), 20, 1, 1, "channels_last"),
    ((2, 24, 9, 9), 20, 1, 1, "contiguous"),
    ((1, 512, 7, 7), 256, 1, 1, "channels_last"),
    ((2, 24, 9, 9), 20, 1, 2, "channels_last"),
    ((0, 8, 6, 7), 4, 3, 1, "contiguous"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size, out, kernel, stride, layout", CARRYING)
def test_what_is_carried_is_added_to_the_first_gradient(size, out, kernel, stride, layout, dtype):
    torch.manual_seed(0)
    form = {"memory_format": LAYOUTS[layout]}
    xs = [torch.randn(size, dtype=torch.float64).to(dtype).contiguous(**form) for _ in range(2)]
    weight = (torch.randn(out, 2 * size[1], kernel, kernel, dtype=torch.float64) / size[1]).to(dtype)
    op = torch.ops.dla_fast_cpu
    z, mean, var = op.conv_norm_act_stage(xs, [], weight, None, None, None, [1, 1], stride, 1, 1, 0.1, True)
    dy, v = torch.randn_like(z), torch.rand(out, dtype=mean.dtype) + 0.5
    node = (dy, xs, [], weight, None, z, mean, var, v, v, mean, mean, [1, 1], stride, 1, 1, -1, z[:, :1].numel())
    node += (1e-5, "identity", 0.0, [True, True], [], True, False, *ending.NO_PROLOGUE, False)
    carried = torch.randn(size, dtype=torch.float64).to(dtype)
    (dx, other), _, dw, *_ = op.conv_norm_act_backward(*node, carried)
    (alone, same), _, weights, *_ = op.conv_norm_act_backward(*node, None)
    # In half precision the sum is rounded once.
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(dx, alone + carried, **near)
    assert torch.equal(other, same)
    assert torch.equal(dw, weights)
    for wrong in (carried[:, 1:], torch.cat([carried, carried])[: size[0] + 1]):
        if wrong.shape != carried.shape:
            with pytest.raises(ValueError, match="carried"):
                op.conv_norm_act_backward(*node, wrong)
