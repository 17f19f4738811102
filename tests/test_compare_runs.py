"""``bench compare`` on real runs: no alarm between those of one build, and what was slowed is found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from compare_helpers import TIMES, alarms, found, record

from dla_fast.bench import compare

DATA = Path(__file__).parent / "data" / "compare_runs.json"
REAL = json.loads(DATA.read_text(encoding="utf-8"))
QUIET = json.loads((Path(__file__).parent / "data" / "compare_runs_quiet.json").read_text())
# Which of the slower runs are found. The machine was as busy as it gets: memory-bound ops changed by more from run to
# run, in wall time all of them did.
FOUND = {
    "wall time": set(),
    "processor time": {"merge inference", "aggregate training", "merge training"},
    "processor time, memory kept": {"aggregate", "merge", "aggregate training", "merge training"},
}


def real(rows):
    """A run of the file, with the records that bench writes."""
    records = []
    for (suite, case, op, mode), (rounds, *times) in zip(REAL["cases"], rows, strict=True):
        same = {"suite": suite, "case": case, "op": op, "mode": mode, "batch": 1, "threads": 1, "rounds": rounds}
        for impl, figures in (("dla_fast", times[:3]), ("eager", times[3:])):
            records.append(record(impl=impl, **same, **dict(zip(TIMES, figures, strict=True))))
    return {"records": records}


@pytest.mark.parametrize("name", REAL["series"])
def test_runs_of_one_build(name):
    runs = [real(rows) for rows in REAL["series"][name]["plain"]]
    assert len(runs) >= 7
    for i, (before, after) in enumerate(itertools.pairwise(runs)):
        result = compare.compare(before, after, 0.05)
        assert not result.regressions(), (i, alarms(result))


@pytest.mark.parametrize("name", REAL["series"])
def test_runs_with_a_slower_op(name):
    """What is named is what was slowed, and it is where it says that a tenth would show; elsewhere it says so."""
    plain, slow = (REAL["series"][name][kind] for kind in ("plain", "slowed"))
    hits = set()
    for before, (what, after) in zip(plain, slow, strict=False):
        result = compare.compare(real(before), real(after), 0.05)
        ours = [op for op in result.ops if f"{op.op} {op.mode}".startswith(f"{what} ") or f"{op.op} {op.mode}" == what]
        names = found(result)
        assert names <= {f"{op.op} {op.mode}" for op in ours}, what
        for op in ours:
            assert op.changed or op.least > 1.1, op
        if names:
            hits.add(what)
    assert hits == FOUND[name]


def quiet(rows):
    """A run of the second file."""
    records = []
    for (case, mode, batch), (rounds, *times) in zip(QUIET["cases"], rows, strict=True):
        same = {"case": case, "mode": mode, "batch": batch, "rounds": rounds}
        for impl, figures in (("dla_fast", times[:3]), ("eager", times[3:])):
            records.append(record(impl=impl, **same, **dict(zip(TIMES, figures, strict=True))))
    return {"records": records}


def test_six_pairs_of_runs_on_idle_cores():
    """No alarm between runs of one build; a tenth more in aggregate is found each time."""
    plain, slow = ([quiet(rows) for rows in QUIET[kind]] for kind in ("plain", "slowed"))
    assert len(plain) == 7
    for before, after in itertools.pairwise(plain):
        assert not compare.compare(before, after, 0.05).regressions()
    for before, after in zip(plain, slow, strict=False):
        result = compare.compare(before, after, 0.05)
        assert found(result)
        assert all(0.9 < op.ratio / 1.1 < 1.1 for op in result.ops)
