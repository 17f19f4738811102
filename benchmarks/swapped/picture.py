"""The picture of ``python -m benchmarks.swapped``: bars of every implementation, for each network and mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dla_fast.bench import peers, pictures, table
from dla_fast.bench.records import Record, is_timed

BOTH = f"{peers.FUSED}+compile"
NAMES = {
    "eager": "as it is",
    "compile": "torch.compile",
    peers.FUSED: "swapped",
    BOTH: "swapped, torch.compile",
}
COLORS = {**{impl: pictures.color(impl) for impl in NAMES}, BOTH: "#7fb2e0"}
TITLES = {"inference": "Inference", "training": "Training step"}
# Points to an inch, and pixels to a point where a browser shows the picture at its own size.
WIDTH_IN, FONT = 800 * 0.75 / 72, 8.5


def cases(found: Iterable[Record]) -> list[dict[str, Record]]:
    """The timed records of each case by implementation, in the order of :data:`NAMES`."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in found:
        if record["suite"] == "swapped" and is_timed(record):
            key = tuple(record[name] for name in ("case", "mode", "batch", "layout"))
            groups.setdefault(key, {})[record["impl"]] = record
    return [{impl: by[impl] for impl in NAMES if impl in by} for by in groups.values()]


def draw(run: dict[str, Any]) -> bytes:
    """A run as an SVG 800 pixels wide: time as a share of the network's as it is, the milliseconds beside.

    Args:
        run: as in the JSON file, with a timed case at least.
    """
    found = cases(run["records"])
    modes = [mode for mode in TITLES if any(next(iter(c.values()))["mode"] == mode for c in found)]
    rows = {mode: [c for c in found if next(iter(c.values()))["mode"] == mode] for mode in modes}
    bars = max(sum(len(c) + 0.9 for c in alike) for alike in rows.values())
    figure = pictures._figure(WIDTH_IN, 1.15 + 0.2 * bars)
    named: dict[str, Any] = {}
    # All panels have one scale.
    widest = max(r["p80_ms"] / _base(c) for c in found for r in c.values())
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        y, ticks = 0.0, []
        for case in rows[mode]:
            first = next(iter(case.values()))
            label = f"{first['case']}\n{first['side']}×{first['side']}\nbatch {first['batch']}"
            ticks.append((y + (len(case) - 1) / 2, label))
            for impl, record in case.items():
                share, low, high = (record[name] / _base(case) for name in ("median_ms", "p20_ms", "p80_ms"))
                named[impl] = axes.barh(y, share, height=0.82, color=COLORS[impl])
                axes.plot([low, high], [y, y], color="black", linewidth=0.9)
                ms = record["median_ms"]
                text = f"{ms:.0f} ms" if ms >= 100 else f"{table.milliseconds(ms)} ms"
                if record is not first:
                    text += f", {1 / share:.2f}x"
                # On white, since the line of the network as it is passes behind.
                axes.annotate(text, (max(share, high), y), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=FONT, weight="bold" if impl == peers.FUSED else "normal",
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
                y += 1
            y += 0.9
        axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlim(0, widest * 1.62)
        axes.set_ylim(bars - 0.9 - 0.4, -0.6)
        axes.set_xticks([])
        axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
        axes.set_title(TITLES[mode], fontsize=FONT + 1.5, loc="left")
        pictures._plain(axes)
        axes.tick_params(labelsize=FONT, length=0)
        axes.spines["bottom"].set_visible(False)
    machine, first = run["machine"], next(iter(found[0].values()))
    layout = {"contiguous": "NCHW"}.get(first["layout"], first["layout"])
    threads = machine["threads"]
    where = f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}, {first['dtype']} {layout}"
    figure.suptitle(
        f"Whole networks before and after swap_: {where}\n"
        "medians, with the 20th and 80th percentile; beside them how many times as fast as the network as it is",
        fontsize=FONT + 1,
        x=0.01,
        ha="left",
    )
    order = [impl for impl in NAMES if impl in named]
    figure.legend([named[i] for i in order], [NAMES[i] for i in order], loc="outside lower center", ncols=len(order),
                  fontsize=FONT, frameon=False)  # fmt: skip
    return pictures._bytes(figure)


def _base(case: dict[str, Record]) -> float:
    """The time of the network as it is, or of the first that there is."""
    return float(next(iter(case.values()))["median_ms"])
