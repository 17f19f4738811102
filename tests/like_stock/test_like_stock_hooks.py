"""Who looks on: hooks of modules and of all modules, tracers, and several threads that run one model."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairs import ALL, NETWORKS, assert_alike, image, loss_of, pair, see, step
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dla_fast
from dla_fast.swap.nodes import FusedNode

HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


def tensors(*values):
    return [t.detach().clone() if isinstance(t, Tensor) else None for t in tree_leaves(values)]


def watch(module, name, kind, calls):
    """Write down every call of a hook of one kind, with the values it was shown."""

    def hook(module, *shown):
        calls.append((name, kind, module.training, tensors(*shown)))

    return getattr(module, f"register_{kind}_hook")(hook)


def hooked(name, before, choose, kinds):
    """A stock model and its swapped copy, hooks registered before the swap or after it, and what the hooks saw."""
    models, seen = [], []
    for swapped in (False, True):
        model, calls = pair(name, verify=False)[0], []
        if swapped and not before:
            dla_fast.swap_(model, verify=False)
        for module_name, module in model.named_modules():
            if choose(module_name, module):
                for kind in kinds:
                    watch(module, module_name, kind, calls)
        if swapped and before:
            dla_fast.swap_(model, verify=False)
        models.append(model)
        seen.append(calls)
    return models, seen


def assert_seen(models, seen):
    def scenario(model, x):
        return step(model, x), model.eval()(x)

    found = []
    for model, calls in zip(models, seen, strict=True):
        found.append(see(model, scenario, image()))
        if found[-1].raised is None:
            found[-1].values["calls"] = len(calls)
            # Whose turn it is between modules that do not wait for each other is nobody's business.
            for i, (name, kind, training, shown) in enumerate(sorted(calls, key=lambda call: call[:2])):
                found[-1].values[f"call {i}"] = f"{name} {kind} {training}"
                found[-1].values.update({f"call {i}, {name} {kind} {j}": t for j, t in enumerate(shown)})
    assert_alike(found)
    return found[0]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["node", "blocks"])
def test_a_hook_at_any_module(name, kind, before):
    modules = [n for n, _ in ALL[name]().named_modules()]
    called = 0
    for chosen in modules:
        models, seen = hooked(name, before, lambda n, _, chosen=chosen: n == chosen, [kind])
        assert_seen(models, seen)
        called += len(seen[0])
    # Of an activation in place there is an error instead.
    assert called >= len(modules) - 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "chosen", [nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d, nn.Sequential, "root", "tree"], ids=str
)
@pytest.mark.parametrize("name", ["concatenating", "adding"])
def test_hooks_at_every_module_of_a_kind(name, chosen, before):
    def choose(module_name, module):
        return (
            module_name.rpartition(".")[2].startswith(chosen) if isinstance(chosen, str) else isinstance(module, chosen)
        )

    # What an in-place activation writes to cannot be shown to a hook on the way back: an error in stock.
    models, seen = hooked(name, before, choose, HOOKS)
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    assert_seen(models, seen)
    assert seen[0]


def test_hooks_that_change_what_they_see():
    def scenario(model, x):
        handles = [
            model.root.conv.register_forward_hook(lambda m, args, y: y * 2),
            model.root.bn.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
            model.root.register_full_backward_hook(lambda m, gi, go: tuple(g * 3 for g in gi)),
            model.left.register_full_backward_pre_hook(lambda m, go: (go[0] * 5,)),
            model.root.register_forward_hook(lambda m, args, kwargs, y: y + 1, with_kwargs=True),
        ]
        found = [step(model, x)]
        for handle in handles:
            handle.remove()
        return [*found, step(model, x), step(model.eval(), x)]

    assert_alike([see(model, scenario, image()) for model in pair("node")])


@pytest.mark.filterwarnings("ignore:For backward hooks")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_all_modules(kind):
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    models = pair("concatenating", verify=False)
    seen = []
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        names, calls = {m: n for n, m in model.named_modules()}, []
        seen.append(calls)

        def hook(module, *shown, names=names, calls=calls):
            calls.append((names[module], kind, module.training, tensors(*shown)))

        handle = register(hook)
        try:
            found = see(model, lambda m, x: step(m, x), image())
        finally:
            handle.remove()
        assert found.raised is None
        calls.append(("all", kind, None, [t for t in found.values.values() if isinstance(t, Tensor)]))
    for calls in seen:
        calls.sort(key=lambda call: call[:2])
    assert [call[:3] for call in seen[0]] == [call[:3] for call in seen[1]]
    assert len(seen[0]) > 100
    for stock, swapped in zip(*seen, strict=True):
        torch.testing.assert_close(swapped[3], stock[3], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_symbolic_tracing(name):
    """Of the model, and of every module of it that can be traced by itself: the same graph."""
    stock, swapped = pair(name, verify=False)
    x, traced = image(), 0
    torch.testing.assert_close(torch.fx.symbolic_trace(swapped.eval())(x), stock.eval()(x), rtol=1e-9, atol=1e-9)
    for module, twin in zip(stock.modules(), swapped.modules(), strict=True):
        if not isinstance(twin, FusedNode):
            continue
        assert inspect.signature(twin.forward) == inspect.signature(module.forward)
        graphs = []
        for m in (module, twin):
            try:
                graphs.append([(str(n.op), str(n.target), str(n.args)) for n in torch.fx.symbolic_trace(m).graph.nodes])
            except (TypeError, torch.fx.proxy.TraceError):
                graphs.append(None)  # a ladder asks for numbers of layers
        assert graphs[0] == graphs[1]
        traced += graphs[0] is not None
    assert traced


@pytest.mark.parametrize("name, training", [("concatenating", True), ("adding", False)])
def test_traced_programs(name, training):
    x, other = image((2, 8, 8)), image((3, 24, 32), seed=2)
    found = []
    for model in pair(name, verify=False):
        traced = torch.jit.trace(model.train(training), (x,), check_trace=False)
        found.append([traced(other), *traced.buffers(), torch.tensor(len(list(traced.graph.nodes())))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", [False, True])
def test_eight_threads(frozen):
    """One model in evaluation, every thread with images of its own size."""
    stock, swapped = pair("adding", verify=False)
    for model in (stock, swapped):
        model.eval()
    if frozen:
        dla_fast.freeze_(swapped)
    images = [image((1 + i % 3, 16, 8 * (i + 1)), seed=i) for i in range(8)]

    def infer(x):
        with torch.no_grad():
            return [swapped(x) for _ in range(4)]

    with torch.no_grad():
        want = [stock(x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(infer, images * 2))
    for several, y in zip(found, want * 2, strict=True):
        for got in several:
            torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-9)


def test_eight_threads_of_gradients():
    """In evaluation the model is only read; every thread has gradients of its own."""
    stock, swapped = pair("concatenating", verify=False)
    images = [image(seed=i) for i in range(8)]

    def gradients(model, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss_of(model(x)), [x, *model.parameters()])

    for model in (stock, swapped):
        model.eval()
    want = [gradients(stock, x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: gradients(swapped, x), images))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_replicas():
    """What nn.DataParallel does with a model, here on one device: replicas without parameters of their own."""
    from torch.nn.parallel.parallel_apply import parallel_apply

    def replica_of(model):
        """As torch.nn.parallel.replicate makes them."""
        made = {}
        for module in model.modules():
            made[module] = module._replicate_for_data_parallel()
        for module, replica in made.items():
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else made[child]
                if child is not None:
                    setattr(replica, name, made[child])
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    copied = parameter.clone()
                    setattr(replica, name, copied)
                    replica._former_parameters[name] = copied
                else:
                    replica._parameters[name] = None
            for name, held in module._buffers.items():
                if held is not None:
                    setattr(replica, name, held.clone())
        return made[model]

    def scenario(model, x):
        found = []
        for _ in range(2):
            parts = x.chunk(2)
            ys = parallel_apply([replica_of(model) for _ in parts], [(part,) for part in parts], devices=[None] * 2)
            y = torch.cat(ys)
            loss_of(y).backward()
            found.append(y)
        return found

    for name in NETWORKS:
        assert_alike([see(copy.deepcopy(m), scenario, image((4, 16, 24))) for m in pair(name, verify=False)])
