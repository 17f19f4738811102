"""What is done to a model itself: copies, conversions, children exchanged and shared, functional calls, modes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pairs import cases, compare, loss_of, step
from torch import nn


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def sub_class(model, x):
    class Marked(torch.Tensor):
        pass

    y = model(x.as_subclass(Marked))
    loss_of(y).backward()
    return type(y).__name__, y.as_subclass(torch.Tensor)


def logged_operations(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops:
        y = step(model, x)
    return y, flops.get_total_flops() > 0


def copied_in_training(model, x):
    step(model, x)
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(twin))
    found = [[step(m, x), [p.grad for p in m.parameters()], list(m.buffers())] for m in (twin, loaded)]
    return found, [len(list(m.modules())) for m in (twin, loaded)]


def copied_between_passes(model, x):
    y = model(x)
    twin = copy.deepcopy(model)
    loss_of(y).backward()
    return step(twin, x), [p.grad for p in twin.parameters()], list(twin.state_dict().values())


def converted(model, x):
    """Every dtype and layout on the way; half precision is rounded there, and float64 what is compared."""
    found = [step(model, x)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        with torch.no_grad():
            found.append([model.eval()(x.to(dtype)).dtype, str(next(model.parameters()).dtype)])
        model.train()
    model.zero_grad()
    model.double().to(memory_format=torch.channels_last)
    found.append(step(model, x))
    model.to(memory_format=torch.contiguous_format)
    return [*found, step(model, x.contiguous(memory_format=torch.channels_last))]


def another_dtype(model, x):
    return model(x.float())


def functional_call(model, x):
    parameters = {name: (p * 0.5).detach().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    y = torch.func.functional_call(model, (parameters, buffers), (x,))
    loss_of(y).backward()
    return y, [p.grad for p in parameters.values()], buffers


def functional_gradients(model, x):
    parameters = dict(model.named_parameters())
    model.eval()
    grads, y = torch.func.grad_and_value(lambda p: loss_of(torch.func.functional_call(model, p, (x.detach(),))))(
        parameters
    )
    return grads, y


def stateless(model, x):
    parameters = {name: p * 0.5 for name, p in model.named_parameters()}
    with torch.nn.utils.stateless._reparametrize_module(model, parameters):
        y = model(x)
    loss_of(y).backward()
    return y


def ensemble(model, x):
    models = [copy.deepcopy(model).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.5)
    parameters, buffers = torch.func.stack_module_state(models)
    call = lambda p, b: torch.func.functional_call(models[0], (p, b), (x,))  # noqa: E731
    return torch.vmap(call)(parameters, buffers)


def vector_of_parameters(model, x):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.9, model.parameters())
    return step(model, x)


def initialised_by_apply(model, x):
    visited = []

    def initialise(module):
        visited.append(len(list(module.children())))
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.05)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    model.apply(initialise)
    names = [name for name, _ in model.named_modules()], [name for name, _ in model.named_parameters()]
    return visited, names, step(model, x)


def replaced(make):
    """The children of a kind exchanged for others after the swap."""

    def scenario(model, x):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                new = make(child)
                if new is not None:
                    setattr(parent, name, new.to(x.dtype))
        return [step(model, x), step(model.eval(), x)]

    scenario.__name__ = f"replaced_{make.__name__}"
    return scenario


def by_group_norm(child):
    return nn.GroupNorm(2, child.num_features) if isinstance(child, nn.BatchNorm2d) else None


def by_instance_norm(child):
    return nn.InstanceNorm2d(child.num_features, affine=True) if isinstance(child, nn.BatchNorm2d) else None


def by_identity(child):
    return nn.Identity() if isinstance(child, nn.BatchNorm2d) else None


def by_tanh(child):
    return nn.Tanh() if isinstance(child, nn.ReLU) else None


def by_silu(child):
    return nn.SiLU() if isinstance(child, nn.ReLU) else None


def by_biased_convolution(child):
    if not isinstance(child, nn.Conv2d) or child.bias is not None:
        return None
    new = copy.deepcopy(child)
    new.bias = nn.Parameter(torch.linspace(-1, 1, child.out_channels, dtype=child.weight.dtype))
    return new


def by_dropout_behind(child):
    return nn.Sequential(child, nn.Dropout2d(0.0)) if isinstance(child, nn.BatchNorm2d) else None


def by_folded(child):
    if isinstance(child, nn.Sequential) and len(child) >= 2 and isinstance(child[1], nn.BatchNorm2d):
        conv, norm = child[0].eval(), child[1].eval()
        child[0], child[1] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm), nn.Identity()
    return None


REPLACED = [
    by_group_norm, by_instance_norm, by_identity, by_tanh, by_silu, by_biased_convolution, by_dropout_behind, by_folded,
]  # fmt: skip


def shared_children(model, x):
    """Norms and convolutions of equal shapes are the same from now on."""
    first = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
                key = type(child), *(tuple(p.shape) for p in child.parameters())
                setattr(parent, name, first.setdefault(key, child))
    return [step(model, x) for _ in range(2)]


def shared_parameters(model, x):
    first = {}
    for conv in convolutions(model):
        conv.weight = first.setdefault(tuple(conv.weight.shape), conv.weight)
    return [step(model, x) for _ in range(2)]


def default_dtype_and_device(model, x):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = [step(model, x)]
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            found.append(model(x))
        loss_of(found[-1]).backward()
    finally:
        torch.set_default_dtype(before)
    return found


def function_mode(model, x):
    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Counting():
        return step(model, x)


def dispatch_mode(model, x):
    class Passing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Passing():
        return step(model, x)


def profiled(model, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return step(model, x)


def state_dict_with_hooks(model, x):
    step(model, x)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(more=len(state)))
    state = model.state_dict(keep_vars=True)
    return (
        list(state),
        [type(v).__name__ for v in state.values()],
        state._metadata["" if "" in state._metadata else None],
    )


def shared_memory(model, x):
    model.share_memory()
    return step(model, x), [p.is_shared() for p in model.parameters()]


SCENARIOS = [
    sub_class, logged_operations, copied_in_training, copied_between_passes, converted, another_dtype,
    functional_call, functional_gradients, stateless, ensemble, vector_of_parameters, initialised_by_apply,
    *map(replaced, REPLACED), shared_children, shared_parameters, default_dtype_and_device, function_mode,
    dispatch_mode, profiled, state_dict_with_hooks, shared_memory,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scenario, name, layout", cases(SCENARIOS), ids=lambda value: getattr(value, "__name__", value)
)
def test_scenario(scenario, name, layout):
    compare(scenario, name, layout, verify=False)
