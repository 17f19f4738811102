"""What may happen to a frozen model between two calls: none of it is missed."""

from __future__ import annotations

import pytest
import torch
from freeze_helpers import assert_same, counting, infer, ladder, needs_kernels, optimizer_step, unfrozen
from model_helpers import randomise, relative
from torch import nn
from torch.nn.utils import parametrize, prune

import dla_fast

calls = counting()

# Each changes the results.


def load_state_dict(model):
    model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()})


def assign_state_dict(model):
    model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()}, assign=True)


def moving_average(model):
    for p in model.parameters():
        p.data.mul_(0.9).add_(torch.ones_like(p), alpha=0.1)


def write_of_one_weight(model):
    with torch.no_grad():
        model.block.conv1.weight[5, 3, 1, 1] += 1


def write_of_one_filter_past_torch(model):
    model.block.conv2.weight.data[9] = 0


def write_of_one_norm_value_past_torch(model):
    model.block.bn1.bias.detach().numpy()[3] += 1


def data_exchanged(model):
    model.block.conv1.weight.data = model.block.conv1.weight.data * 2


def data_transposed(model):
    model.block.conv2.weight.data = model.block.conv2.weight.data.transpose(0, 1)


def parameter_exchanged(model):
    conv = model.block.conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def conv_bias(model):
    model.ida.node_1[0].bias = nn.Parameter(torch.linspace(-1, 1, 8))


def running_mean(model):
    model.block.bn2.running_mean.add_(1)


def running_var(model):
    model.ida.proj_1[1].running_var.mul_(2)


def epsilon(model):
    model.block.bn1.eps = 0.5


def norm_without_affine(model):
    model.block.bn1 = nn.BatchNorm2d(16, affine=False).eval()


def norm_exchanged(model):
    model.block.bn1 = randomise(nn.BatchNorm2d(16)).eval()


def norm_synchronised(model):
    model.block = nn.SyncBatchNorm.convert_sync_batchnorm(model.block)
    optimizer_step(model)


def norm_of_batches(model):
    bn = model.block.bn1
    bn.running_mean = bn.running_var = None


def hook(model):
    model.block.conv1.register_forward_hook(lambda module, args, y: y * 2)


def pruned(model):
    prune.l1_unstructured(model.block.conv1, "weight", 0.5)


def pruned_for_good(model):
    pruned(model)
    prune.remove(model.block.conv1, "weight")


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model):
    parametrize.register_parametrization(model.block.conv2, "weight", Double())


def stride(model):
    model.block.conv1.stride = model.project.stride = (1, 1)
    model.ida.up_factors, model.ida.up_1 = (1, 1), nn.Identity()


def up_weight(model):
    with torch.no_grad():
        model.ida.up_1.weight.mul_(2)


def training_step(model):
    model.train()
    model(torch.randn(2, 8, 6, 4)).sum().backward()
    model.eval()
    optimizer_step(model)


def written_in_inference_mode(model):
    with torch.inference_mode():
        model.block.conv1.weight.mul_(2)


SERVED = [
    load_state_dict, assign_state_dict, optimizer_step, moving_average, write_of_one_weight,
    write_of_one_filter_past_torch, write_of_one_norm_value_past_torch, data_exchanged, data_transposed,
    parameter_exchanged, conv_bias, running_mean, running_var, epsilon, norm_exchanged, norm_without_affine,
    pruned_for_good, stride, up_weight, training_step, written_in_inference_mode, norm_synchronised,
]  # fmt: skip
# A call in which a unit is one no longer, or cannot be kept.
PARTLY = [norm_of_batches, hook, pruned, parametrized]


@needs_kernels
@pytest.mark.parametrize("change", [*SERVED, *PARTLY], ids=lambda change: change.__name__)
def test_what_changes_is_never_stale(calls, change):
    model, x = ladder()
    report = dla_fast.freeze_(model)
    before = infer(model, x)
    change(model)
    calls["run"] = 0
    want = unfrozen(model, x)
    for _ in range(2):
        assert_same(infer(model, x), want)
    assert want.shape != before.shape or relative(before, want) > 1e-3
    lost = 0 if change in SERVED else 1
    assert calls["run"] == 2 * (report.units - lost)


def double(model):
    return model.double()


def half_and_back(model):
    return model.to(torch.bfloat16).float()


def new_layout(model):
    return model.to(memory_format=torch.channels_last)


def shared_memory(model):
    return model.share_memory()


@needs_kernels
@pytest.mark.parametrize("swapping", [False, True])
@pytest.mark.parametrize("move", [double, half_and_back, new_layout, shared_memory], ids=lambda f: f.__name__)
def test_moves(calls, move, swapping):
    """Conversions write new memory into parameters, or exchange what parameters are."""
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        move(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = x.to(model.project.weight.dtype)
    want = unfrozen(model, x)
    calls["run"] = 0
    assert_same(infer(model, x), want)
    assert calls["run"] == report.units
