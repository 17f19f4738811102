"""What the demo prints and draws."""

from __future__ import annotations

import io
import math
import textwrap
from typing import Any

import torch
from torch import Tensor

from dla_fast._version import __version__
from dla_fast.commands.demo_setup import LOGITS, PHOTOGRAPHS, unnormalised
from dla_fast.proof.machine import instruction_set

_SHOWN = 7  # units in the picture
_BEFORE, _AFTER, _WRONG = "#8a94a6", "#1f77b4", "#c0392b"


def speedup(row: dict[str, float]) -> float:
    """Before to after."""
    return row["before"] / row["after"]


def failed(result: dict[str, Any]) -> bool:
    """Whether the units ran on the reference though nobody asked for it: the demo then shows no kernel."""
    return result["reference"] is not None and not result["reference"]["asked for"]


def notice(result: dict[str, Any]) -> str | None:
    """What has to be said first where the reference served, with the reason; None where kernels did."""
    served = result["reference"]
    if served is None:
        return None
    if served["asked for"]:
        return f"on the PyTorch reference, as {served['reason']} asks: no kernel of dla_fast ran"
    return f"FAILED: on the PyTorch reference, though nobody asked for it: {served['reason']}"


def last_line(result: dict[str, Any]) -> str:
    """The demo in one parsable line; where the reference served, that stands at its end."""
    ms, saved = result["ms"], result["saved for backward"]
    served = ""
    if result["reference"] is not None:
        served = "; FAILED: on the reference, unasked" if failed(result) else "; on the reference, as asked"
    frozen = ms.get("network, inference, frozen")
    return (
        f"demo: swapped {len(result['swapped'])} units, "
        f"max logit difference {result['difference'][LOGITS]['relative']:.1e}, "
        f"network {speedup(ms['network, inference']):.2f}x"
        f"{f' (frozen {speedup(frozen):.2f}x)' if frozen else ''}, "
        f"training step {speedup(ms['network, training step']):.2f}x, "
        f"saved for backward {saved['after'] / saved['before']:.2f}x{served}"
    )


def heading(result: dict[str, Any]) -> str:
    """The task in one line."""
    task = result["task"]
    weights = "timm's weights" if task["pretrained"] else "random weights"
    layout = "channels_last" if task["channels_last"] else "NCHW"
    shape = f"{task['batch']} crops of photographs, {task['size']}x{task['size']}"
    return f"timm {task['model']}, {weights}, {shape}, float32 {layout}"


def choice(result: dict[str, Any]) -> str | None:
    """Why it ran in its layout, in one line; None where that was asked for."""
    ms = result["layouts"]
    if ms is None:
        return None
    faster, slower = sorted(ms, key=lambda name: float(ms[name]))
    return (
        f"{faster}, since the network as it is runs faster so: {ms[faster]:.0f} ms a call and a training step, "
        f"{ms[slower]:.0f} ms in {slower}"
    )


def machine(result: dict[str, Any]) -> str:
    """Where it ran, in one line."""
    device = torch.device(result["task"]["device"])
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        where = f"{threads} CPU thread{'s' if threads > 1 else ''} with {instruction_set()}"
    return f"dla_fast {__version__}, torch {torch.__version__}, {where}; units run on: {', '.join(result['serves'])}"


def _difference_rows(result: dict[str, Any]) -> list[str]:
    lines = [f"{'largest difference':<36}{'relative':>12}{'absolute':>12}{'PyTorch alone*':>17}"]
    for what, row in result["difference"].items():
        lines.append(f"  {what:<34}{row['relative']:>12.1e}{row['absolute']:>12.1e}{row['PyTorch alone']:>17.1e}")
    return lines


_FOOTNOTE = (
    "  * unswapped, NCHW against channels_last. In float32 training a ReLU or pooling whose inputs lie within rounding",
    "    of zero or of each other sends its gradient elsewhere, so float64 is the one to read.",
)
_TIMES = (
    "network, inference",
    "network, inference, frozen",
    "network, training step",
    "units, inference",
    "units, forward and backward",
)


def text(result: dict[str, Any]) -> str:
    """The report, the network first; its last line is :func:`last_line`."""
    lines = [line for line in (notice(result), heading(result), choice(result), machine(result)) if line]
    lines += ["", f"{'milliseconds':<36}{'before':>12}{'after':>12}   before/after"]
    for name, row in time_rows(result).items():
        lines.append(f"  {name:<34}{row['before']:>12.2f}{row['after']:>12.2f}{speedup(row):>14.2f}x")
    lines += ["", f"{'MiB':<36}{'before':>12}{'after':>12}   after/before"]
    for name, row in memory_rows(result).items():
        ratio = row["after"] / row["before"]
        lines.append(f"  {name:<34}{row['before'] / 2**20:>12.1f}{row['after'] / 2**20:>12.1f}{ratio:>14.2f}x")
    lines += ["", *_difference_rows(result), *_FOOTNOTE, ""]
    counts = ", ".join(f"{count} {unit}" for unit, count in result["counts"].items() if count)
    swapped = f"swapped {len(result['swapped'])} units ({counts}): {', '.join(result['swapped'])}"
    lines += textwrap.wrap(swapped, 118, subsequent_indent="  ")
    if result["frozen"]:
        kept = result["frozen"]
        size = kept["bytes"] / 2**20
        lines.append(f"frozen: {kept['units']} convolutions, {size:.1f} MiB of folded norms and packed weights kept")
    lines += losses(result)
    return "\n".join([*lines, "", f"wrote {result['picture']}", last_line(result)])


def time_rows(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds before and after, of what there is."""
    return {name: result["ms"][name] for name in _TIMES if name in result["ms"]}


def losses(result: dict[str, Any]) -> list[str]:
    """A line for each way of running the units by themselves: which take longer than before."""
    lines = []
    for title in ("units, inference", "units, forward and backward"):
        ratios = {name: speedup(row) for name, row in result["ms"][f"each of the {title}"].items()}
        behind = sorted((name for name in ratios if ratios[name] < 1), key=lambda name: ratios[name])
        told = ", ".join(f"{name} {ratios[name]:.2f}x" for name in behind) or "none"
        line = f"slower than before by themselves, {title.removeprefix('units, ')}: {told}"
        lines += textwrap.wrap(line, 118, subsequent_indent="  ")
    return lines


def memory_rows(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes before and after, by what was counted."""
    kind = "peak GPU memory" if torch.device(result["task"]["device"]).type == "cuda" else "peak RSS"
    peak = result["peak"]
    rows = {
        "saved for backward": result["saved for backward"],
        f"{kind}, training process": {key: peak[key]["peak"] for key in peak},
        f"{kind}, added by the step": {key: peak[key]["step"] for key in peak},
    }
    unfragmented = "step, unfragmented"
    if all(unfragmented in row for row in peak.values()):
        rows[f"{kind}, added, unfragmented"] = {key: peak[key][unfragmented] for key in peak}
    return rows


def _bars(axes: Any, rows: dict[str, dict[str, float]], title: str, unit: str, ratio: str) -> None:
    """Horizontal bars, before above after, with the ratio at the end; each row on a scale of its own."""
    labels = []
    for i, (name, row) in enumerate(rows.items()):
        y, top = -float(i), max(row.values())
        for offset, key, color in ((0.19, "before", _BEFORE), (-0.19, "after", _AFTER)):
            share = row[key] / top
            axes.barh(y + offset, share, height=0.34, color=color, label=key if i == 0 else None)
            inside = share > 0.25
            axes.text(
                share - 0.015 if inside else share + 0.015,
                y + offset,
                f"{row[key]:.{0 if row[key] >= 100 else 2}f} {unit}",
                ha="right" if inside else "left",
                va="center",
                fontsize=8,
                color="white" if inside else "black",
            )
        value = row["before"] / row["after"] if ratio == "before/after" else row["after"] / row["before"]
        axes.text(1.03, y, f"{value:.2f}x", va="center", fontsize=10, fontweight="bold")
        labels.append(name)
    axes.set_yticks([-float(i) for i in range(len(labels))], labels, fontsize=9)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.set_title(f"{title} ({ratio})", fontsize=11, loc="left")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def draw(result: dict[str, Any], tensors: dict[str, Tensor], kind: str) -> bytes:
    """The comparison as a picture: the photographs, what changed in the logits, times and memory.

    Args:
        result: what was measured.
        tensors: the photographs and logits.
        kind: of file: png, pdf, svg or jpg.

    Returns:
        The file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A figure of its own, without pyplot, touches no global state and needs no display.
    figure = Figure(figsize=(13, 11), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    first = notice(result)
    title = f"{heading(result)}: before and after dla_fast.swap_\n{machine(result)}"
    chosen = choice(result)
    if chosen:
        title = f"{title}\n{chosen}"
    if first:
        title = "\n".join([*textwrap.wrap(first, 110), title])
    figure.suptitle(title, fontsize=12, color=_WRONG if failed(result) else "black")
    rows: Any = figure.subfigures(3, 1, height_ratios=[1.5, 3.2, 3.2])
    top, middle, bottom = rows
    _strip(top, tensors["photographs"])
    times, memory = middle.subplots(1, 2)
    _bars(times, time_rows(result), "Time", "ms", "before/after")
    times.legend(loc="lower right", fontsize=9, ncols=2, bbox_to_anchor=(1.0, -0.13), frameon=False)
    bytes_ = {
        name.replace(", ", ",\n"): {k: v / 2**20 for k, v in row.items()} for name, row in memory_rows(result).items()
    }
    _bars(memory, bytes_, "Memory", "MiB", "after/before")
    swapped, alone, each = bottom.subplots(1, 3, width_ratios=[1, 1, 1.9])
    _logits(swapped, alone, result, tensors)
    units = result["ms"]["each of the units, inference"]
    longest = sorted(units, key=lambda name: -units[name]["before"])[:_SHOWN]
    title = "Each unit, inference" if len(units) <= _SHOWN else f"The {_SHOWN} units that took longest, inference"
    _bars(each, {name: units[name] for name in longest}, title, "ms", "before/after")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=kind)
    return picture.getvalue()


def _strip(figure: Any, batch: Tensor) -> None:
    """The images of the batch, each named after the photograph that it is a crop of."""
    photos = unnormalised(batch[:8])
    shown = "The batch" if len(photos) == len(batch) else f"The first {len(photos)} of a batch of {len(batch)}"
    figure.suptitle(
        f"{shown}: crops of scikit-learn's two sample photographs, {' and '.join(PHOTOGRAPHS)}", fontsize=11
    )
    for i, axes in enumerate(figure.subplots(1, max(4, len(photos)), squeeze=False)[0]):
        axes.axis("off")
        if i < len(photos):
            axes.imshow(photos[i].permute(1, 2, 0).numpy())
            axes.set_title(PHOTOGRAPHS[i % len(PHOTOGRAPHS)], fontsize=9, y=-0.16)


def _logits(swapped: Any, alone: Any, result: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What swapping changes in each logit, beside what PyTorch's own memory formats change, on one scale."""
    before = tensors["logits before"].double().cpu().flatten()
    largest = max(before.abs().max().item(), 1e-30)
    row = result["difference"][LOGITS]
    layouts = ["NCHW", "channels_last"]
    if result["task"]["channels_last"]:
        layouts.reverse()
    panels = (
        (swapped, "after", "Logits: before to after swap_", row["relative"], _AFTER),
        (alone, "PyTorch alone", f"PyTorch alone, {'/'.join(layouts)}", row["PyTorch alone"], _BEFORE),
    )
    exponent = math.floor(math.log10(max(row["relative"], row["PyTorch alone"], 1e-16)))
    limit = 1.25 * max(row["relative"], row["PyTorch alone"], 1e-16) / 10**exponent
    for axes, name, title, worst, color in panels:
        changed = (tensors[f"logits {name}"].double().cpu().flatten() - before) / largest / 10**exponent
        axes.axhline(0, color="#d8dde5", linewidth=1, zorder=1)
        axes.scatter(before.numpy(), changed.numpy(), s=4, color=color, linewidths=0, alpha=0.6)
        axes.set_ylim(-limit, limit)
        axes.set_xlabel("logit", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.set_title(f"{title}\nlargest difference {worst:.1e}", fontsize=10, loc="left")
    swapped.set_ylabel(f"change, in 1e{exponent} of the largest logit", fontsize=9)
    alone.tick_params(labelleft=False)
