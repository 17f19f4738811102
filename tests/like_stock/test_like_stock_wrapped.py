"""Children that are wrapped: adapters of low rank, parametrizations, pruning, quantization-aware training."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import assert_alike, compare, freeze, image, pair, see, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dla_fast


class LowRank(nn.Module):
    """An adapter around a convolution as PEFT libraries have it: the convolution fixed, two small ones beside it."""

    def __init__(self, base: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        options = {"stride": base.stride, "padding": base.padding, "bias": False, "dtype": base.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(base.in_channels, rank, base.kernel_size, **options)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(rank, base.out_channels, 1, bias=False).to(base.weight)})
        self.merged = False
        for i, p in enumerate([*self.lora_A.parameters(), *self.lora_B.parameters()]):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def delta(self):
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        return torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)

    @torch.no_grad()
    def merge(self):
        self.base_layer.weight += self.delta()
        self.merged = True

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B["default"](self.lora_A["default"](x))


class LowRankWeight(nn.Module):
    """The same as a parametrization of the weight."""

    def __init__(self, weight):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), generator=generator).to(weight) * 0.1)
        self.up = nn.Parameter(torch.randn(len(weight), 2, generator=generator).to(weight) * 0.1)

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def convolutions(model, every=2):
    return [m for m in model.modules() if type(m) is nn.Conv2d][::every]


def with_low_rank(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and not isinstance(parent, (LowRank, nn.ModuleDict)):
                setattr(parent, name, LowRank(child))


def with_parametrized(model):
    model.requires_grad_(False)
    for conv in convolutions(model):
        parametrize.register_parametrization(conv, "weight", LowRankWeight(conv.weight))


def with_spectral_norm(model):
    for conv in convolutions(model):
        # Its vectors are drawn.
        torch.manual_seed(0)
        parametrizations.spectral_norm(conv)


def with_old_spectral_norm(model):
    for conv in convolutions(model):
        torch.manual_seed(0)
        nn.utils.spectral_norm(conv)


def with_weight_norm(model):
    for conv in convolutions(model):
        parametrizations.weight_norm(conv)


def with_old_weight_norm(model):
    for conv in convolutions(model):
        nn.utils.weight_norm(conv)


def with_pruned_norms(model):
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][::2]:
        prune.l1_unstructured(norm, "weight", 0.5)


def with_pruning(model):
    for i, conv in enumerate(convolutions(model)):
        if i % 2:
            prune.l1_unstructured(conv, "weight", 0.3)
        else:
            prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)


def without_low_rank(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRank):
                child.merge()
                setattr(parent, name, child.base_layer)


def without_parametrizations(model):
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def without_old_spectral_norm(model):
    for conv in convolutions(model):
        nn.utils.remove_spectral_norm(conv)


def without_old_weight_norm(model):
    for conv in convolutions(model):
        nn.utils.remove_weight_norm(conv)


def without_pruning(model):
    for module in model.modules():
        if hasattr(module, "weight_orig"):
            prune.remove(module, "weight")


WRAPPERS = {
    with_low_rank: without_low_rank,
    with_parametrized: without_parametrizations,
    with_spectral_norm: without_parametrizations,
    with_old_spectral_norm: without_old_spectral_norm,
    with_weight_norm: without_parametrizations,
    with_old_weight_norm: without_old_weight_norm,
    with_pruning: without_pruning,
    with_pruned_norms: without_pruning,
}
WAYS = ["before", "after", "frozen"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)
def test_wrapped(wrap, way):
    """Before the swap and after it, on and off again; and a frozen model, which answers by what it was made of."""

    def scenario(swaps):
        def run(model, x):
            if way == "before":
                wrap(model)
            if swaps:
                dla_fast.swap_(model, verify=False)
            if way == "frozen":
                freeze(model.eval())
                with torch.no_grad():
                    model(x)
            if way != "before":
                wrap(model)
            found = [infer(model, x)] if way == "frozen" else []
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
            for _ in range(2):
                optimizer.zero_grad()
                found.append(step(model.train(), x))
                optimizer.step()
            found.append(infer(model, x))
            WRAPPERS[wrap](model)
            return [*found, infer(model, x), step(model.train(), x), infer(model, x)]

        return run

    for name in ("node", "blocks", "concatenating" if list(WRAPPERS).index(wrap) % 2 else "adding"):
        stock = pair(name, verify=False)[0]
        assert_alike([see(copy.deepcopy(stock), scenario(swaps), image()) for swaps in (False, True)])


def infer(model, x):
    with torch.no_grad():
        return model.eval()(x)


def qconfig():
    from torch.ao import quantization as q

    fake = q.FakeQuantize.with_args
    return q.QConfig(
        activation=fake(observer=q.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8),
        weight=fake(
            observer=q.MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["node", "blocks", "concatenating"])
def test_quantization_aware_training(name):
    """Convolutions exchanged for ones that round their weights and what they give: the original forwards run."""
    from torch.ao import quantization as q

    def scenario(model, x):
        model.train().qconfig = qconfig()
        q.prepare_qat(model, inplace=True)
        found = [step(model, x) for _ in range(2)]
        model.apply(q.disable_observer)
        return [*found, step(model, x), infer(model, x)]

    # Rounded values: what lies within rounding of a step may fall on either side of it.
    compare(scenario, name, verify=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nodes", "node"])
def test_quantization_by_graphs(name):
    """The traced graph has the convolutions and norms of the stock model, and fuses them by itself."""
    from torch.ao import quantization as q
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    def scenario(model, x):
        prepared = prepare_qat_fx(model.train(), q.QConfigMapping().set_global(qconfig()), (x,))
        kinds = [type(m).__name__ for m in prepared.modules()]
        found = [step(prepared, x) for _ in range(2)]
        return found, kinds, [p.grad for p in prepared.parameters()], list(prepared.buffers())

    compare(scenario, name, verify=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_fused_by_hand(training):
    """fuse_modules puts a module of its own in the convolution's place, and identities for the rest."""
    from torch.ao import quantization as q

    def scenario(model, x):
        model.train(training)
        fuse = q.fuse_modules_qat if training else q.fuse_modules
        for name, module in list(model.named_modules()):
            if hasattr(module, "conv1") and hasattr(module, "bn1"):
                pairs = [[f"{name}.conv{i}", f"{name}.bn{i}"] for i in (1, 2)]
                fuse(model, pairs, inplace=True)
            elif hasattr(module, "conv") and hasattr(module, "bn"):
                fuse(model, [[f"{name}.conv", f"{name}.bn"]], inplace=True)
        return step(model, x), infer(model, x)

    for name in ("node", "blocks", "adding"):
        compare(scenario, name, verify=False)
