"""Swapping a model's modules for fused ones, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dla_fast import backend as backends
from dla_fast.nn import AggregationNode, IDAUp
from dla_fast.swap.adapters import ADAPTERS, Adapter
from dla_fast.swap.nodes import FusedNode, fused_class, rebind, restore
from dla_fast.swap.report import SwapEntry, SwapReport

# This package's own modules, and the op each runs.
_OWN: dict[type[nn.Module], str] = {AggregationNode: "aggregate", IDAUp: "merge"}


def _plan(module: nn.Module, adapter: Adapter, backend: str, verify: bool) -> tuple[type[nn.Module], str] | str:
    """The class a module is to get, with a remark, or the reason it gets none."""
    spec = adapter.match(module, backend)
    if isinstance(spec, str):
        return spec
    device, dtype = adapter.placement(module, spec)
    if backend != "auto":
        reason = backends.can_run(backend, adapter.kind, device.type, dtype)
        if reason is not None:
            return f"backend {backend!r} cannot run it: {reason}"
    try:
        target = fused_class(adapter.node, type(module), spec)
    except Exception as error:  # a metaclass may refuse for reasons of its own
        return f"{type(module).__name__} cannot be extended: {error}"
    unserved = _unserved(adapter.kind, device, dtype)
    if not verify:
        return target, "; ".join(filter(None, ("not verified", unserved)))
    found = adapter.verify(module, spec)
    if found is not None:
        return f"verification failed: {found}"
    return target, "verified on the CPU only (meta device)" if device.type == "meta" else unserved


def _unserved(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    """A remark where a module would run on the reference without anybody having asked for that."""
    if device.type == "meta" or backends.asked_by() is not None:
        return ""
    if any(c.chosen and c.backend != "reference" for c in backends.explain(kind, device.type, dtype)):
        return ""
    return "no kernel serves it here, so it runs on the PyTorch reference; python -m dla_fast doctor says why"


def _apply(changes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
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


def swap_(
    model: nn.Module,
    *,
    backend: str = "auto",
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    on_unsupported: str = "skip",
    verify: bool = True,
    dry_run: bool = False,
) -> SwapReport:
    """Let the aggregation nodes and IDA ladders of a model run fused, in place.

    A node is recognised by its structure (children ``conv``, ``bn``, ``relu`` and a flag ``residual`` or ``shortcut``;
    inputs (N, C_i, H, W) as arguments or as one list), a ladder by its children ``proj_i``, ``up_i``, ``node_i`` (or
    ModuleLists ``projs``, ``ups``, ``nodes``); it may give (last, all), the list or nothing, and write into the list it
    was given, or not. Either is confirmed by running its forward beside the fused call on
    copies. Only the class of its instance changes, to a subclass of the class it had: children, parameters, keys, hooks
    on the node and optimizer state are the same objects as before. What is not recognised for certain stays as it is,
    with the reason in the report.

    A swapped node checks on every call that what it replaces is still there, and otherwise runs its original forward:
    after a child was exchanged or converted (SyncBatchNorm), with hooks or parametrizations on a child, with global
    module hooks, with inputs of several dtypes, in export and in tracing. Scripting unswaps the nodes, with a warning.

    Args:
        model: any module; may itself be a node.
        backend: "auto" runs a node on whichever backend is in force at the call (:func:`dla_fast.use_backend`). A name
            forces the nodes to that backend for good, also in copies and pickles, and wins over ``use_backend`` (not
            over ``DLA_FAST_DISABLE``); a node that it cannot run where its parameters are is skipped.
        filter_fn: called with the name and the module of each candidate; those it gives False for stay as they are.
        on_unsupported: "skip", or "raise": change nothing and raise when a candidate cannot be swapped.
        verify: confirm by running; False trusts the structure.
        dry_run: only report.

    Returns:
        The report. Nodes that are fused already are listed as skipped.

    Raises:
        ValueError: unknown ``backend`` or ``on_unsupported``; an unsupported candidate under "raise".
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend != "auto" and backend not in backends.BACKENDS:
        raise ValueError(f"backend: unknown backend {backend!r}, expected auto, {', '.join(backends.BACKENDS)}")
    if on_unsupported not in ("skip", "raise"):
        raise ValueError(f"on_unsupported: expected 'skip' or 'raise', got {on_unsupported!r}")

    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    report = SwapReport(dry_run=dry_run)
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    unsupported: list[SwapEntry] = []
    for module, (name, *aliases) in found.values():
        own = next((kind for kind in _OWN if isinstance(module, kind)), None)
        if own is not None:
            report.skipped.append(SwapEntry(name, _OWN[own], f"already fused: dla_fast.nn.{own.__name__}"))
            continue
        adapter = next((a for a in ADAPTERS if isinstance(module, a.node) or a.resembles(module)), None)
        if adapter is None:
            continue
        if isinstance(module, FusedNode):
            reason = f"already swapped (backend {type(module)._dla_fast_spec.backend})"
            report.skipped.append(SwapEntry(name, adapter.kind, reason))
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
        remarks = [remark] if remark else []
        if aliases:
            remarks.append(f"the same module is also {', '.join(aliases)}")
        report.swapped.append(SwapEntry(name, adapter.kind, "; ".join(remarks)))
        changes.append((module, target))

    if unsupported and on_unsupported == "raise":
        lines = [f"  {e.name or '(model)'}: {e.reason}" for e in unsupported]
        count = len(unsupported) + len(changes)
        raise ValueError(
            "\n".join([f"model: {len(unsupported)} of {count} nodes cannot be swapped, none was:", *lines])
        )
    if not dry_run:
        _apply(changes)
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
