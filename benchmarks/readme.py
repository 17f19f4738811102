"""Write the README's speed figures from the runs in benchmarks/results: ``make readme``.

Between ``<!-- figures: FILE -->`` and ``<!-- end of figures -->`` stands what the run in that file says, and nothing
written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dla_fast.commands.bench.records import comparisons, geometric_mean, load, side_of
from dla_fast.commands.bench.table import LARGE, memory_pairs

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def _values(records: list[dict[str, Any]], name: str) -> str:
    return ", ".join(sorted({str(record[name]) for record in records}))


def _heading(file: str, run: dict[str, Any]) -> str:
    machine, versions, records = run["machine"], run["versions"], run["records"]
    threads = machine["threads"]
    where = [machine.get("processor") or "processor not recorded", machine.get("kernel_isa") or machine["isa"]]
    where += [f"{threads} CPU thread{'s' if threads > 1 else ''}"] if records[0]["device"] == "cpu" else []
    what = f"batch {_values(records, 'batch')}, {_values(records, 'dtype')}, {_values(records, 'layout')}"
    peers = _values([r for r in records if not r["impl"].startswith("dla_fast")], "impl")
    made = run["commit"][:12] if run.get("commit") else "commit not recorded"
    return (
        f"`benchmarks/results/{file}` — {', '.join(where)}; torch {versions['torch']}, dla_fast {versions['dla_fast']} "
        f"({made}); {what}; against {peers}:"
    )


def figures(file: str, run: dict[str, Any]) -> str:
    """What a run says, as Markdown.

    Args:
        file: its name in benchmarks/results.
        run: as in the file.
    """
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for c in comparisons(run["records"]):
        groups.setdefault((c.mine.get("suite", "nodes"), c.mine["op"], c.mine["mode"]), []).append(c)
    lines = [_heading(file, run), ""]
    if groups:
        lines.append(f"| | op | mode | cases | geometric mean | at {LARGE}×{LARGE} and above | worst |")
        lines.append("|---|---|---|---|---|---|---|")
    for (suite, op, mode), found in sorted(groups.items()):
        ratios = [c.speedup for c in found]
        large = [c.speedup for c in found if (side_of(c.mine) or 0) >= LARGE]
        above = f"{geometric_mean(large):.2f}x" if large else "–"
        mean = f"{geometric_mean(ratios):.2f}x"
        lines.append(f"| {suite} | {op} | {mode} | {len(ratios)} | {mean} | {above} | {min(ratios):.2f}x |")
    pairs = memory_pairs(run["records"])
    if pairs:
        lines += ["", "| memory of a training step | peak, eager | dla_fast | saved for backward, eager | dla_fast |"]
        lines.append("|---|---|---|---|---|")
    for mine, theirs in sorted(pairs, key=lambda pair: str(pair[0]["case"])):
        cells = []
        for name in ("peak_bytes", "saved_bytes"):
            ratio = f"{mine[name] / 2**20:.0f} MiB ({mine[name] / theirs[name]:.2f}x)"
            cells += [f"{theirs[name] / 2**20:.0f} MiB", ratio]
        lines.append(f"| {mine['case']}, {mine['shape']}, batch {mine['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rewritten(text: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The README with its figures as the runs have them.

    Raises:
        CommandError: a run that is not there.
    """
    return BLOCK.sub(lambda m: f"{m[1]}{figures(m[2], load(results / m[2]))}\n{m[3]}", text)


def main() -> None:
    """Rewrite README.md where it differs."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = rewritten(text)
    if new != text:
        path.write_text(new, encoding="utf-8")
    print(f"README.md: {'rewritten' if new != text else 'its figures match the results'}")


if __name__ == "__main__":
    main()
