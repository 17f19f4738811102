"""``python -m dla_fast demo``: a network that others wrote, before and after ``swap_``, on real photographs."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dla_fast
from dla_fast import backend
from dla_fast.commands import CommandError, demo_memory, demo_report, require
from dla_fast.commands.demo_setup import (
    EXTRAS,
    LOGITS,
    Task,
    detached,
    in_format,
    inference,
    make_inputs,
    make_model,
    tensors_of,
    training_step,
)
from dla_fast.proof import measure

MEMORY = "dla_fast.commands.demo_memory"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``demo``."""
    parser.add_argument("--model", default="dla34", help="a DLA of timm")
    parser.add_argument("--batch", type=_positive, default=8, help="photographs in a batch")
    parser.add_argument("--size", type=_positive, default=224, help="side of a photograph in pixels")
    parser.add_argument("--runs", type=_positive, default=11, help="rounds that each time is the median of")
    parser.add_argument("--device", help="device to run on (default: cuda where there is one, else cpu)")
    parser.add_argument("--channels-last", action="store_true", help="run in channels_last instead of NCHW")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights instead of drawing some")
    parser.add_argument("--out", default="demo.png", help="where the picture goes")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the report")


def _task(args: argparse.Namespace) -> Task:
    """The options, checked before anything long begins."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    # A device of another build raises what it likes.
    except Exception as error:
        raise CommandError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if args.size < 32:
        raise CommandError(f"--size {args.size}: expected at least 32, which is the stride of the last level")
    if args.batch == 1 and args.size < 64:
        raise CommandError("--batch 1: training needs more than one value per channel; use a larger --batch or --size")
    if not args.out.lower().endswith((".png", ".pdf", ".svg", ".jpg")):
        raise CommandError(f"--out {args.out}: expected a file ending in .png, .pdf, .svg or .jpg")
    folder = os.path.dirname(os.path.abspath(args.out))
    if not os.access(folder, os.W_OK):
        raise CommandError(f"--out {args.out}: there is no folder {folder} that can be written to")
    return Task(args.model, args.batch, args.size, device, args.channels_last, args.pretrained)


def _difference(after: Tensor, before: Tensor) -> tuple[float, float]:
    """Largest difference, relative to the largest value and absolute."""
    absolute = (after.double() - before.double()).abs().max().item()
    return absolute / max(before.double().abs().max().item(), 1e-30), absolute


def _gradients(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients in training mode, of a copy: nothing of ``model`` changes."""
    model = copy.deepcopy(model).to(x.dtype).train()
    nn.functional.cross_entropy(model(x), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worst(after: dict[str, Tensor], before: dict[str, Tensor]) -> tuple[float, float]:
    """The difference of the gradient that differs most, relative to its own largest value."""
    return max(_difference(after[name], grad) for name, grad in before.items())


def _differences(
    before: nn.Module, after: nn.Module, task: Task, x: Tensor, labels: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """What ``swap_`` changes in the results, beside what another memory format changes in PyTorch's; and all logits."""
    other = torch.contiguous_format if task.channels_last else torch.channels_last
    alone = in_format(copy.deepcopy(before), other)
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, swapped: tuple[float, float], own: tuple[float, float]) -> None:
        rows[name] = {"relative": swapped[0], "absolute": swapped[1], "PyTorch alone": own[0]}

    reordered = x.to(memory_format=other)
    logits = {
        "before": inference(before, x)(),
        "after": inference(after, x)(),
        "PyTorch alone": inference(alone, reordered)(),
    }
    add(LOGITS, *(_difference(logits[name], logits["before"]) for name in ("after", "PyTorch alone")))
    for dtype, count in ((torch.float64, 2), (torch.float32, len(x))):
        few = x[:count].to(dtype)
        gradients = _gradients(before, few, labels[:count])
        add(
            f"gradients, training, {str(dtype).removeprefix('torch.')}",
            _worst(_gradients(after, few, labels[:count]), gradients),
            _worst(_gradients(alone, reordered[:count].to(dtype), labels[:count]), gradients),
        )
    return rows, logits


def _node_arguments(model: nn.Module, names: list[str], run: Callable[[], object]) -> dict[str, Any]:
    """What each node is really called with while ``run`` runs the network."""
    seen: dict[str, Any] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _module, args, name=name: seen.__setitem__(name, args))
        for name in names
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _node_steps(model: nn.Module, arguments: dict[str, Any], *, training: bool) -> dict[str, Callable[[], object]]:
    """One call per node on its own inputs: inference, or forward and backward."""
    modules = dict(model.named_modules())
    steps: dict[str, Callable[[], object]] = {}
    for name, args in arguments.items():
        node, own = modules[name], detached(args, requires_grad=training)
        if not training:
            steps[name] = _no_grad(node, own)
            continue
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(node)(*own))
        leaves = [*tensors_of(own), *node.parameters()]
        steps[name] = _forward_backward(node, own, leaves, dy)
    return steps


def _no_grad(node: nn.Module, args: Any) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return node(*args)

    return step


def _forward_backward(node: nn.Module, args: Any, leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(node(*args), leaves, dy)


class _Stages:
    """A progress bar over everything that takes long; silent where standard error is not a terminal."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, disable=None, leave=False, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}")

    @contextlib.contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Callable[[], object]]:
        """A stage of so many steps; its steps are counted by the caller, or at its end when there is one."""
        self._bar.set_description(name)
        yield self._bar.update
        if steps == 1:
            self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _compare(args: argparse.Namespace, task: Task, stages: _Stages) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything that is measured, and the tensors that the picture shows."""
    with stages.stage("model"):
        x, labels = make_inputs(task)
        before = make_model(task)
        after = copy.deepcopy(before)
        report = dla_fast.swap_(after)
        names = [entry.name for entry in report.swapped if entry.kind == "aggregate"]
        if not names:
            raise CommandError(f"swap_ found no aggregation node in {task.model}:\n{report}")
    with stages.stage("differences"):
        differences, logits = _differences(before, after, task, x, labels)
    result: dict[str, Any] = {
        "task": asdict(task),
        "swapped": names,
        "units": report.counts(),
        "serves": {c.backend: c.reason for c in backend.explain("aggregate", x.device.type) if c.chosen},
        "reference": _reference(x.device.type),
        "difference": differences,
    }
    pair = {"before": before, "after": after}
    with stages.stage("bytes saved for backward"):
        result["saved for backward"] = {name: _saved(model, x, labels) for name, model in pair.items()}
    result["ms"] = _times(args.runs, pair, names, x, labels, stages)
    result["peak"] = {}
    for name in pair:
        line = demo_memory.arguments(task, swapped=name == "after")
        with stages.stage("peak memory"):
            result["peak"][name] = measure.in_fresh_process(MEMORY, line)
        with stages.stage("peak memory"):
            if x.device.type == "cpu" and sys.platform == "linux":
                tight = measure.in_fresh_process(MEMORY, line, env=measure.NO_FRAGMENTATION)
                result["peak"][name]["step, unfragmented"] = tight["step"]
    return result, {"photographs": x, **{f"logits {name}": value for name, value in logits.items()}}


def _reference(device: str) -> dict[str, Any] | None:
    """Whether the reference, which has no kernel to show, was asked for, and why it serves; None where it does not."""
    candidates = {c.backend: c for c in backend.explain("aggregate", device)}
    if not candidates["reference"].chosen:
        return None
    if backend.selected() == "reference":
        return {"asked for": True, "reason": backend.asked_by()}
    # What was never meant for this device has nothing to say about why it has no kernels.
    meant = ("cpu",) if device == "cpu" else ("triton", "cuda")
    reasons = (f"{name}: {candidates[name].reason}" for name in meant if candidates[name].reason is not None)
    return {"asked for": False, "reason": "; ".join(reasons)}


def _saved(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    copied = copy.deepcopy(model).train()
    return measure.saved_bytes(
        lambda: nn.functional.cross_entropy(copied(x), labels),
        exclude=[*copied.parameters(), *copied.buffers(), x, labels],
    )


def _times(
    runs: int, pair: dict[str, nn.Module], names: list[str], x: Tensor, labels: Tensor, stages: _Stages
) -> dict[str, Any]:
    """Medians of the nodes alone and of the network, before and after in turn."""
    ms: dict[str, Any] = {}
    for title, training in (("nodes, inference", False), ("nodes, forward and backward", True)):
        models = {key: copy.deepcopy(model).train(training) for key, model in pair.items()}
        arguments = _node_arguments(models["before"], names, partial(models["before"], x))
        node_steps = {
            (key, name): step
            for key, model in models.items()
            for name, step in _node_steps(model, arguments, training=training).items()
        }
        with stages.stage(title, runs) as step_done:
            node_times = measure.interleave(node_steps, rounds=runs, device=x.device, progress=step_done)
        ms[title] = {key: sum(node_times[key, name].median_ms for name in names) for key in models}
        ms[f"each of the {title}"] = {name: {key: node_times[key, name].median_ms for key in models} for name in names}
    for title, make, rounds in (
        ("network, inference", lambda model: inference(model, x), runs),
        ("network, training step", lambda model: training_step(model, x, labels), max(3, runs // 2)),
    ):
        steps = {key: make(copy.deepcopy(model)) for key, model in pair.items()}
        with stages.stage(title, rounds) as step_done:
            times = measure.interleave(steps, rounds=rounds, warmup=1, device=x.device, progress=step_done)
        ms[title] = {key: times[key].median_ms for key in pair}
    return ms


def run(args: argparse.Namespace) -> int:
    """Compare, print, draw.

    Returns:
        0; 1 where the reference served though nobody asked for it: there was nothing to compare then.
    """
    require(EXTRAS, "demo")
    task = _task(args)
    stages = _Stages(total=2 + 1 + 3 * args.runs + max(3, args.runs // 2) + 4)
    try:
        result, tensors = _compare(args, task, stages)
    finally:
        stages.close()
    demo_report.draw(result, tensors, args.out)
    result["picture"] = args.out
    print(json.dumps(result, indent=2) if args.json else demo_report.text(result))
    return 1 if demo_report.failed(result) else 0
