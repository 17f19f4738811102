"""The pictures of the report: ratio bars, roofline plots, memory bars and scaling lines, each as an SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from dla_fast.bench import peers, table
from dla_fast.bench.records import Comparison, Record

COLORS = {
    peers.FUSED: "#1f6fb4",
    "eager": "#8a94a6",
    "eager_other_layout": "#c3c9d4",
    "compile": "#d98c2b",
    "compile_max_autotune": "#a86414",
    "compile_frozen": "#ecc48e",
    "reference": "#5d6675",
    "library": "#6aa84f",
    "onnxruntime": "#b8569b",
    "openvino": "#3fa7a3",
    peers.SWAPPED: "#5b9bd1",
    peers.FROZEN: "#0b3d66",
}
BEHIND = "#c0392b"
MARKERS = {
    "aggregate": "o",
    "merge": "s",
    "conv_norm_act": "h",
    "upsample": "^",
    "upsample_add": "v",
    "batch_norm_act": "D",
    "model": "P",
}
# A thin line with an end, to stand beside a bar.
_FLOOR: dict[str, Any] = {"color": "black", "linewidth": 0.9, "marker": "|", "markersize": 5}


def color(impl: str) -> str:
    """The color of an implementation; dla_fast's other backends are purple."""
    return COLORS.get(impl, "#7d4fa3")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot, touches no global state and needs no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bytes(figure: Any) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    # The same picture for the same run: no date, and ids that do not change.
    with rc_context({"svg.hashsalt": "dla_fast"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


def ratio_bars(found: Sequence[Comparison], title: str) -> bytes:
    """The speedup of each case, worst on top, and under each bar how far the machine's floor would be."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullLocator

    figure = _figure(10, 1.6 + 0.29 * len(found))
    axes = figure.subplots()
    ends = []
    for i, c in enumerate(found):
        ahead = c.speedup >= 1
        axes.barh(-i + 0.12, c.speedup - 1, left=1, height=0.5, color=COLORS[peers.FUSED] if ahead else BEHIND)
        share = c.share_of_floor
        limit = c.speedup / share if share else None
        # A call of nothing has no floor worth drawing.
        if limit is not None and limit < 100:
            # Beneath the bar, which it would hide where a case beats the floor of the memory from the cache.
            axes.plot([1, limit], [-i - 0.25, -i - 0.25], **_FLOOR, markevery=[1])
            ends.append(limit)
        ends.append(c.speedup)
        # In the margin at the right, where neither bar nor mark can be under it.
        text = f"{c.speedup:.2f}x against {c.best['impl']}"
        axes.annotate(
            text,
            (1.0, -i),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color="black" if ahead else BEHIND,
        )
    several = len({c.mine["op"] for c in found}) > 1
    labels = [f"{c.mine['op'] + '  ' if several else ''}{c.mine['case']}, batch {c.mine['batch']}" for c in found]
    axes.set_yticks([-i for i in range(len(found))], labels, fontsize=9)
    axes.set_ylim(-len(found) + 0.4, 0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    low, high = min([*ends, 0.9]), max([*ends, 1.2])
    axes.set_xscale("log")
    axes.set_xlim(low / 1.05, high * 1.05)
    ladder: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    if high / low > 12:
        ladder = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    elif high / low < 2.5:
        ladder = tuple(i / 10 for i in range(3, 26))
    ticks = [t for t in ladder if low / 1.05 <= t <= high * 1.05]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("time of the best peer over dla_fast's", fontsize=9)
    axes.set_title(title, fontsize=11, loc="left")
    _plain(axes)
    entries: list[tuple[Any, str]] = []
    if any(c.speedup >= 1 for c in found):
        entries.append((Patch(color=COLORS[peers.FUSED]), "ahead"))
    if any(c.speedup < 1 for c in found):
        entries.append((Patch(color=BEHIND), "behind"))
    entries.append((Line2D([], [], **_FLOOR, markevery=[0]), "up to the machine's floor"))
    handles, names = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return _bytes(figure)


def roofline(found: Sequence[Comparison], rates: dict[str, float], title: str) -> bytes:
    """Flops done per second over flops per byte that has to be moved, under what the machine can do."""
    figure = _figure(10, 5.2)
    axes = figure.subplots()
    points = [c for c in found if c.mine.get("bytes") and c.mine.get("flops")]
    seen: set[tuple[str, str]] = set()
    xs, ys = [], []
    for c in points:
        x = c.mine["flops"] / c.mine["bytes"]
        for record, face in ((c.best, "none"), (c.mine, COLORS[peers.FUSED])):
            y = c.mine["flops"] / record["median_ms"] / 1e6
            key = (c.mine["op"], "dla_fast" if record is c.mine else "best peer")
            axes.scatter(
                x,
                y,
                s=30,
                marker=MARKERS.get(c.mine["op"], "o"),
                facecolors=face,
                edgecolors=COLORS[peers.FUSED] if record is c.mine else "#5d6675",
                linewidths=1.1,
                label=None if key in seen else ", ".join(key),
                zorder=3 if record is c.mine else 2,
            )
            seen.add(key)
            xs.append(x)
            ys.append(y)
    peak, bandwidth = rates["flops_per_s"] / 1e9, rates["bytes_per_s"] / 1e9
    ridge = peak / bandwidth
    left, right = min([*xs, ridge]) / 1.5, max([*xs, ridge]) * 2
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="black", linewidth=1.2, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min([*ys, left * bandwidth]) / 1.5, peak * 2)
    axes.set_xlabel("flops per byte that has to be moved", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)
    # In the title, since anywhere inside a point may lie on it.
    axes.set_title(f"{title}: the roof is {bandwidth:.1f} GB/s and {peak:.0f} GFLOP/s", fontsize=11, loc="left")
    axes.grid(True, which="major", color="#e4e7ec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _plain(axes)
    return _bytes(figure)


def memory_bars(pairs: Sequence[tuple[Record, Record]]) -> bytes:
    """Peak of a training step and bytes saved for its backward, eager above dla_fast."""
    figure = _figure(10, 1.4 + 0.62 * len(pairs))
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("peak_bytes", "Peak of a training step, MiB"), ("saved_bytes", "Saved for the backward pass, MiB")),
        strict=True,
    ):
        top = max(max(a[name], b[name]) for a, b in pairs) / 2**20
        for i, (mine, theirs) in enumerate(pairs):
            for record, offset in ((theirs, 0.2), (mine, -0.2)):
                value = record[name] / 2**20
                impl = record["impl"]
                axes.barh(-i + offset, value, height=0.36, color=color(impl), label=None if i else impl)
                text = f"{value:.{0 if value >= 100 else 1}f}"
                if record is mine:
                    text += f"  ({mine[name] / theirs[name]:.2f}x)"
                axes.annotate(text, (value, -i + offset), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=9)  # fmt: skip
        axes.set_xlim(0, 1.35 * top)
        axes.set_title(title, fontsize=11, loc="left")
        labels = [f"{mine['case']}, {mine['batch']} x {mine['side']}²" for mine, _ in pairs]
        axes.set_yticks([-i for i in range(len(pairs))], labels, fontsize=9)
        axes.set_ylim(-len(pairs) + 0.45, 0.55)
        _plain(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return _bytes(figure)


def scaling_lines(records: Sequence[Record], mode: str) -> bytes:
    """Time over batch, resolution, inputs, channels and threads, with the floor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes_of: dict[str, list[Record]] = {}
    for record in records:
        axes_of.setdefault(record["axis"], []).append(record)
    columns = min(3, len(axes_of))
    rows = -(-len(axes_of) // columns)
    figure = _figure(10, 0.5 + 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (axis, alike) in zip(grid, axes_of.items(), strict=False):
        impls = list(dict.fromkeys(record["impl"] for record in alike))
        for impl in impls:
            line = sorted((r["value"], r["median_ms"]) for r in alike if r["impl"] == impl)
            axes.plot(
                *zip(*line, strict=True), marker="o", markersize=3.5, linewidth=1.4, color=color(impl), label=impl
            )
        floor = sorted({(r["value"], r["floor_ms"]) for r in alike if r["impl"] == peers.FUSED})
        axes.plot(*zip(*floor, strict=True), color="black", linewidth=1, linestyle="--", label="floor", zorder=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        values = sorted({r["value"] for r in alike})
        axes.set_xticks(values, [str(v) for v in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(axis, fontsize=9)
        axes.set_ylabel("ms", fontsize=9)
        axes.grid(True, which="major", color="#e4e7ec", linewidth=0.7)
        _plain(axes)
    for axes in grid[len(axes_of) :]:
        axes.axis("off")
    figure.suptitle(f"A node of 64+64 channels at 28x28, {mode}", fontsize=11, x=0.01, ha="left")
    legend: dict[str, Any] = {}
    for axes in grid:
        handles, names = axes.get_legend_handles_labels()
        legend |= dict(zip(names, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return _bytes(figure)


def time_bars(found: Sequence[Comparison], title: str, what: str = "median_ms") -> bytes:
    """The time of every implementation of a few cases, each case on a scale of its own."""
    impls = list(dict.fromkeys(impl for c in found for impl in c.by_impl))
    step = 0.24
    figure = _figure(10, 1.1 + len(found) * (step * len(impls) + 0.18))
    axes = figure.subplots()
    y, ticks, named = 0.0, [], set()
    for c in found:
        top = max(record[what] for record in c.by_impl.values())
        middle = y - step * (len(c.by_impl) - 1) / 2
        ticks.append((middle, f"{c.mine['case']}\n{c.mine['shape']}, batch {c.mine['batch']}"))
        for impl, record in c.by_impl.items():
            share = record[what] / top
            axes.barh(y, share, height=0.2, color=color(impl), label=None if impl in named else impl)
            named.add(impl)
            axes.annotate(f"{table.milliseconds(record[what])} ms", (share, y), xytext=(4, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
            y -= step
        y -= 0.18
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=9)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(y + step * 0.6, step * 0.8)
    axes.set_xticks([])
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines["bottom"].set_visible(False)
    _plain(axes)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return _bytes(figure)
