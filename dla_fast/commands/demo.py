"""``python -m dla_fast demo``: a network that others wrote, before and after ``swap_``, on real photographs."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dla_fast
from dla_fast import backend
from dla_fast.bench import files
from dla_fast.commands import CommandError, UsageError, demo_memory, demo_report, demo_units, require
from dla_fast.commands.demo_setup import (
    EXTRAS,
    LOGITS,
    Task,
    in_format,
    inference,
    make_inputs,
    make_model,
    training_step,
)
from dla_fast.commands.options import check_size, whole
from dla_fast.proof import measure

MEMORY = "dla_fast.commands.demo_memory"
# The op that every swapped unit is a call of.
OP = "conv_norm_act"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``demo``."""
    parser.add_argument("--model", default="dla34", help="a DLA of timm")
    parser.add_argument("--batch", type=whole(), default=8, help="photographs in a batch")
    parser.add_argument("--size", type=whole(most=2**15), default=224, help="side of a photograph in pixels")
    parser.add_argument("--runs", type=whole(), default=11, help="rounds that each time is the median of")
    parser.add_argument("--device", help="device to run on (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--layout",
        default="auto",
        choices=["auto", "channels_last", "contiguous"],
        help="memory format; auto takes the one in which the network as it is runs faster",
    )
    parser.add_argument(
        "--channels-last",
        dest="layout",
        action="store_const",
        const="channels_last",
        default=argparse.SUPPRESS,
        help="the same as --layout channels_last",
    )
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights instead of drawing some")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the report")


def _task(args: argparse.Namespace) -> Task:
    """The options, checked before anything long begins."""
    device = args.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    # A device of another build raises what it likes.
    except Exception as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if args.size < 32:
        raise UsageError(f"--size {args.size}: expected at least 32, which is the stride of the last level")
    check_size("--size", args.size)
    if args.batch == 1 and args.size < 64:
        raise UsageError("--batch 1: training needs more than one value per channel; use a larger --batch or --size")
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise UsageError(f"--out {args.out}: expected a file ending in .png, .pdf, .svg or .jpg")
    if not args.out.resolve().parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {args.out.resolve().parent}")
    reason = files.why_not(args.out)
    if reason is not None:
        raise UsageError(f"--out {args.out}: it cannot be written: {reason}")
    return Task(args.model, args.batch, args.size, device, args.layout == "channels_last", args.pretrained)


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
    networks: dict[str, nn.Module], task: Task, x: Tensor, labels: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """What ``swap_`` changes in the results, beside what another memory format changes in PyTorch's; and all logits."""
    before, after = networks["before"], networks["after"]
    other = torch.contiguous_format if task.channels_last else torch.channels_last
    alone = in_format(copy.deepcopy(before), other)
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, swapped: tuple[float, float], own: tuple[float, float]) -> None:
        rows[name] = {"relative": swapped[0], "absolute": swapped[1], "PyTorch alone": own[0]}

    reordered = x.to(memory_format=other)
    logits = {name: inference(model, x)() for name, model in networks.items()}
    logits["PyTorch alone"] = inference(alone, reordered)()
    own = _difference(logits["PyTorch alone"], logits["before"])
    for title, name in ((LOGITS, "after"), ("logits, frozen, float32", "frozen")):
        if name in logits:
            add(title, _difference(logits[name], logits["before"]), own)
    for dtype, count in ((torch.float64, 2), (torch.float32, len(x))):
        few = x[:count].to(dtype)
        gradients = _gradients(before, few, labels[:count])
        add(
            f"gradients, training, {str(dtype).removeprefix('torch.')}",
            _worst(_gradients(after, few, labels[:count]), gradients),
            _worst(_gradients(alone, reordered[:count].to(dtype), labels[:count]), gradients),
        )
    return rows, logits


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


def _faster_layout(task: Task, model: nn.Module) -> tuple[Task, dict[str, float]]:
    """The task in the layout that is the faster for the network as it is: what its user would choose.

    Args:
        task: in any layout.
        model: the network as it is; it is not changed.

    Returns:
        The task, and by layout the milliseconds of a call in inference and a training step together.
    """
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for name, channels_last in (("NCHW", False), ("channels_last", True)):
        one = replace(task, channels_last=channels_last)
        x, labels = make_inputs(one)
        networks = [in_format(copy.deepcopy(model), one.memory_format) for _ in range(2)]
        steps[name, "inference"] = inference(networks[0], x)
        steps[name, "training"] = training_step(networks[1], x, labels)
    found = measure.interleave(steps, rounds=3, warmup=1, device=task.device)
    ms = {name: sum(t.median_ms for (of, _), t in found.items() if of == name) for name, _ in steps}
    return replace(task, channels_last=ms["channels_last"] < ms["NCHW"]), ms


def _compare(args: argparse.Namespace, task: Task, stages: _Stages) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything that is measured, and the tensors that the picture shows."""
    layouts = None
    with stages.stage("model"):
        before = make_model(task)
        if args.layout == "auto":
            task, layouts = _faster_layout(task, before)
        before = in_format(before, task.memory_format)
        x, labels = make_inputs(task)
        after = copy.deepcopy(before)
        report = dla_fast.swap_(after)
        names = [entry.name for entry in report.swapped]
        if not names:
            raise CommandError(f"swap_ found no unit in {task.model}:\n{report}")
    networks = {"before": before, "after": after}
    kept = None
    if x.device.type == "cpu":
        networks["frozen"] = copy.deepcopy(after)
        kept = dla_fast.freeze_(networks["frozen"])
    with stages.stage("differences"):
        differences, logits = _differences(networks, task, x, labels)
    result: dict[str, Any] = {
        "task": asdict(task),
        "layouts": layouts,
        "swapped": names,
        "counts": report.counts(),
        "frozen": None if kept is None else {"units": kept.units, "bytes": kept.bytes},
        "serves": {c.backend: c.reason for c in backend.explain(OP, x.device.type) if c.chosen},
        "reference": _reference(x.device.type),
        "difference": differences,
    }
    pair = {"before": before, "after": after}
    with stages.stage("bytes saved for backward"):
        result["saved for backward"] = {name: _saved(model, x, labels) for name, model in pair.items()}
    result["ms"] = _times(args.runs, networks, names, x, labels, stages)
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
    candidates = {c.backend: c for c in backend.explain(OP, device)}
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
    runs: int, networks: dict[str, nn.Module], names: list[str], x: Tensor, labels: Tensor, stages: _Stages
) -> dict[str, Any]:
    """Medians of the network and of its units by themselves, before and after in turn."""
    ms: dict[str, Any] = {}
    pair = {key: networks[key] for key in ("before", "after")}
    for title, models, make, rounds in (
        ("network, inference", networks, lambda model: inference(model, x), runs),
        ("network, training step", pair, lambda model: training_step(model, x, labels), _fewer(runs)),
    ):
        steps = {key: make(copy.deepcopy(model)) for key, model in models.items()}
        with stages.stage(title, rounds) as step_done:
            times = measure.interleave(steps, rounds=rounds, warmup=1, device=x.device, progress=step_done)
        ms[title] = {key: times[key].median_ms for key in pair}
        if "frozen" in models:
            ms[f"{title}, frozen"] = {"before": times["before"].median_ms, "after": times["frozen"].median_ms}
    for title, training, rounds in (
        ("units, inference", False, runs),
        ("units, forward and backward", True, _fewer(runs)),
    ):
        with stages.stage(title, rounds) as step_done:
            each = demo_units.times(pair, names, x, rounds, step_done, training=training)
        ms[title] = {key: sum(row[key] for row in each.values()) for key in pair}
        ms[f"each of the {title}"] = each
    return ms


def _fewer(runs: int) -> int:
    """Rounds of what takes three times as long."""
    return max(3, runs // 2)


def run(args: argparse.Namespace) -> int:
    """Compare, print, draw.

    Returns:
        0; 1 where the reference served though nobody asked for it: there was nothing to compare then.
    """
    require(EXTRAS, "demo")
    task = _task(args)
    stages = _Stages(total=3 + 2 * (args.runs + _fewer(args.runs)) + 4)
    try:
        result, tensors = _compare(args, task, stages)
    finally:
        stages.close()
    result["picture"] = str(args.out)
    picture = demo_report.draw(result, tensors, args.out.suffix[1:].lower())
    print(json.dumps(result, indent=2) if args.json else demo_report.text(result))
    try:
        files.write(args.out, picture)
    except OSError as error:
        raise CommandError(f"--out {args.out}: {error.strerror or error}; the figures are above") from error
    return 1 if demo_report.failed(result) else 0
