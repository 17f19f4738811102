"""Swapping a model's modules for fused ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dla_fast import backend as backends
from dla_fast.nn import (
    AggregationNode,
    BasicBlock,
    Bottleneck,
    ConvLevel,
    IDAUp,
    Projection,
    SplitBottleneck,
)
from dla_fast.nn.memory import check_memory, mark
from dla_fast.swap.adapters import Adapter, adapter_of
from dla_fast.swap.agreed import remembering
from dla_fast.swap.nodes import FusedNode, fused_class, rebind, restore
from dla_fast.swap.report import UNITS, SwapEntry, SwapReport

# This package's own modules, and what each is.
_OWN: dict[type[nn.Module], str] = {
    AggregationNode: "nodes",
    IDAUp: "ladders",
    BasicBlock: "blocks",
    Bottleneck: "blocks",
    SplitBottleneck: "blocks",
    ConvLevel: "convs",
    Projection: "convs",
}


def _plan(module: nn.Module, adapter: Adapter, backend: str, verify: bool) -> tuple[type[FusedNode], str] | str:
    """The class a module is to get, with a remark, or the reason it gets none."""
    spec = adapter.match(module, backend)
    if isinstance(spec, str):
        return spec
    device, dtype = adapter.placement(module, spec)
    if backend != "auto" and adapter.op:
        reason = backends.can_run(backend, adapter.op, device.type, dtype)
        if reason is not None:
            return f"backend {backend!r} cannot run it: {reason}"
    try:
        target = fused_class(adapter.node, type(module), spec)
    except Exception as error:  # a metaclass may refuse for reasons of its own
        return f"{type(module).__name__} cannot be extended: {error}"
    remark = adapter.remark(module, spec)
    unserved = _unserved(adapter.op, device, dtype) if adapter.op else ""
    if not verify:
        return target, "; ".join(filter(None, (remark, "not verified", unserved)))
    found = adapter.verify(module, spec)
    if found is not None:
        return f"verification failed: {found}"
    where = "verified on the CPU only (meta device)" if device.type == "meta" else unserved
    return target, "; ".join(filter(None, (remark, where)))


def _unserved(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """A remark where a module would run on the reference without anybody having asked for that."""
    if device.type == "meta" or backends.asked_by() is not None:
        return ""
    if any(c.chosen and c.backend != "reference" for c in backends.explain(op, device.type, dtype)):
        return ""
    return "no kernel serves it here, so it runs on the PyTorch reference; python -m dla_fast doctor says why"


def _check_units(units: str | Iterable[str]) -> frozenset[str]:
    wanted = (units,) if isinstance(units, str) else tuple(units)
    for unit in wanted:
        if not isinstance(unit, str):
            raise TypeError(f"units: expected names, got {unit!r}")
        if unit not in UNITS:
            raise ValueError(f"units: unknown unit {unit!r}, expected some of {', '.join(UNITS)}")
    if not wanted:
        raise ValueError(f"units: expected one or more of {', '.join(UNITS)}, got none")
    return frozenset(wanted)


def _apply(changes: list[tuple[nn.Module, type[FusedNode]]]) -> None:
    """Rebind every class or none."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, target in changes:
            done.append((module, type(module)))
            rebind(module, target)
    except BaseException:
        for module, before in reversed(done):
            rebind(module, before)
        raise


def _with_progress(modules: list[Any]) -> Iterator[Any]:
    """The same beside a bar, on a terminal, where it takes long: large modules that are tried at length."""
    from tqdm import tqdm

    yield from tqdm(modules, desc="swap_", unit="module", delay=2, disable=None, leave=False, dynamic_ncols=True)


def _survey(
    model: nn.Module,
    report: SwapReport,
    wanted: frozenset[str],
    backend: str,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    verify: bool,
) -> tuple[list[tuple[nn.Module, type[FusedNode]]], list[SwapEntry]]:
    """Fill the report: the modules to swap with their new classes, and those that cannot be."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    changes: list[tuple[nn.Module, type[FusedNode]]] = []
    unsupported: list[SwapEntry] = []
    owned: set[int] = set()
    for module, (name, *aliases) in _with_progress(list(found.values())):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        own = next((kind for kind in _OWN if isinstance(module, kind)), None)
        if own is not None:
            if _OWN[own] in wanted:
                reason = f"already fused: dla_fast.nn.{own.__name__}"
                report.skipped.append(SwapEntry(name, UNITS[_OWN[own]], reason))
            continue
        adapter = adapter_of(module)
        if adapter is None or id(module) in owned:
            continue
        if isinstance(module, FusedNode):
            spec = type(module)._dla_fast_spec
            owned.update(map(id, adapter.owned(module, spec)))
            if adapter.unit in wanted:
                reason = f"already swapped (backend {spec.backend})"
                report.skipped.append(SwapEntry(name, adapter.kind, reason))
            continue
        if adapter.unit not in wanted:
            continue
        if filter_fn is not None and not filter_fn(name, module):
            report.skipped.append(SwapEntry(name, adapter.kind, "left out by filter_fn"))
            continue
        planned = _plan(module, adapter, backend, verify)
        if isinstance(planned, str):
            report.skipped.append(SwapEntry(name, adapter.kind, planned))
            unsupported.append(report.skipped[-1])
            continue
        target, remark = planned
        owned.update(map(id, adapter.owned(module, target._dla_fast_spec)))
        remarks = [remark] if remark else []
        if aliases:
            remarks.append(f"the same module is also {', '.join(aliases)}")
        report.swapped.append(SwapEntry(name, adapter.kind, "; ".join(remarks)))
        changes.append((module, target))
    return changes, unsupported


def swap_(
    model: nn.Module,
    *,
    units: str | Iterable[str] = tuple(UNITS),
    memory: str = "default",
    backend: str = "auto",
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    on_unsupported: str = "skip",
    verify: bool = True,
    dry_run: bool = False,
) -> SwapReport:
    """Let the convolution-norm-activation units of a model run fused, in place.

    Each kind of module is recognised by its structure:

    - *nodes*: aggregation nodes with children ``conv``, ``bn``, ``relu`` and a flag ``residual`` or ``shortcut``;
      inputs (N, C_i, H, W) as arguments or as one list. Also modules that concatenate in their own forward and let a
      convolution, norm and activation read it (:mod:`dla_fast.swap.families`), and those of
      :func:`dla_fast.register_adapter`.
    - *ladders*: iterative deep aggregation with children ``proj_i``, ``up_i``, ``node_i`` (or ModuleLists ``projs``,
      ``ups``, ``nodes``); it may give (last, all), the list or nothing, and write into the list it was given, or not.
    - *blocks*: residual blocks with children ``conv1``, ``bn1``, ``conv2``, ``bn2`` and so on; the shortcut is an
      argument, made by a child ``downsample``, or the input.
    - *convs*: an nn.Sequential in which batch norm follows a convolution, and an activation, where there is one, that,
      or norm and activation alone; and a module that is such a unit in itself, whatever its children are called.

    A child of a class of one's own counts as what it computes, which is found by running it: an identity, a
    convolution, a batch norm, frozen or with an activation of its own. All is confirmed by running the forward beside
    the fused call on copies. Only the class of an instance changes, to a subclass of the class it had: children,
    parameters, keys, hooks on the module and optimizer state are the same objects as before. What is not recognised for
    certain stays as it is, with the reason in the report; an ordinary Sequential is not listed.

    A swapped module checks on every call that what it replaces is still there, and otherwise runs its original forward:
    after a child was exchanged, with hooks or parametrizations on a child, with global module hooks, with inputs of
    several dtypes, in export and in tracing. Norms may be converted to SyncBatchNorm before or after; compiled in
    training, those run op by op. Scripting unswaps, with a warning.

    Args:
        model: any module; may itself be a node.
        units: what to swap: one or several of "nodes", "ladders", "blocks", "convs". The rest is not reported either.
        memory: "default" keeps for the backward pass of training what makes it fastest: of a map that a unit wrote
            often what it was formed of, which is kept anyway. "low" keeps less: outputs of nodes, ladders and blocks
            are formed again in the backward pass, and max poolings, which are swapped as well, keep a byte an output.
            It holds for what is swapped, now or before, until :func:`unswap_` or another ``swap_``. In both modes a
            tensor that a swapped block adds must not be written to before the backward pass, which then raises.
        backend: "auto" runs a module on whichever backend is in force at the call (:func:`dla_fast.use_backend`). A
            name forces the modules to that backend for good, also in copies and pickles, and wins over ``use_backend``
            (not over ``DLA_FAST_DISABLE``); a module that it cannot run where its parameters are is skipped.
        filter_fn: called with the name and the module of each candidate; those it gives False for stay as they are.
        on_unsupported: "skip", or "raise": change nothing and raise when a candidate cannot be swapped.
        verify: confirm by running; False trusts the structure. What a class of one's own computes, and how a ladder
            treats its list, is found by running it all the same.
        dry_run: only report.

    Returns:
        The report. Modules that are fused already are listed as skipped.

    Raises:
        ValueError: unknown ``units``, ``memory``, ``backend`` or ``on_unsupported``; an unsupported candidate under
            "raise".
        TypeError: ``model`` is not a module, ``units`` are not strings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wanted = _check_units(units)
    check_memory(memory)
    if memory == "low":
        wanted |= {"pools"}
    if backend != "auto" and backend not in backends.BACKENDS:
        raise ValueError(f"backend: unknown backend {backend!r}, expected auto, {', '.join(backends.BACKENDS)}")
    if on_unsupported not in ("skip", "raise"):
        raise ValueError(f"on_unsupported: expected 'skip' or 'raise', got {on_unsupported!r}")

    report = SwapReport(dry_run=dry_run)
    with remembering():
        changes, unsupported = _survey(model, report, wanted, backend, filter_fn, verify)
    if unsupported and on_unsupported == "raise":
        lines = [f"  {e.name or '(model)'}: {e.reason}" for e in unsupported]
        count = len(unsupported) + len(changes)
        raise ValueError(
            "\n".join([f"model: {len(unsupported)} of {count} modules cannot be swapped, none was:", *lines])
        )
    if not dry_run:
        _apply(changes)
        for module in model.modules():
            if isinstance(module, FusedNode):
                mark(module._dla_fast_keepers(), memory)
    return report


def unswap_(model: nn.Module) -> int:
    """Give every swapped module of a model its own class back; the model is exactly as it was before.

    Args:
        model: any module.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped = [module for module in model.modules() if isinstance(module, FusedNode)]
    for module in swapped:
        restore(module)
    return len(swapped)
