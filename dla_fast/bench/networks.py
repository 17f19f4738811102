"""Whole networks by name, as each implementation runs them, with the images and outputs that they happen to have."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dla_fast
from dla_fast import backend, models
from dla_fast._timm import import_timm
from dla_fast.bench import exported, peers
from dla_fast.bench.cases import LAYOUTS, image_size
from dla_fast.bench.plain import PlainSeg
from dla_fast.bench.timing import Settings


@dataclass(frozen=True)
class Network:
    """A network, its images' size in pixels, and how many of them there are."""

    name: str
    size: int
    batch: int

    @staticmethod
    def of(name: str, size: int | None, batch: int | None) -> Network:
        """With the defaults of its kind: 8 images of 224, and for dense prediction 2 of 512."""
        return Network(name, image_size(name, size), batch or (2 if name.endswith("up") else 8))


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in whatever a network gives."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [t for value in values for t in tensors_of(value)]


def make(name: str, impl: str, state: dict[str, Tensor] | None = None) -> tuple[nn.Module, str]:
    """A network as an implementation runs it, and where it comes from.

    Eager is the network that people run: timm's where timm has it, and for dense prediction one written op by op
    around timm's. Without timm it is this package's on the PyTorch reference. That network is also what
    ``dla_fast+swapped`` and ``dla_fast+frozen`` start from; ``dla_fast`` itself is the one built of this package's
    modules, and ``dla_fast+low`` that with ``memory="low"``.

    Args:
        name: one of :func:`dla_fast.models.list_models`.
        impl: ``dla_fast``, ``dla_fast:<backend>``, a variant or a peer.
        state: parameters and buffers to load.
    """
    swapped = impl in (peers.SWAPPED, peers.FROZEN)
    stock = None if impl == "reference" or (impl.startswith(peers.FUSED) and not swapped) else _stock(name)
    memory = "low" if impl == peers.LOW else "default"
    network = models.create_model(name, memory=memory) if stock is None else stock
    if state is not None:
        network.load_state_dict(state)
    source = "dla_fast" if stock is None else "timm"
    if swapped:
        units = len(dla_fast.swap_(network).swapped)
        if not units:
            raise RuntimeError("swap_ took nothing of it")
        source += f", {units} units swapped"
    return network, source


def _stock(name: str) -> nn.Module | None:
    """The network as others wrote it; None where timm is missing."""
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = import_timm()
        if timm.is_model(name):
            network: nn.Module = timm.create_model(name)
            return network
        base = name.removesuffix("up")
        if base != name and timm.is_model(base):
            like = models.create_model(name, device="meta")
            assert isinstance(like, models.DLASeg)
            channels = like.base.feature_info.channels()
            return PlainSeg(timm.create_model(base, num_classes=0), channels, like.num_classes, like.down_ratio)
    return None


def ready(model: nn.Module, impl: str) -> nn.Module:
    """A network of :func:`make` in its last form, once it has its device, dtype, layout and mode."""
    if impl == peers.FROZEN:
        dla_fast.freeze_(model)
    return model


def backend_for(impl: str) -> str:
    """The backend that has to be in force for an implementation of a whole network."""
    return peers.backend_of(impl) if impl.startswith(peers.FUSED) else "reference"


class _Convolutions(TorchDispatchMode):
    """Adds up what a network's convolutions have to move and to compute, each with the norm after it."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training
        self.values = self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, transposed = args[0], args[1], args[6]
            product = 2.0 * weight[0].numel() * (x if transposed else result).numel()
            if not transposed:
                self.add(x.numel(), result.numel(), weight, product)
            else:
                self.values += (3 if self.training else 1) * (x.numel() + result.numel() + weight.numel())
                self.flops += (3 if self.training else 1) * product
        return result

    def add(self, read: int, written: int, weight: Tensor, product: float) -> None:
        """A convolution-norm-activation unit, counted as in :meth:`dla_fast.bench.cases.Case.work`."""
        tail = 6 if weight.shape[-1] == 1 else 8
        self.values += (3 * read + (1 + tail) * written if self.training else read + written) + weight.numel()
        self.flops += product * (3 if self.training else 1)


def work(network: Network, training: bool) -> tuple[float, float]:
    """Values to move and flops to do in one pass over a batch, from the network's convolutions alone."""
    images = torch.empty(network.batch, 3, network.size, network.size, device="meta")
    return work_of(models.create_model(network.name, device="meta").train(training), images, training)


def work_of(model: nn.Module, inputs: Any, training: bool) -> tuple[float, float]:
    """The same of a model on the meta device, called in the mode it is in with ``inputs`` that are there too."""
    counter = _Convolutions(training)
    with torch.no_grad(), backend.use_backend("reference"), counter:
        model(inputs)
    return counter.values, counter.flops


def step(
    model: Callable[..., Any], images: Any, mode: str, parameters: Sequence[Tensor], forced: str
) -> Callable[[], list[Tensor]]:
    """One pass of a network over ``images``, its one argument: outputs, and in training gradients of ``parameters``."""

    def run() -> list[Tensor]:
        with backend.use_backend(forced):
            if mode == "inference":
                with torch.no_grad():
                    return tensors_of(model(images))
            outputs = tensors_of(model(images))
        if mode == "forward":
            return outputs
        # A loss that every output takes part in, whatever its shape.
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        return [*outputs, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    return run


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are trained, by name, since two sources may list them in different orders."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


@functools.lru_cache(maxsize=4)
def initial_state(name: str, statistics: bool = True) -> dict[str, Tensor]:
    """Parameters of a network, and statistics with which its values stay of ordinary size; the same in every call."""
    torch.manual_seed(0)
    model = models.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    if not statistics:
        return model.state_dict()
    # Statistics that fit: with fresh ones the values of an evaluation grow through the layers without bound.
    size = 64
    with torch.no_grad(), backend.use_backend("reference"):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(4, 3, size, size))
    return model.state_dict()


def layout_of(impl: str, settings: Settings) -> str:
    """The layout that an implementation runs in."""
    if impl in exported.MODULES:
        return "contiguous"
    return peers.OTHER_LAYOUT[settings.layout] if impl == "eager_other_layout" else settings.layout


def implementation(
    network: Network,
    mode: str,
    impl: str,
    state: dict[str, Tensor],
    settings: Settings,
    rounded: torch.dtype | None = None,
) -> tuple[Callable[[], Any], str]:
    """One pass of an implementation of a network, and where the network is from; the images rounded to a dtype."""
    layout = LAYOUTS[layout_of(impl, settings)]
    torch.manual_seed(1)
    # On a CPU the values are those of any device, on another they need not travel.
    images = torch.randn(network.batch, 3, network.size, network.size, device=settings.device)
    images = images.to(rounded or settings.torch_dtype)
    images = images.to(device=settings.device, dtype=settings.torch_dtype, memory_format=layout)
    model, source = make(network.name, impl, state)
    # The overloads of Module.to leave out a call with all three.
    model = model.to(device=settings.device, dtype=settings.torch_dtype).to(memory_format=layout)  # type: ignore[call-overload]
    model = model.train(mode != "inference")
    parameters = trained(model)
    forced = backend_for(impl)
    if impl in exported.MODULES:
        return exported.runner(impl, model, images), source
    model = ready(model, impl)
    if not impl.startswith("compile") or settings.device.type == "meta":
        return step(model, images, mode, parameters, forced), source
    with peers.compiling(impl) as options:
        compiled = torch.compile(model, dynamic=False, **options)
        call = step(compiled, images, mode, parameters, forced)
        call()
    return call, source


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with this many CPU threads, or with as many as there are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
