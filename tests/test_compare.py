"""``bench compare``: no alarm between runs of one build, and what is slower found, on runs that are drawn."""

from __future__ import annotations

import copy
import time

import pytest
from compare_helpers import MODES, OPS, TIMES, drawn, found, record, slowed, written

from dla_fast import cli, functional
from dla_fast.bench import cases, compare, compare_table, noise

# --- drawn runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peers", [("eager",), ("eager", "compile")])
def test_unchanged_code_is_seldom_called_worse(peers):
    pairs = [(drawn(2 * i, peers=peers), drawn(2 * i + 1, peers=peers, machine=1.3)) for i in range(100)]
    wrong = [bool(compare.compare(a, b, 0.05).regressions()) for a, b in pairs]
    assert sum(wrong) <= 4


def test_a_tenth_is_found_in_an_op():
    hits = others = 0
    noise = {"within": 0.02, "between": 0.02}
    for i in range(100):
        op, mode = OPS[i % 5], MODES[i % 2]
        after = slowed(drawn(2 * i + 1, machine=0.7, **noise), 1.1, op=op, mode=mode)
        names = found(compare.compare(drawn(2 * i, **noise), after, 0.05))
        hits += f"{op} {mode}" in names
        others += bool(names - {f"{op} {mode}"})
    assert hits >= 80
    assert others <= 4


def test_what_it_says_would_show_shows():
    """The share of changes found agrees with the size that it gives for four times of five."""
    hits = []
    for i in range(60):
        before, after = drawn(2 * i), drawn(2 * i + 1)
        least = [op.least for op in compare.compare(before, after, 0.05).ops if op.op == "merge"]
        hits.append("merge training" in found(compare.compare(before, slowed(after, max(least), op="merge"), 0.05)))
    assert 0.65 <= sum(hits) / len(hits) <= 0.98


def test_a_single_case_that_stands_out():
    before = drawn(1, within=0.01, between=0.01)
    after = slowed(drawn(2, within=0.01, between=0.01), 1.6, case="merge.0", mode="training")
    result = compare.compare(before, after, 0.05)
    assert [c.record["case"] for c in result.changes] == ["merge.0"]
    assert result.changes[0].ratio == pytest.approx(1.6, rel=0.1)
    text = compare_table.render(result, before, after)
    assert "single figures that stand out, worse: 1" in text


def test_everything_slower_is_found():
    """The scatter is taken about the median: what all have in common is no noise."""
    quiet = {"within": 0.01, "between": 0.01}
    result = compare.compare(drawn(1, **quiet), slowed(drawn(2, **quiet), 1.15), 0.05)
    assert len(found(result)) == 10
    assert result.drift == pytest.approx(1, abs=0.02)


def test_noise_within_the_runs_counts():
    """One and the same pair of medians, once with wide rounds."""
    before, after = drawn(1), slowed(drawn(2), 1.25, op="merge")
    assert {"merge inference", "merge training"} <= found(compare.compare(before, after, 0.05))
    for run in (before, after):
        for r in run["records"]:
            r["p20_ms"] *= 0.4
            r["p80_ms"] *= 2.5
    assert not compare.compare(before, after, 0.05).regressions()


def test_the_threshold():
    quiet = {"within": 0.003, "between": 0.003}
    before, after = drawn(1, **quiet), slowed(drawn(2, **quiet), 1.08, op="merge")
    assert found(compare.compare(before, after, 0.05)) == {"merge inference", "merge training"}
    assert not compare.compare(before, after, 0.12).regressions()
    # Better is told, and no regression.
    result = compare.compare(after, before, 0.05)
    assert sorted(op.mode for op in result.ops if op.changed) == list(MODES)
    assert not result.regressions()
    assert [op.op for op in result.ops][-2:] == ["merge", "merge"]


def test_a_slower_machine(capsys, tmp_path):
    a = written(tmp_path / "a.json", drawn(1))
    b = written(tmp_path / "b.json", drawn(2, machine=1.5))
    assert cli.main(["bench", "compare", a, b]) == 0
    assert cli.main(["bench", "compare", a, b, "--relative"]) == 0
    out = capsys.readouterr().out
    assert "the peers' times changed by 1.5" in out
    assert "nothing changed beyond noise" in out
    assert cli.main(["bench", "compare", a, b, "--absolute"]) == 1
    assert "times as measured" in capsys.readouterr().out


def test_a_run_beside_other_work(capsys, tmp_path):
    """Threads that wait for each other take fifty times as long, and not the same in every program."""
    a, b = written(tmp_path / "a.json", drawn(1)), slowed(drawn(2, machine=1 / 50), 2.5)
    assert cli.main(["bench", "compare", a, written(tmp_path / "b.json", b)]) == 0
    out = capsys.readouterr().out
    assert "disturbed one of the runs" in out
    assert "nothing changed beyond noise" in out
    assert "disturbed" not in compare_table.render(compare.compare(b, b, 0.05), b, b)


def test_without_peers():
    """A drift of many cases at once is allowed for, in so far as an op must pass it; few cases cannot tell."""
    mine = {"peers": (), "within": 0.01, "between": 0.01}
    before, after = drawn(1, **mine), drawn(2, machine=1.15, **mine)
    result = compare.compare(before, after, 0.05)
    assert result.alone == 60
    assert result.drift is None
    assert not result.regressions()
    # A change of the machine cannot be told from one of everything; without one an op's change shows.
    assert min(op.least for op in result.ops) > 1.4
    assert found(compare.compare(before, slowed(drawn(2, **mine), 1.1, op="merge", mode="training"), 0.05))
    text = compare_table.render(result, before, after)
    assert "60 cases of these without a peer in both runs" in text
    assert "a slower machine is allowed for" in text
    assert compare.compare(before, slowed(after, 4, op="merge"), 0.05).regressions()
    one = {"records": [record()]}
    result = compare.compare(one, slowed(one, 2), 0.05)
    assert len(result.regressions()) == 2
    text = compare_table.render(result, one, one)
    assert "a slower machine counts as a change" in text
    assert "2.0 times that within them (assumed, for want of cases)" in text


def test_a_peer_in_one_run_alone():
    """Such a case is judged by itself, with the noise of the others' peers, apart from its op."""
    before, after = drawn(1), drawn(2, machine=1.3)
    after["records"] = [r for r in after["records"] if r["impl"] == "dla_fast" or r["op"] != "merge"]
    result = compare.compare(before, after, 0.05)
    assert result.alone == 12
    assert not result.regressions()
    merge = [op for op in result.ops if op.op.startswith("merge")]
    assert {op.op for op in merge} == {"merge without peers"}
    assert min(op.least for op in merge) > max(op.least for op in result.ops if op.op == "aggregate")


def test_only_our_own_figures_are_changes():
    after = drawn(2)
    for r in after["records"]:
        if r["impl"] == "compile":
            r.update({name: 2 * r[name] for name in TIMES}, peak_bytes=2**20)
    result = compare.compare(drawn(1, peers=("eager", "compile")), after, 0.05)
    assert result.changes == []


# --- what is no time --------------------------------------------------------------------------------------------------


def test_a_run_equals_itself(capsys, tmp_path):
    a = written(tmp_path / "a.json", drawn(1))
    assert cli.main(["bench", "compare", a, a]) == 0
    out = capsys.readouterr().out
    assert "120 figures compared" in out
    assert "nothing changed beyond noise" in out
    assert "smallest change that these two runs would show" in out


def test_memory_errors_and_what_is_missing():
    before = drawn(1)
    sizes = {"suite": "memory", "case": "dla34", "op": "model", "mode": "training", **dict.fromkeys(TIMES)}
    for impl in ("dla_fast", "eager"):
        before["records"].append(record(impl=impl, peak_bytes=300 * 2**20, saved_bytes=200 * 2**20, **sizes))
    after = copy.deepcopy(before)
    for r in after["records"]:
        # The peer's is none of ours.
        if r["suite"] == "memory":
            r["peak_bytes"] *= 2
            r["saved_bytes"] *= 1.04
    gone = [r for r in after["records"] if r["op"] == "upsample"]
    after["records"] = [r for r in after["records"] if r["op"] != "upsample"]
    after["records"].append({**gone[0], **dict.fromkeys(TIMES), "error": "differ"})
    after["records"].append(record(case="fresh"))
    result = compare.compare(before, after, 0.05)
    assert [(c.what, c.ratio) for c in result.regressions()] == [("peak_bytes", 2.0)]
    assert [r["case"] for r in result.broken] == [gone[0]["case"]]
    assert [r["case"] for r in result.new] == ["fresh"]
    assert {r["op"] for r in result.missing} == {"upsample"}
    assert len(result.missing) == len(gone) - 2
    text = compare_table.render(result, before, {**after, "machine": {"threads": 4}, "versions": {"torch": "3"}})
    assert "not the same machine: threads was 2, is 4" in text
    assert "torch was 2, is 3" in text
    assert "now an error: 1" in text
    assert "  and 2 more" in text
    assert "nothing changed" not in text


def test_a_run_that_has_the_kernels_instruction_set_is_of_the_same_machine():
    run = drawn(0)
    after = {**run, "machine": {**run["machine"], "kernel_isa": "avx512_bf16"}}
    assert "not the same machine" not in compare_table.render(compare.compare(run, after, 0.05), run, after)


def test_an_error_is_a_regression(tmp_path):
    run = drawn(1)
    a = written(tmp_path / "a.json", run)
    run["records"][0] |= {"median_ms": None, "error": "dla_fast and eager differ"}
    assert cli.main(["bench", "compare", a, written(tmp_path / "b.json", run)]) == 1
    # One that was there before is not.
    b = str(tmp_path / "b.json")
    assert cli.main(["bench", "compare", b, b]) == 0


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ([], [record()], "one has no figure (0 and 1)"),
        ([], [], "one has no figure (0 and 0)"),
        ([record()], [record(dtype="bfloat16", threads=4)], "dtype was float32, is bfloat16; threads was 2, is 4"),
        ([record(case="a"), record(case="b")], [record(case="c")], "case was a, b, is c"),
        # The peers alone.
        ([record(), record(impl="eager")], [record(impl="eager")], "none of 2 figures is among the 1"),
    ],
)
def test_runs_without_a_case_in_common(capsys, tmp_path, before, after, why):
    a, b = written(tmp_path / "a.json", {"records": before}), written(tmp_path / "b.json", {"records": after})
    assert cli.main(["bench", "compare", a, b]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"dla_fast bench: {a} and {b} have no case of dla_fast in common: {why}\n"


def test_what_is_missing_is_not_unchanged(capsys, tmp_path):
    """Cases that the second run has not: an op altogether, and two cases of another."""
    run = drawn(1)
    after = copy.deepcopy(run)
    gone = {("merge", "training"): range(6), ("aggregate", "inference"): (1, 3)}
    after["records"] = [r for r in run["records"] if int(r["case"][-1]) not in gone.get((r["op"], r["mode"]), ())]
    a, b = written(tmp_path / "a.json", run), written(tmp_path / "b.json", after)
    assert cli.main(["bench", "compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("ops: "))
    assert lines[head] == "ops: 0 worse, 0 better, 9 unchanged, 1 missing, of 10"
    table = {tuple(line.split()[:2]): line.split()[2:5] for line in lines[head + 3 : head + 13]}
    assert table["merge", "training"] == ["missing", "0", "6"]
    assert table["aggregate", "inference"] == ["-", "4", "2"]
    assert table["upsample", "inference"] == ["-", "6", "-"]
    assert "missing: 16" in lines
    assert "nothing changed beyond noise of what both runs have; 16 figures missing" in lines
    # New cases are none of that.
    assert cli.main(["bench", "compare", b, a]) == 0
    out = capsys.readouterr().out
    assert "new: 16" in out
    assert "missing" not in out


def test_what_a_gpu_run_has():
    """Several dtypes, layouts and backends of one op are told apart, by what they do not have in common."""
    before = {"records": []}
    for dtype in ("float32", "bfloat16"):
        for layout in ("channels_last", "contiguous"):
            for i in range(4):
                same = {"device": "cuda", "dtype": dtype, "layout": layout, "case": f"{layout}.{i}", "op": "merge"}
                before["records"] += [record(impl=impl, **same) for impl in ("dla_fast", "dla_fast:triton", "eager")]
    after = slowed(before, 1.2, impl="dla_fast:triton", dtype="bfloat16", layout="contiguous")
    result = compare.compare(before, after, 0.05)
    assert found(result) == {"merge triton bfloat16 contiguous inference"}
    assert len({op.op for op in result.ops}) == 8


def test_the_tables_are_aligned(capsys, tmp_path):
    a = written(tmp_path / "a.json", drawn(1))
    b = written(tmp_path / "b.json", slowed(slowed(drawn(2), 4, op="merge"), 0.2, op="upsample"))
    assert cli.main(["bench", "compare", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    start = next(i for i, line in enumerate(lines) if line.startswith("ops: 2 worse, 2 better"))
    table = lines[start + 3 : start + 13]
    verdicts = [line.split()[2] for line in table]
    assert verdicts == ["worse"] * 2 + ["-"] * 6 + ["better"] * 2
    assert len({line.index(line.split()[2]) for line in table}) == 1
    assert len({len(line) for line in table}) == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_op_that_takes_longer(monkeypatch, capsys, tmp_path):
    """From the command line to the exit status: a run, a run with an op that really is slower, and the comparison."""
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: cases.Rates(1e10, 1e11))
    options = ["launch", "--peers", "eager", "--modes", "inference", "--rounds", "5", "--seconds", "0.1"]
    a, b = (str(tmp_path / name) for name in ("a.json", "b.json"))
    assert cli.main(["bench", *options, "--json", a]) == 0
    fast = functional.upsample

    def slow(*args):
        time.sleep(0.05)
        return fast(*args)

    monkeypatch.setattr(functional, "upsample", slow)
    assert cli.main(["bench", *options, "--json", b]) == 0
    capsys.readouterr()
    assert cli.main(["bench", "compare", a, b, "--threshold", "5"]) == 1
    out = capsys.readouterr().out
    assert "single figures that stand out, worse: 1" in out
    assert "launch.upsample " in out


@pytest.mark.parametrize("text", ["{", "[]", '{"records": 1}'])
def test_what_is_no_run(capsys, tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert cli.main(["bench", "compare", str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_relative_or_absolute(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "compare", "a.json", "b.json", "--relative", "--absolute"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tail", "degrees", "expected"),
    [(0.025, 4, 2.776), (0.025, 12, 2.179), (0.001, 4, 7.173), (0.001, 10, 4.144), (0.0002, 4, 10.915)],
)
def test_quantiles_of_students_t(tail, degrees, expected):
    """Against the tables; where it is off, on the safe side."""
    assert expected * 0.999 <= noise.quantile(tail, degrees) <= expected * 1.06


def test_records_that_are_none(tmp_path, capsys):
    for content in ([1], [{}], [{"impl": None}]):
        file = written(tmp_path / "a.json", {"records": content})
        assert cli.main(["bench", "compare", str(file), str(file)]) == 2
        assert 'a.json: expected records, objects with an "impl"' in capsys.readouterr().err
