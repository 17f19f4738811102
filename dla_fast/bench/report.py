"""The run as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from dla_fast.bench import files, pictures, table
from dla_fast.bench.records import Comparison, Record, geometric_mean, instruction_set, is_timed

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2430; background: #fff;
       max-width: 1080px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.7em; margin: 0 0 .2em; }
h2 { font-size: 1.25em; margin: 2em 0 .5em; border-bottom: 1px solid #d8dde5; }
p { margin: .5em 0; overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
img { width: 100%; min-width: 800px; height: auto; display: block; margin: .6em 0 1.2em; }
table { border-collapse: collapse; margin: .6em 0; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e8ebf0; white-space: nowrap; }
th { background: #f3f5f8; } th.l, td.l { text-align: left; }
.scroll { overflow-x: auto; } .behind { color: #c0392b; font-weight: 600; }
.error { border-left: 4px solid #c0392b; background: #fdf1ef; padding: .5em 1em; }
summary { cursor: pointer; color: #1f6fb4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; }
dt { color: #5d6675; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  body { margin: 1em auto; padding: 0 .9em; }
  dl { display: block; } dd { margin: 0 0 .5em; }
}
"""
# Reached by the keyboard too, which has no other way to scroll it.
_BOX = '<div class="scroll" tabindex="0">'


def _image(svg: bytes, text: str) -> str:
    data = base64.b64encode(svg).decode("ascii")
    # On a small screen it keeps a size that can be read, and scrolls in a box of its own, as tables do.
    return f'{_BOX}<img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></div>'


def _table(rows: list[list[str]], left: int = 1) -> str:
    """An HTML table of cells that are HTML already; the first ``left`` columns stand to the left."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if i == 0 else "td"
        cells = (f"<{tag}{' class=l' if j < left else ''}>{cell}</{tag}>" for j, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"{_BOX}<table>{''.join(lines)}</table></div>"


def _ratio(value: float) -> str:
    return f'<span class="behind">{value:.2f}x</span>' if value < 1 else f"{value:.2f}x"


def _facts(run: dict[str, Any]) -> str:
    machine = run["machine"]
    rows = {
        "machine": f"{machine.get('processor') or 'unknown processor'}, CPU threads: {machine.get('threads')}, "
        f"{instruction_set(machine) or 'instruction set not recorded'}",
        "system": machine.get("platform", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
        "commit": run.get("commit") or "not from a checkout",
        "date": run.get("date", ""),
        "command": "python -m dla_fast " + " ".join(run["command"]) if run.get("command") else "",
    }
    for name, rate in machine.get("rates", {}).items():
        gigabytes, gigaflops = rate["bytes_per_s"] / 1e9, rate["flops_per_s"] / 1e9
        rows[f"best rates, {name}"] = f"{gigabytes:.1f} GB/s copied, {gigaflops:.0f} GFLOP/s of the best product"
    items = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items() if value)
    return f"<dl>{''.join(items)}</dl>"


def _summary(found: dict[tuple[str, str, str], list[Comparison]]) -> str:
    rows = [["what", "op", "mode", "cases", "geometric mean", "worst", "behind", "of floor, median"]]
    for (suite, op, mode), cases in found.items():
        ratios = [c.speedup for c in cases]
        shares = sorted(c.share_of_floor or 0.0 for c in cases)
        behind = sum(r < 1 for r in ratios)
        rows.append(
            [
                escape(table.TITLES.get(suite, suite)),
                op,
                mode,
                str(len(cases)),
                _ratio(geometric_mean(ratios)),
                _ratio(ratios[0]),
                str(behind),
                "-" if suite == "launch" else f"{shares[len(shares) // 2]:.0%}",
            ]
        )
    return _table(rows, left=3)


def _problems(run: dict[str, Any]) -> list[str]:
    parts = []
    errors = [record for record in run["records"] if record.get("error")]
    if errors:
        items = "".join(f"<li>{escape(str(record['error']))}</li>" for record in errors)
        parts.append(
            f'<div class="error"><b>Errors: {table.counted(len(errors))} without a figure</b><ul>{items}</ul></div>'
        )
    if not run.get("complete", True):
        left = run.get("left_out") or []
        why = f"time was up with {table.counted(len(left))} left" if left else "it was interrupted"
        parts.append(f"<p>The run is not complete: {why}. What is shown was finished.</p>")
    return parts


def _details(found: dict[tuple[str, str, str], list[Comparison]]) -> str:
    """Every figure, in tables that open."""
    parts = []
    for (suite, op, mode), cases in found.items():
        impls = list(dict.fromkeys(impl for c in cases for impl in c.by_impl))
        rows = [["case", "shape", "batch", *impls, "floor", "of floor", "speedup"]]
        for c in cases:
            times = []
            for impl in impls:
                record = c.by_impl.get(impl)
                if record is None:
                    times.append("-")
                    continue
                spread = f"{table.milliseconds(record['p20_ms'])} to {table.milliseconds(record['p80_ms'])}"
                times.append(f'<span title="{spread}">{table.milliseconds(record["median_ms"])}</span>')
            share = c.share_of_floor
            head = [escape(c.mine["case"]), escape(str(c.mine.get("shape", ""))), str(c.mine["batch"])]
            floor = [table.milliseconds(c.mine.get("floor_ms")), "-" if share is None else f"{share:.0%}"]
            rows.append([*head, *times, *floor, _ratio(c.speedup)])
        title = f"{table.TITLES.get(suite, suite)}: {op}, {mode}, {table.counted(len(cases))}"
        parts.append(f"<details><summary>{escape(title)}</summary>{_table(rows, left=2)}</details>")
    return "".join(parts)


def _sections(run: dict[str, Any], found: dict[tuple[str, str, str], list[Comparison]]) -> list[str]:
    """The pictures, each kind where the run has it."""
    parts: list[str] = []
    barred: dict[tuple[str, str], list[Comparison]] = {}
    for (suite, _, mode), cases in found.items():
        if suite in ("ops", "nodes", "ida", "convs"):
            barred.setdefault((suite, mode), []).extend(cases)
    if barred:
        parts.append("<h2>Against the best peer</h2>")
    for (suite, mode), cases in barred.items():
        title = f"{table.TITLES[suite]}, {mode}"
        parts.append(_image(pictures.ratio_bars(sorted(cases, key=lambda c: c.speedup), title), title))
    rates = run["machine"]
    for mode in dict.fromkeys(mode for _, mode in barred):
        cases = [c for key, some in barred.items() if key[1] == mode for c in some]
        if "flops_per_s" in rates and any(c.mine.get("bytes") and c.mine.get("flops") for c in cases):
            if "<h2>Roofline</h2>" not in parts:
                parts.append("<h2>Roofline</h2>")
            parts.append(_image(pictures.roofline(cases, rates, f"Roofline, {mode}"), f"roofline, {mode}"))
    for suite, heading in (("models", "Whole networks"), ("necks", "Necks of others"), ("launch", "Cost of a call")):
        alike = {key: cases for key, cases in found.items() if key[0] == suite}
        if alike:
            parts.append(f"<h2>{heading}</h2>")
        for (_, _, mode), cases in alike.items():
            parts.append(_image(pictures.time_bars(cases, f"{heading}, {mode}"), f"{heading}, {mode}"))
            if any(record.get("host_ms") for c in cases for record in c.by_impl.values()):
                title = f"{heading}, {mode}: what the host spends"
                parts.append(_image(pictures.time_bars(cases, title, "host_ms"), title))
    pairs = table.memory_pairs(run["records"])
    if pairs:
        parts += ["<h2>Memory of a training step</h2>", _image(pictures.memory_bars(pairs), "memory")]
    scaled: list[Record] = [r for r in run["records"] if r.get("axis") and is_timed(r)]
    if scaled:
        parts.append("<h2>Scaling</h2>")
        for mode in dict.fromkeys(r["mode"] for r in scaled):
            alike_records = [r for r in scaled if r["mode"] == mode]
            parts.append(_image(pictures.scaling_lines(alike_records, mode), f"scaling, {mode}"))
    return parts


def render(run: dict[str, Any]) -> str:
    """The report as HTML; everything it needs is in it.

    Args:
        run: as in the JSON file.
    """
    found = table.sections(run["records"])
    parts = [
        "<h1>dla_fast benchmarks</h1>",
        _facts(run),
        *_problems(run),
        "<h2>Summary</h2>",
        "<p>Every ratio is the time of the fastest peer over that of dla_fast: above 1x dla_fast is ahead, below it is "
        "behind, and the worst stand first. The floor is the time that the machine's measured copy bandwidth and best "
        "matrix product allow; a case above 100 % of it has kept its data in the cache. Peers were timed in turn in "
        "one run, after their results had been found equal.</p>",
        _summary(found) if found else "<p>No times in this run.</p>",
        *_sections(run, found),
    ]
    if found:
        parts += ["<h2>Every figure</h2>", "<p>Medians in ms; the 20th and 80th percentile show on hovering.</p>"]
        parts.append(_details(found))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>dla_fast benchmarks</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write(run: dict[str, Any], path: Path) -> None:
    """Write the report to a file, making its folder where there is none."""
    files.write(path, render(run))
