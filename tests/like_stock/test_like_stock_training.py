"""What is done to a model while it trains, and to its graph between forward and backward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pairs import cases, compare, loss_of, step
from torch import nn


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, **options)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def toggled_gradients(model, x):
    found = []
    parameters = list(model.parameters())
    for turn in range(4):
        for i, parameter in enumerate(parameters):
            parameter.requires_grad_(turn == 3 or (i + turn) % 3 != 0)
        found.append(step(model, x))
    return found


def only_norms_train(model, x):
    model.requires_grad_(False)
    for norm in norms(model):
        norm.requires_grad_(True)
    return step(model, x)


def nothing_trains(model, x):
    model.requires_grad_(False)
    return step(model, x), torch.autograd.grad(loss_of(model(x)), x)


def norms_in_evaluation(model, x):
    for norm in norms(model)[::2]:
        norm.eval()
    found = [step(model, x)]
    for norm in norms(model):
        norm.train(not norm.training)
    return [*found, step(model, x)]


def train_is_overridden(model, x):
    cls = type(model)

    class FixedNorms(cls):
        def train(self, mode=True):
            super().train(mode)
            for norm in norms(self):
                norm.eval()
            return self

    model.__class__ = FixedNorms
    model.train()
    found = [step(model, x)]
    model.__class__ = cls
    return [*found, step(model.train(), x)]


def parameter_groups(model, x):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 1e-4}], lr=1e-3, momentum=0.9, nesterov=True
    )
    for _ in range(3):
        optimizer.zero_grad()
        step(model, x)
        optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def accumulated_and_clipped(model, x):
    optimizer = sgd(model)
    found = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        for part in x.split(1):
            (loss_of(model(part)) / 2).backward()
        found += [nn.utils.clip_grad_norm_(model.parameters(), 1.0), nn.utils.get_total_norm(model.parameters())]
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
    return found


def scaled_gradients(model, x):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1), sgd(model)
    for turn in range(3):
        optimizer.zero_grad()
        y = model(x)
        scaler.scale(loss_of(y) * (float("inf") if turn == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


def kept_on_the_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    loss_of(y).backward()
    return y


def kept_in_files(model, x):
    def pack(t):
        file = io.BytesIO()
        torch.save(t.detach(), file)
        return file

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda file: (file.seek(0), torch.load(file))[1]):
        y = model(x)
    loss_of(y).backward()
    return y


def gradients_on_and_off(model, x):
    found = []
    for on in (False, True, False, True):
        with torch.set_grad_enabled(on):
            found.append(model(x))
    with torch.inference_mode():
        found.append(model(x))
    loss_of(found[1] + found[3]).backward()
    return found


def one_graph_for_two_calls(model, x):
    y = model(x)
    z = model(x * 0.5 + 1)
    loss_of(y * z).backward(retain_graph=True)
    loss_of(z).backward()
    return y, z


def twice_without_retaining(model, x):
    loss = loss_of(model(x))
    loss.backward()
    loss.backward()


def some_gradients(model, x):
    parameters = [*model.parameters()][::3]
    y = model(x)
    found = torch.autograd.grad(loss_of(y), [x, *parameters], retain_graph=True)
    torch.autograd.backward([loss_of(y)], inputs=parameters)
    return found


def anomaly(model, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        return step(model, x)


def anomaly_of_nan(model, x):
    y = model(x)
    with torch.autograd.detect_anomaly(check_nan=True):
        (loss_of(model(x)) * torch.tensor(float("nan"))).backward()
    return y


def graph_hooks(model, x):
    found = []
    y = model(x)
    y.register_hook(lambda g: found.append(g.clone()) or g * 2)
    y.grad_fn.register_hook(lambda gi, go: found.append(go[0].clone()))
    y.grad_fn.register_prehook(lambda go: found.append(go[0].clone()))
    x.register_hook(lambda g: found.append(g.clone()))
    watched = list(model.parameters())[:3]
    handle = torch.autograd.graph.register_multi_grad_hook(watched, lambda gs: found.extend(g.clone() for g in gs))
    loss_of(y).backward()
    handle.remove()
    return found


def parameter_hooks(model, x):
    found = []
    for parameter in model.parameters():
        parameter.register_hook(lambda g: g * 0.5)
        parameter.register_post_accumulate_grad_hook(lambda p: found.append(tuple(p.shape)))
    y = step(model, x)
    return y, sorted(found)


def optimizer_in_backward(model, x):
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return [step(model, x) for _ in range(2)]


def changed_momentum_and_eps(model, x):
    found = [step(model, x)]
    for i, norm in enumerate(norms(model)):
        norm.momentum, norm.eps = (0.3, None)[i % 2], 1e-2
    return [*found, step(model, x), step(model.eval(), x)]


def reset_statistics(model, x):
    found = [step(model, x)]
    for norm in norms(model):
        norm.reset_running_stats()
    found.append(step(model, x))
    for norm in norms(model):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return [*found, step(model, x), step(model.eval(), x)]


def no_gradient_of_the_input(model, x):
    return [step(model, x.detach()) for _ in range(2)]


def second_order(model, x):
    (grad,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    grad.square().sum().backward()
    return grad


def schedule_free(model, x):
    """A closure that is called more than once in a step."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=2, history_size=2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        return loss

    return optimizer.step(closure)


SCENARIOS = [
    toggled_gradients, only_norms_train, nothing_trains, norms_in_evaluation, train_is_overridden, parameter_groups,
    accumulated_and_clipped, scaled_gradients, kept_on_the_cpu, kept_in_files, gradients_on_and_off,
    one_graph_for_two_calls, twice_without_retaining, some_gradients, anomaly, anomaly_of_nan, graph_hooks,
    parameter_hooks, optimizer_in_backward, changed_momentum_and_eps, reset_statistics, no_gradient_of_the_input,
    second_order, schedule_free,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scenario, name, layout", cases(SCENARIOS), ids=lambda value: getattr(value, "__name__", value)
)
def test_scenario(scenario, name, layout):
    compare(scenario, name, layout, verify=False)
