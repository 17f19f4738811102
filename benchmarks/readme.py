"""Write README.md's figures and docs/benchmarks.md from the runs in benchmarks/results: ``make readme``.

Between ``<!-- networks: NAME -->`` and ``<!-- end of networks -->`` stand the whole networks of the runs whose files
begin with that name, all of one machine; between ``<!-- figures: FILE -->`` and ``<!-- end of figures -->`` what the
run in that file says of models that were swapped. Nothing there is written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import networks
from dla_fast.bench import peers
from dla_fast.bench.records import Comparison, comparisons, geometric_mean, load, side_of
from dla_fast.bench.table import LARGE, memory_cases, memory_pairs, milliseconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
NETWORKS = re.compile(r"(<!-- networks: (\S+) -->\n).*?(<!-- end of networks -->)", re.DOTALL)
WHOLE = ("models", "swapped")
SWAPPED = (peers.FUSED, f"{peers.FUSED}+compile")

INTRODUCTION = f"""# Benchmarks

Written by `make readme` from the runs that were kept in `benchmarks/results`; nothing here is typed by hand.

Every ratio is the time of the fastest peer over that of dla_fast: above 1x dla_fast is ahead. A case was timed after
its results had been found to agree with its peers', in turn with them, in one run; figures are medians. "At
{LARGE}×{LARGE} and above" are the maps where memory decides; below, a node is a matrix product and little else, and
there is less to gain. On a shared machine figures move by several percent from run to run, so read ratios, not
milliseconds.

{{measured}}To add a machine: `python -m dla_fast bench nodes ida convs models --peers all --json FILE`, or on a GPU
`python -m benchmarks.gpu`, and send the file in.
"""


def _values(records: list[dict[str, Any]], name: str) -> str:
    return ", ".join(str(value) for value in sorted({record[name] for record in records}))


def _heading(file: str, run: dict[str, Any]) -> str:
    machine, versions, records = run["machine"], run["versions"], run["records"]
    threads = machine["threads"]
    where = [machine.get("processor") or "processor not recorded", machine.get("kernel_isa") or machine["isa"]]
    where += [f"{threads} CPU thread{'s' if threads > 1 else ''}"] if records[0]["device"] == "cpu" else []
    where += [f"{machine['bytes_per_s'] / 1e9:.0f} GB/s copied"] if machine.get("bytes_per_s") else []
    what = f"batch {_values(records, 'batch')}, {_values(records, 'dtype')}, {_values(records, 'layout')}"
    rivals = _values([r for r in records if not r["impl"].startswith(peers.FUSED)], "impl")
    made = run["commit"][:12] if run.get("commit") else "commit not recorded"
    return (
        f"`benchmarks/results/{file}` — {', '.join(where)}; torch {versions['torch']}, dla_fast {versions['dla_fast']} "
        f"({made}); {what}; against {rivals}:"
    )


def _ops(found: list[Comparison]) -> list[str]:
    """A row for each suite, op and mode."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in found:
        groups.setdefault((c.mine.get("suite", "nodes"), c.mine["op"], c.mine["mode"]), []).append(c)
    if not groups:
        return []
    lines = [f"| | op | mode | cases | geometric mean | at {LARGE}×{LARGE} and above | worst |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (suite, op, mode), cases in sorted(groups.items()):
        for impl, title in ((peers.FUSED, mode), (peers.FROZEN, f"{mode}, frozen")):
            ratios = [c.speedup_of(impl) for c in cases if impl in c.by_impl]
            if not ratios:
                continue
            large = [c.speedup_of(impl) for c in cases if impl in c.by_impl and (side_of(c.mine) or 0) >= LARGE]
            above = f"{geometric_mean(large):.2f}x" if large else "–"
            mean = f"{geometric_mean(ratios):.2f}x"
            lines.append(f"| {suite} | {op} | {title} | {len(ratios)} | {mean} | {above} | {min(ratios):.2f}x |")
    return [*lines, ""]


def _models(found: list[Comparison]) -> list[str]:
    """A row for each whole model, with every implementation's time."""
    impls = list(dict.fromkeys(impl for c in found for impl in c.by_impl))
    impls.sort(key=lambda impl: (impl.startswith(peers.FUSED), impl != "eager"))
    if not found:
        return []
    lines = [f"| model | batch | | {' | '.join(f'{impl}, ms' for impl in impls)} | against the best peer |"]
    lines.append(f"|---|---|---{'|---' * len(impls)}|---|")
    for c in sorted(found, key=lambda c: (c.mine["case"], c.mine["batch"], c.mine["mode"])):
        times = [milliseconds(c.by_impl[i]["median_ms"]) if i in c.by_impl else "–" for i in impls]
        name = f"{c.mine['case']}, {c.mine['shape']}"
        lines.append(f"| {name} | {c.mine['batch']} | {c.mine['mode']} | {' | '.join(times)} | {c.speedup:.2f}x |")
    return [*lines, ""]


def _memory(records: list[dict[str, Any]]) -> list[str]:
    """Peak and kept bytes of a training step, in MiB of eager and in shares of that."""
    cases = memory_cases(records)
    if not cases:
        return []
    impls = [impl for impl in (peers.FUSED, *peers.VARIANTS) if any(impl in by for by in cases)]
    names = " | ".join(impl.removeprefix(f"{peers.FUSED}+") for impl in impls)
    lines = [f"| memory of a training step | peak, eager | {names} | saved for backward, eager | {names} |"]
    lines.append("|---" * (3 + 2 * len(impls)) + "|")
    for by in sorted(cases, key=lambda by: (str(by["eager"]["case"]), by["eager"]["batch"])):
        theirs, cells = by["eager"], []
        for name in ("peak_bytes", "saved_bytes"):
            cells.append(f"{theirs[name] / 2**20:.0f} MiB")
            cells += [f"{by[impl][name] / theirs[name]:.2f}x" if impl in by else "–" for impl in impls]
        lines.append(f"| {theirs['case']}, {theirs['shape']}, batch {theirs['batch']} | {' | '.join(cells)} |")
    return [*lines, ""]


def figures(file: str, run: dict[str, Any]) -> str:
    """What a run says, as Markdown.

    Args:
        file: its name in benchmarks/results.
        run: as in the file.
    """
    found = comparisons(run["records"])
    parts = _ops([c for c in found if c.mine.get("suite") not in WHOLE])
    parts += _models([c for c in found if c.mine.get("suite") in WHOLE]) + _memory(run["records"])
    parts += networks.units(run)
    return "\n".join([_heading(file, run), "", *parts]).rstrip("\n")


def summary(run: dict[str, Any]) -> str:
    """The whole models of a run as Markdown, a row each: how many times as fast as the model as it is, and memory."""
    memory = {mine["case"]: mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in memory_pairs(run["records"])}
    rows: dict[str, dict[str, str]] = {}
    for c in comparisons(run["records"]):
        if c.mine.get("suite") not in WHOLE or "eager" not in c.by_impl:
            continue
        side = c.mine["side"]
        times = {impl: c.by_impl["eager"]["median_ms"] / r["median_ms"] for impl, r in c.by_impl.items()}
        cells = (f"{times[impl]:.2f}x" if impl in times else "–" for impl in (*SWAPPED, "compile"))
        row = rows.setdefault(f"{c.mine['case']}, {side}×{side}", {})
        row[c.mine["mode"]] = "{}, {} ({})".format(*cells)
        if c.mine["case"] in memory:
            row["memory"] = f"{memory[c.mine['case']]:.2f}x"
    lines = ["| | inference | training step | memory at its peak |", "|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        lines.append(f"| {name} | {' | '.join(row.get(key, '–') for key in ('inference', 'training', 'memory'))} |")
    machine, versions = run["machine"], run["versions"]
    note = (
        f"How many times as fast as the model as it is: swapped, swapped and compiled (`torch.compile` alone), and the "
        f"memory of a training step, swapped over as it is. {machine['processor']}, {machine['threads']} threads, "
        f"{_values(run['records'], 'dtype')}, torch {versions['torch']}:"
    )
    return "\n".join([note, "", *lines])


def rewritten(text: str, results: Path = RESULTS) -> str:
    """The README with its figures as the runs have them.

    Raises:
        NotARun: a run that is not there.
    """

    def whole(m: re.Match[str]) -> str:
        found = networks.table([load(path) for path in sorted(results.glob(f"{m[2]}*.json"))])
        return f"{m[1]}{found}\n{m[3]}" if found else m[1] + m[3]

    text = NETWORKS.sub(whole, text)
    return BLOCK.sub(lambda m: f"{m[1]}{summary(load(results / m[2]))}\n{m[3]}", text)


def page(results: Path = RESULTS) -> str:
    """docs/benchmarks.md."""
    runs = {path: load(path) for path in sorted(results.glob("*.json"))}
    on_gpu = any(record["device"] == "cuda" for run in runs.values() for record in run["records"])
    parts = [INTRODUCTION.format(measured="" if on_gpu else "No GPU has been measured yet. ")]
    parts += [f"## {path.stem}\n\n{figures(path.name, run)}\n" for path, run in runs.items()]
    return "\n".join(parts)


def main() -> None:
    """Rewrite README.md and docs/benchmarks.md where they differ."""
    readme = ROOT / "README.md"
    for path, new in (
        (readme, rewritten(readme.read_text(encoding="utf-8"))),
        (ROOT / "docs" / "benchmarks.md", page()),
    ):
        path.parent.mkdir(exist_ok=True)
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if new != old:
            path.write_text(new, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'rewritten' if new != old else 'its figures match the results'}")


if __name__ == "__main__":
    main()
