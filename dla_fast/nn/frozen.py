"""What :func:`dla_fast.freeze_` keeps of a unit between calls: its norm folded, its weight packed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast import arguments, backend
from dla_fast.checks import Upsampling
from dla_fast.nn import facts
from dla_fast.nn.batch_norm import is_frozen, is_plain
from dla_fast.nn.conv import is_plain_conv
from dla_fast.ops import packed
from dla_fast.ops.layout import accumulation_dtype
from dla_fast.reference.activation import ActSpec
from dla_fast.reference.norm import Norm

# Where a frozen unit's state lies in its convolution's __dict__: no parameter, buffer or module, so in no state dict.
KEY = "_dla_fast_frozen"

# How many norms behind one convolution, and how many kinds of calls of a unit, are remembered.
NORMS, CALLS = 4, 256

_PLAIN = (Tensor, nn.Parameter)


def recalls() -> bool:
    """Whether a call may be answered by :meth:`Frozen.recall`: the extension sees what else could be about."""
    return (
        not torch.compiler.is_compiling()
        and backend.selected() in ("auto", "cpu")
        and torch.autograd.forward_ad._current_level < 0
    )


class FrozenModel:
    """What the units of one model share: whether it has been said that a call needs gradients."""

    warned = False

    def __init__(self) -> None:
        # Nobody could ask for that memory any more once the model is gone.
        weakref.finalize(self, packed.release_maps).atexit = False

    def warn(self) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            "a model that dla_fast.freeze_ has frozen is called with gradients enabled, so it runs as before it was "
            "frozen; call it under torch.inference_mode() or torch.no_grad(), or dla_fast.unfreeze_ it",
            stacklevel=5,
        )


class _Folded:
    """A norm folded behind a weight, as they were when ``mark`` was taken of them.

    ``scale`` and ``shift`` are kept in the accumulation dtype. ``kept`` holds the memory that the mark is of, so that
    nothing else can come to lie there and be taken for it.
    """

    def __init__(self, mark: int, weight: Tensor, conv_bias: Tensor | None, norm: Norm) -> None:
        self.mark, self.eps = mark, norm.eps
        self.kept = [t.detach() for t in (weight, conv_bias, *norm[:4]) if isinstance(t, Tensor)]
        self.weights: dict[tuple[int, ...], Tensor] = {}
        self.calls: dict[tuple[Any, ...], Any] = {}
        gamma, beta, mean, var = norm[:4]
        assert mean is not None
        assert var is not None
        dtype = accumulation_dtype(weight.dtype)
        # The standard deviation in float64 and the rest in the accumulation dtype, as the kernels fold.
        rstd = (var.double() + norm.eps).rsqrt().to(dtype)
        self.scale = rstd if gamma is None else gamma.to(dtype) * rstd
        center = mean.to(dtype) if conv_bias is None else mean.to(dtype) - conv_bias.to(dtype)
        self.shift = -center * self.scale if beta is None else beta.to(dtype) - center * self.scale

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.scale, self.shift, *self.weights.values()))


class _Unit:
    """A convolution and a norm as they were before a call was checked, and what served such calls, by their kind."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        self.facts = tuple(facts.of_unit(conv, bn))
        # Whether it is what the caller has seen, who looked before; and of lists nobody sees whether they change.
        options = conv.kernel_size, conv.stride, conv.dilation, conv.padding
        self.steady = is_plain_conv(conv) and is_plain(bn) and all(type(option) is tuple for option in options)
        self.tensors = _tensors(conv, bn)
        self.calls: dict[int, Any] = {}

    def at(self, conv: int, bn: int) -> tuple[Any, ...]:
        """As ``recall`` takes it, of modules of those numbers."""
        return conv, bn, self.facts, self.tensors, self.calls


def _tensors(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    """What a unit reads: weight, bias, the norm's four.

    Raises:
        KeyError: one of them is no parameter and no buffer: DataParallel's replicas, weights that hooks compute.
    """
    parameters, running = conv._parameters, bn._buffers
    affine = running if is_frozen(bn) else bn._parameters
    return (
        parameters["weight"], parameters["bias"], affine["weight"], affine["bias"],
        running["running_mean"], running["running_var"],
    )  # fmt: skip


class Frozen:
    """The frozen state of a convolution and the norm behind it, filled by the first call.

    Every call compares a fingerprint of the convolution's and the norm's tensors with the one that was taken when they
    were folded, and folds and packs again where they differ. Copies and pickles start empty.
    """

    def __init__(self, model: FrozenModel) -> None:
        self.model = model
        self._folded: dict[int, _Folded] = {}
        self._units: dict[tuple[int, ActSpec], _Unit] = {}
        # What swapped modules that run this unit have found of themselves, by their id; see dla_fast/swap/found.py.
        self.found: dict[int, Any] = {}
        self._making = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (self.model,)

    @property
    def nbytes(self) -> int:
        """Bytes of the folded norms and packed weights that are kept now."""
        return sum(folded.nbytes for folded in list(self._folded.values()))

    def forget(self) -> None:
        """Free what is kept, until a call fills it again."""
        self._folded = {}
        self._forget_calls()
        self.found = {}

    def _forget_calls(self) -> None:
        # Modules may have kept the units.
        for unit in self._units.values():
            unit.calls.clear()
        self._units = {}

    def recall(
        self, xs: Sequence[Tensor], conv: nn.Module, bn: nn.Module, act: ActSpec, residual: int | Tensor | None
    ) -> Tensor | None:
        """:meth:`run` for a call like one that it has served before; None where there was none."""
        unit = self._units.get((id(bn), act))
        if unit is None or type(xs) not in (list, tuple) or not recalls():
            return None
        return packed.recall((conv, bn), (), (unit.at(0, 1),), xs, residual)

    def known(self, conv: nn.Module, bn: nn.Module, act: ActSpec) -> _Unit | None:
        """What can be recalled of a unit."""
        unit = self._units.get((id(bn), act))
        return unit if unit is not None and packed.unchanged((conv, bn), unit.facts) else None

    def run(
        self,
        xs: Sequence[Tensor],
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        act: ActSpec,
        residual: int | Tensor | None,
        upsample: Upsampling | None,
    ) -> Tensor | None:
        """The unit's output; None where the call is not one of inference on the CPU's kernels, in the weight's dtype.

        Raises:
            ValueError: as :func:`dla_fast.functional.conv_norm_act`.
            TypeError: as :func:`dla_fast.functional.conv_norm_act`.
        """
        # Modes that watch operators count and trace those of the usual way.
        if backend.needs_reference() or torch._C._len_torch_dispatch_stack():
            return None
        try:
            # Ladders' units are not recalled, nor those whose norm is four buffers.
            unit = _Unit(conv, bn) if upsample is None and not is_frozen(bn) else None
            tensors = _tensors(conv, bn) if unit is None else unit.tensors
        except KeyError:
            return None
        weight = tensors[0]
        # What is asked from here on is among the facts, which were taken before.
        if bn.training:
            # Training changes what is kept.
            self.forget()
            return None
        if weight is None or tensors[4] is None or tensors[5] is None:
            return None

        stride, dilation, groups = conv.stride[0], conv.dilation[0], conv.groups
        added = residual if isinstance(residual, Tensor) else None
        key: list[Any] = [act, stride, dilation, groups, len(xs), residual if added is None else "tensor"]
        maps, up_weights = [*xs], []
        if upsample is not None:
            for up in upsample:
                key.append(up and up[1])
                if up is not None:
                    up_weights.append(up[0])
            maps += up_weights
        if added is not None:
            maps.append(added)
        dtype = weight.dtype
        for x in maps:
            if not x.is_cpu:
                self.forget()
                return None
            if type(x) not in _PLAIN or x.dtype is not dtype or x.is_neg() or x._is_zerotensor():
                return None
            key += x.shape, x.stride()
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*maps, *tensors)):
            self.model.warn()
            return None
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not dtype:
            return None
        if backend.resolve("conv_norm_act", "cpu", dtype) != "cpu":
            return None

        mark = packed.fingerprint(tensors)
        folded = self._folded.get(id(bn))
        if folded is None or folded.mark != mark or folded.eps != bn.eps:
            folded = self._fold(tensors, bn)
            if folded is None:
                return None
        kind = tuple(key)
        call = folded.calls.get(kind)
        if call is None:
            call = folded.calls[kind] = self._serve(folded, xs, conv, tensors, residual, upsample, act)
        y = packed.run(call, xs, up_weights, added)
        if unit is not None and unit.steady:
            self._remember(unit, packed.kind_of_call(mark, tensors, xs, residual), (id(bn), act), call)
        return y

    def _remember(self, unit: _Unit, kind: int, name: tuple[int, ActSpec], call: Any) -> None:
        """Keep a call for :meth:`recall`."""
        if kind == 0:
            return
        with self._making:
            known = self._units.get(name)
            if known is None or not all(a is b for a, b in zip(known.facts, unit.facts, strict=True)):
                self._units = {**(self._units if len(self._units) < NORMS else {}), name: unit}
                known = unit
            if len(known.calls) >= CALLS:
                known.calls.clear()
            known.calls[kind] = call

    def _fold(self, tensors: tuple[Any, ...], bn: nn.BatchNorm2d) -> _Folded | None:
        """The norm folded as it is now; None where no fingerprint can be taken of it, or of the weight."""
        with self._making, torch.inference_mode(False), torch.no_grad():
            # Before what it is of is read: what changes meanwhile is then found by the next call.
            mark = packed.fingerprint(tensors)
            if mark == 0:
                return None
            known = self._folded.get(id(bn))
            if known is not None and known.mark == mark and known.eps == bn.eps:
                return known  # another thread's
            weight, conv_bias, gamma, beta, mean, var = tensors
            folded = _Folded(mark, weight, conv_bias, Norm(gamma, beta, mean, var, False, eps=bn.eps))
            # What served calls of the norm before holds memory, and will serve no other.
            self._forget_calls()
            others = self._folded if len(self._folded) < NORMS else {}
            self._folded = {**others, id(bn): folded}
            return folded

    def _serve(
        self,
        folded: _Folded,
        xs: Sequence[Tensor],
        conv: nn.Conv2d,
        tensors: tuple[Any, ...],
        residual: int | Tensor | None,
        upsample: Upsampling | None,
        act: ActSpec,
    ) -> Any:
        """Check a call as every unfrozen one is checked, and pack the weight for the product that serves it."""
        weight, conv_bias, gamma, beta, mean, var = tensors
        geometry = conv.stride[0], conv.dilation[0], conv.groups
        norm = Norm(gamma, beta, mean, var, False, eps=folded.eps)
        call = arguments.checked("conv_norm_act", xs, weight, norm, None, conv_bias, *geometry, residual, upsample, act)
        foldable = packed.folds(call.act) and (residual is None or isinstance(residual, Tensor))
        way = packed.way_of(xs, call.up_weights, weight, call.factors, *geometry, foldable)
        folds = way == packed.FOLDED
        product = (way, *(x.shape[1] for x in xs))
        with self._making, torch.inference_mode(False), torch.no_grad():
            kept = folded.weights.get(product)
            if kept is None:
                made = (
                    packed.fold(xs[0], weight, folded.scale, *geometry)
                    if folds
                    else packed.pack(weight, product[1:], way)
                )
                kept = folded.weights[product] = made
            if len(folded.calls) >= CALLS:
                folded.calls.clear()
        added_input = residual if call.added is not None and isinstance(residual, int) else -1
        return packed.Call(
            weight.detach(), kept, way, folded.scale, folded.shift, call.factors, *geometry, call.residual_input,
            added_input, call.act, call.slope,
        )  # fmt: skip
