"""Freezing a model's units for inference, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import cast

from torch import nn

from dla_fast.nn.aggregate import AggregationNode
from dla_fast.nn.blocks import BasicBlock, Bottleneck, ConvLevel, SplitBottleneck
from dla_fast.nn.frozen import KEY, Frozen, FrozenModel
from dla_fast.nn.ida import ConvNormAct
from dla_fast.nn.tree import Projection
from dla_fast.ops import packed
from dla_fast.swap.nodes import FusedNode

# Modules of this package that run units: the norm of each follows its convolution among the children.
_OWN = (AggregationNode, BasicBlock, Bottleneck, ConvLevel, ConvNormAct, Projection, SplitBottleneck)


class FreezeReport:
    """What :func:`dla_fast.freeze_` did; ``print(report)`` says it in a line.

    Attributes:
        units: how many units are frozen now, by their convolutions.
    """

    def __init__(self, frozen: list[Frozen]) -> None:
        self.units = len(frozen)
        self._frozen = frozen

    @property
    def bytes(self) -> int:
        """Bytes of folded norms and packed weights that are kept at the moment; 0 before the model's first call."""
        return sum(frozen.nbytes for frozen in self._frozen)

    def __str__(self) -> str:
        return f"{self.units} units frozen, {self.bytes / 2**20:.1f} MiB of folded norms and packed weights kept"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"


def _units(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolution and the norm of each unit of a model, in this package's modules and in swapped ones."""
    for module in model.modules():
        pairs: Iterable[tuple[nn.Module | None, nn.Module | None]] = ()
        if isinstance(module, FusedNode):
            pairs = module._dla_fast_units()
        elif isinstance(module, _OWN):
            pairs = pairwise(module.children())
        for conv, bn in pairs:
            if type(conv) is nn.Conv2d and type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm):
                yield conv, cast(nn.BatchNorm2d, bn)


def freeze_(model: nn.Module) -> FreezeReport:
    """Prepare a model's units for inference on the CPU, in place: norms folded, weights packed once.

    A unit is a convolution with the batch norm and activation behind it, in modules of this package and in those that
    :func:`dla_fast.swap_` has swapped. The first call folds and packs, those after it use what it has made. Parameters,
    buffers, keys and the model's class stay as they are, and so do gradients: what is kept serves calls of inference
    alone, in evaluation mode, under ``torch.no_grad`` or ``torch.inference_mode``, on the CPU's kernels, in the dtype
    of the weights. Every other call (training, gradients, which is said once by a warning, autocast to another dtype,
    compiling, export, other devices) runs as before the model was frozen.

    Every call compares the unit's tensors with what was folded: their memory, dtype, shape, strides and version, the
    norm's values, and of the weight one value of every filter and 64 at least. What has changed is folded and packed
    again, so optimizers, averages of weights (through ``.data`` too), ``load_state_dict``, ``to`` and exchanged
    parameters or modules need no further call. What goes unseen is a write to a few single values of a weight where
    torch does not count it: through ``.data``, numpy, another process, or into parameters made in inference mode. Call
    ``unfreeze_`` and ``freeze_`` after such a write.

    Several threads may call a frozen model at once. Copies and pickles of it are frozen too, and fold at their first
    call. Freezing twice is freezing once; modules that are swapped later need another call.

    Args:
        model: any module with units, in evaluation mode.

    Returns:
        The report: how many units are frozen, and the bytes that are kept at the time it is asked.

    Raises:
        ValueError: the model has no unit, or the norm of a unit is in training mode. Nothing is frozen then.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    convs = {}
    for conv, bn in _units(model):
        if bn.training:
            name = next(name for name, module in model.named_modules() if module is bn)
            raise ValueError(f"model: {name} is in training mode; call model.eval() before freeze_")
        convs[id(conv)] = conv
    if not convs:
        raise ValueError("model: nothing in it is fused; call dla_fast.swap_(model) before freeze_")
    shared = FrozenModel()
    for conv in convs.values():
        # Past nn.Module.__setattr__: this is neither a parameter nor a child.
        conv.__dict__.setdefault(KEY, Frozen(shared))
    return FreezeReport([conv.__dict__[KEY] for conv in convs.values()])


def unfreeze_(model: nn.Module) -> int:
    """Free what :func:`freeze_` keeps of a model; it runs exactly as before.

    Args:
        model: any module.

    Returns:
        How many units were frozen.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [module.__dict__.pop(KEY) for module in model.modules() if KEY in module.__dict__]
    for frozen in found:
        frozen.forget()
    if found:
        packed.release_maps()
    return len(found)
