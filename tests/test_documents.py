"""The documents: every snippet runs, every command and link leads somewhere, every figure is that of a kept run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import record

import dla_fast
from dla_fast import cli
from dla_fast.commands.bench import SUITES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/benchmarks.md",
    "docs/swapping.md",
    "docs/like-stock.md",
    "docs/tasks.md",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)")
MAXIMUM = 200  # lines of the README


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(read(name)) if language in languages]


SNIPPETS = [(name, i, body) for name in DOCUMENTS for i, body in enumerate(blocks(name, "python"))]


@pytest.mark.parametrize(("name", "number", "body"), SNIPPETS, ids=[f"{name}-{i}" for name, i, _ in SNIPPETS])
def test_every_snippet_runs_as_it_stands(name, number, body, tmp_path, monkeypatch):
    """Each by itself, in a folder of its own; a reader stands in the checkout, so that is importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(body, f"{name}, snippet {number}", "exec"), {"__name__": "snippet"})


def test_the_readme_has_snippets_for_each_use():
    text = "\n".join(blocks("README.md", "python"))
    for name in ("swap_", "unswap_", "AggregationNode", "DLAUp", "create_model", "use_backend", "torch.autocast"):
        assert name in text, name


def commands() -> list[tuple[str, str]]:
    """The command lines of the documents, in their code blocks and in running text."""
    found = []
    for name in DOCUMENTS:
        lines = "\n".join(blocks(name, "", "sh", "console")).splitlines()
        lines += re.findall(r"`((?:make|python) [^`]+)`", " ".join(read(name).split()))
        found += [(name, line.split("#")[0].strip()) for line in lines]
    return found


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = {target for _, line in commands() for target in re.findall(r"^make ([a-z-]+)", line)}
    assert {"demo", "test", "lint"} <= named
    assert named <= targets, named - targets


def test_every_command_line_is_understood():
    seen = set()
    for name, line in commands():
        match = re.match(r"python -m dla_fast (.*)", line)
        # Words in capitals stand for the reader's own.
        if match is None or "|" in line or re.search(r"\b[A-Z]{3,}\b", line):
            continue
        words = shlex.split(match[1])
        seen.add(words[0])
        args = cli._parser(words[0]).parse_args(words)
        if words[0] == "bench" and args.what[:1] != ["compare"]:
            assert set(args.what) <= {*SUITES, "all", "cpu", "cuda"}, (name, line)
    assert {"doctor", "demo", "bench", "verify"} <= seen


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_inside_the_repository_leads_somewhere(name):
    for target, anchor in LINK.findall(read(name)):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, (target, anchor)


def test_the_readme_is_short_and_says_first_what_is_not_measured():
    lines = read("README.md").splitlines()
    assert len(lines) < MAXIMUM
    measured = any(json.loads(p.read_text())["records"][0]["device"] == "cuda" for p in results())
    first_screen = " ".join(lines[:40])
    assert measured or "no GPU" in first_screen


def results() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## ([\d.]+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == dla_fast.__version__


def test_the_api_reference_is_made_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    line = re.search(r"\$\(PY\) (-m pdoc .*) -o build/docs (.*)", read("Makefile"))
    assert line is not None
    command = [sys.executable, *line[1].split(), "-o", str(tmp_path), *line[2].split()]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr
    assert "Warn" not in made.stderr
    assert "SwapReport" in (tmp_path / "dla_fast" / "swap.html").read_text(encoding="utf-8")


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme():
    path = ROOT / "benchmarks" / "readme.py"
    if not results():
        pytest.skip("not a checkout: there are no runs")
    spec = importlib.util.spec_from_file_location("readme_figures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_have_the_figures_of_the_kept_runs(readme):
    text = read("README.md")
    assert readme.NETWORKS.search(text)
    assert readme.rewritten(text) == text, "run `make readme`"
    assert readme.page() == read("docs/benchmarks.md"), "run `make readme`"


def run_of(records: list[dict[str, object]]) -> dict[str, Any]:
    return {
        "machine": {"processor": "a processor", "isa": "AVX2", "threads": 2},
        "versions": {"torch": torch.__version__, "dla_fast": "1"},
        "commit": None,
        "records": records,
    }


def test_figures_follow_the_run(readme, tmp_path):
    memory = {"suite": "memory", "case": "detector", "op": "model", "mode": "training", "median_ms": None}
    whole = {"suite": "swapped", "case": "detector", "op": "model", "shape": "3 @ 512x512", "batch": 1}
    rows = [record(suite="ops"), record(suite="ops", impl="eager", median_ms=2.0)]
    rows += [record(**whole, median_ms=30.0), record(**whole, impl="eager", median_ms=45.0)]
    rows += [record(**whole, impl="compile", median_ms=60.0)]
    for impl, peak in (("dla_fast", 300), ("eager", 400)):
        rows.append(record(**memory, impl=impl, peak_bytes=peak * 2**20, saved_bytes=peak * 2**19))
    kept = run_of(rows)
    kept["machine"]["kernel_isa"] = "amx"
    (tmp_path / "run.json").write_text(json.dumps(kept))
    text = "before\n<!-- figures: run.json -->\nold 9.99x\n<!-- end of figures -->\nafter\n"
    new = readme.rewritten(text, tmp_path)
    assert "9.99x" not in new
    assert "swapped and compiled" in new
    assert "| detector, 28×28 | 1.50x, – (0.75x) | – | 0.75x |" in new
    assert readme.rewritten(new, tmp_path) == new
    page = readme.page(tmp_path)
    assert "No GPU has been measured" in page
    (tmp_path / "gpu.json").write_text(json.dumps(run_of([record(device="cuda"), record(device="cuda", impl="eager")])))
    assert "No GPU has been measured" not in readme.page(tmp_path)
    assert "## run\n" in page
    assert "| ops | aggregate | inference | 1 | 2.00x | 2.00x | 2.00x |" in page
    assert "`benchmarks/results/run.json` — a processor, amx, 2 CPU threads; torch" in page
    assert "| detector, 3 @ 512x512 | 1 | inference | 45.00 | 60.00 | 30.00 | 1.50x |" in page
    assert "| memory of a training step | peak, eager | dla_fast | saved for backward, eager | dla_fast |" in page
    assert "batch 8 | 400 MiB | 0.75x | 200 MiB | 0.75x |" in page
