"""A stock model and its swapped copy through one scenario: everything that shows afterwards is compared.

A scenario is a function of a model and its input. It does to the model what a user would and returns whatever should be
alike: tensors in any nesting, numbers, strings. What it raises is part of what shows, and so are the model's
parameters, buffers and gradients, and that of the input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from nn_helpers import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

import dla_fast
from dla_fast.swap.nodes import FusedNode
from examples.networks import AddingIDAUp, BasicBlock, ConcatIDAUp, DLAUp, Root, Tree, unit

CHANNELS = (4, 6, 8, 12)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Nodes(nn.Module):
    """Trees of depth one and two: roots with and without a residual, of two to four inputs, and their blocks."""

    def __init__(self) -> None:
        super().__init__()
        c = CHANNELS
        self.stem = unit(3, c[0])
        self.level1 = Tree(1, c[0], c[1], 2, False)
        self.level2 = Tree(2, c[1], c[2], 2, True)
        self.level3 = Tree(1, c[2], c[3], 2, True)
        for module in self.level2.modules():
            if isinstance(module, Root):
                module.residual = True

    def levels(self, x: Tensor) -> list[Tensor]:
        """All four maps, the finest first."""
        found = [self.stem(x)]
        for level in (self.level1, self.level2, self.level3):
            found.append(level(found[-1]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.levels(x)[-1]


class Ladders(Nodes):
    """The same with ladders over it, that concatenate or that add."""

    def __init__(self, ladder: type[AddingIDAUp] | type[ConcatIDAUp]) -> None:
        super().__init__()
        self.dla_up = DLAUp(CHANNELS, ladder)

    def forward(self, x: Tensor) -> Tensor:
        return self.dla_up(self.levels(x))[0]


class Node(nn.Module):
    """One node between a convolution and what reads it, so that it is neither first nor last."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.root = Root(8, 4, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.root(self.left(x), self.right(x)) * 1.5


class Blocks(nn.Module):
    """Two basic blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), BasicBlock(4, 4), BasicBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.first(x, x)
        return self.second(x, x)


# Whole small networks; inputs have to be multiples of 8. Parts alone are in PARTS, any size will do there.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "nodes": Nodes,
    "concatenating": lambda: Ladders(ConcatIDAUp),
    "adding": lambda: Ladders(AddingIDAUp),
}
PARTS: dict[str, Callable[[], nn.Module]] = {"node": Node, "blocks": Blocks}
ALL = {**NETWORKS, **PARTS}

Scenario = Callable[[nn.Module, Tensor], Any]


@dataclass
class Seen:
    """What showed: ``raised`` is the error's nearest standard class and text, the rest by name."""

    values: dict[str, Any] = field(default_factory=dict)
    raised: BaseException | None = None


def pair(name: str, layout: str = "nchw", dtype: torch.dtype = torch.float64, **options: Any) -> list[nn.Module]:
    """A stock network of :data:`ALL` and its swapped copy, in training mode; ``options`` are those of swap_."""
    torch.manual_seed(0)
    stock = randomise(ALL[name]()).to(dtype=dtype, memory_format=LAYOUTS[layout])
    swapped = copy.deepcopy(stock)
    report = dla_fast.swap_(swapped, **options)
    assert report.swapped
    return [stock, swapped]


def image(
    size: tuple[int, int, int] = (2, 16, 24), layout: str = "nchw", dtype: torch.dtype = torch.float64, seed: int = 1
) -> Tensor:
    """A batch of images; ``size``: images, height, width."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size[0], 3, *size[1:], generator=generator, dtype=dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def loss_of(y: Tensor) -> Tensor:
    """A scalar in which every value of ``y`` counts differently."""
    return (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype) * 0.7 + 1).view_as(y)).sum()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """One forward and backward pass; gradients add up in ``.grad``."""
    y: Tensor = model(x)
    loss_of(y).backward()
    return y


def freeze(model: nn.Module) -> nn.Module:
    """Freeze a model where it is swapped, so that a scenario may be of frozen models too."""
    if any(isinstance(module, FusedNode) for module in model.modules()):
        dla_fast.freeze_(model)
    return model


def see(model: nn.Module, scenario: Scenario, x: Tensor, requires_grad: bool = True) -> Seen:
    """Run a scenario on one model and collect all that shows."""
    x = x.detach().clone().requires_grad_(requires_grad)
    seen = Seen()
    try:
        returned = scenario(model, x)
    except Exception as error:
        seen.raised = error
    else:
        for path, leaf in tree_flatten_with_path(returned)[0]:
            seen.values["returned" + "".join(map(str, path))] = leaf
    for name, parameter in model.named_parameters():
        seen.values[name], seen.values[f"{name}.grad"] = parameter, parameter.grad
    seen.values.update(model.named_buffers())
    seen.values["input.grad"], seen.values["state_dict"] = x.grad, list(model.state_dict())
    return seen


def assert_alike(seen: list[Seen], rtol: float = 1e-9, same_text: bool = False) -> None:
    """Of the swapped model all is as of the stock one: errors too, by class, and where asked to by text.

    Args:
        seen: of stock and of swapped.
        rtol: of each tensor, to its largest finite value, or to 1e-3 where that is less: some gradients are truly zero.
            What is not finite has to stand where it stands in stock.
        same_text: errors say the same, too.
    """
    stock, swapped = seen
    if stock.raised is not None or swapped.raised is not None:
        assert stock.raised is not None, f"the swapped model alone raised {swapped.raised!r}"
        assert swapped.raised is not None, f"the stock model alone raised {stock.raised!r}"
        assert isinstance(swapped.raised, type(stock.raised)), (stock.raised, swapped.raised)
        if same_text:
            assert str(stock.raised) == str(swapped.raised)
    assert list(stock.values) == list(swapped.values)
    for name, want in stock.values.items():
        got = swapped.values[name]
        assert type(got) is type(want), f"{name}: {type(got).__name__}, stock has {type(want).__name__}"
        if not isinstance(want, Tensor):
            assert got == want, f"{name}: {got}, stock has {want}"
            continue
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, stock has {want.dtype}"
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, stock has {tuple(want.shape)}"
        assert got.requires_grad == want.requires_grad, f"{name}: requires_grad {got.requires_grad}"
        want, got = want.detach(), got.detach()
        finite = want.isfinite() if want.is_floating_point() else torch.ones_like(want, dtype=torch.bool)
        scale = want[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(
            got,
            want,
            rtol=0,
            atol=rtol * max(scale, 1e-3),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def compare(scenario: Scenario, name: str, layout: str = "nchw", x: Tensor | None = None, **options: Any) -> list[Seen]:
    """:func:`assert_alike` of a scenario on a :func:`pair`; gives what showed."""
    x = image(layout=layout) if x is None else x
    seen = [see(model, scenario, x) for model in pair(name, layout, **options)]
    assert_alike(seen)
    return seen


def graphs(
    function: Callable[..., Tensor],
    calls: Iterable[Sequence[Tensor]],
    backend: str = "aot_eager",
    marked: Sequence[int] = (),
    **options: Any,
) -> int:
    """How many graphs torch.compile makes of a function in one piece, over its calls and their backward passes.

    Args:
        function: gives one tensor; a backward pass follows where that requires grad.
        calls: the arguments of each; a generator may change the world in between.
        backend: of torch.compile, like ``options``.
        marked: the dimensions of the first call's tensors that mark_dynamic is told of.
        options: see ``backend``.
    """
    # Not before it is needed: this import takes longer than many a test.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    for i, call in enumerate(calls):
        for x in call if i == 0 else ():
            for dim in marked:
                torch._dynamo.mark_dynamic(x, dim)
        y = compiled(*call)
        if y.requires_grad:
            loss_of(y).backward()
    return int(counter.frame_count)


def cases(scenarios: Sequence[Scenario]) -> list[tuple[Scenario, str, str]]:
    """Each on one of the ladders over the nodes and their blocks, and on a node alone; layouts by turns."""
    return [
        (scenario, name, list(LAYOUTS)[(i // 2 + j) % 2])
        for i, scenario in enumerate(scenarios)
        for j, name in enumerate([("concatenating", "adding")[i % 2], "node"])
    ]
