"""benchmarks.gpu without a GPU: the same program on the CPU's kernels, and what remains when something goes wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import rehearsal, report
from benchmarks.gpu import run as running
from benchmarks.gpu.blocks import BLOCKS
from benchmarks.gpu.case import Setting
from dla_fast import backend, cli

HERE = Path(__file__).resolve().parent
needs_extension = pytest.mark.skipif(
    backend.can_run("cpu", "aggregate", "cpu", torch.float32) is not None, reason="extension not built"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(folder: Path, *arguments: object, blocks=tuple(BLOCKS)) -> tuple[int, dict]:
    status = gpu.main(
        ["--device", "cpu", "--small", "--out", str(folder), "--blocks", *blocks, *map(str, arguments)]
    )  # fmt: skip
    return status, json.loads((folder / "gpu.json").read_text())


def labels(data: dict, block: str, ok: bool = True) -> list[str]:
    return sorted(c["check"] for c in data["checks"] if c["block"] == block and c["ok"] == ok)


@needs_extension
@needs_triton
def test_on_the_cpu(tmp_path, capsys):
    blocks = ["roots", "nodes", "bandwidth", "rest"]
    status, data = run(tmp_path, "--minutes", 12, "--patience", 8, blocks=blocks)
    out = capsys.readouterr().out
    assert status == 0, out
    assert data["complete"], data["left_out"]
    assert all(c["ok"] for c in data["checks"])
    assert {c["block"] for c in data["checks"]} == {"roots", "rest"}
    assert {r["op"] for r in data["records"]} == {"merge", "upsample", "aggregate"}
    assert all(r["median_ms"] > 0 and r["floor_ms"] > 0 for r in data["records"])
    assert data["tables"][0]["rows"]
    assert {f["figure"] for f in data["figures"]} >= {"host cost of a inference node", "tail cpu float32 contiguous"}
    assert [row["block"] for row in data["timetable"]] == blocks
    goals = {g["what"]: g for g in data["goals"]}
    assert goals["aggregate inference: slowest shape over eager"]["value"] > 0
    assert goals["upsample_add over eager"]["met"] is None
    assert "goal upsample_add over eager >= 3: not measured" in out
    # What was missed is told, and nothing that is wrong.
    assert any(g["met"] is False for g in data["goals"])
    assert "kernels of a training node" in (tmp_path / "gpu.txt").read_text()


def test_goals():
    """Against the fastest of the compiled peers, at the batch they are set for, where memory decides."""

    def record(impl, case, batch, median, floor):
        shape = {"op": "aggregate", "mode": "inference", "dtype": "bfloat16", "bytes": 100.0, "side": 7}
        return {**shape, "case": case, "batch": batch, "impl": impl, "median_ms": median, "floor_ms": floor}

    times = {"dla_fast": 1.0, "eager": 3.0, "compile": 2.0, "compile_frozen": 1.5}
    records = [record(impl, "root", 256, t, 0.9) for impl, t in times.items()]
    records += [record(impl, "deep", 256, 2 * t, 1.0) for impl, t in times.items()]
    records += [record("dla_fast", "root", 1, 1.0, 0.1), record("eager", "root", 1, 0.5, 0.1)]
    figure = {"figure": "host cost of a inference node", "value": 12.0, "unit": "us", "op": "host"}
    data = {"records": records, "figures": [figure], "compilations": [{"kernel": "k"}]}
    goals = {g["what"]: (g["value"], g["met"]) for g in report.goals(data)}
    assert goals["aggregate inference over eager, batch 256"] == (pytest.approx(3.0), True)
    assert goals["aggregate inference over compiled, batch 256"] == (pytest.approx(1.5), False)
    assert goals["aggregate inference: slowest shape over eager"] == (pytest.approx(0.5), False)
    memory = "aggregate inference, batch 256, memory-bound: share of the floor"
    assert goals[memory] == (pytest.approx(0.9), True)
    assert goals["aggregate training over eager, batch 256"] == (None, None)
    assert goals["host cost of an inference node, us"] == (12.0, False)
    assert goals["compilations inside timed cases"] == (1.0, False)


def go_wrong(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(running, "CHILD", "dying_blocks")
    path = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    patch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture
def dying(monkeypatch):
    go_wrong(monkeypatch)


WRONG = ("roots", "checks", "nodes", "networks", "bandwidth")


@pytest.fixture(scope="module")
def went_wrong(tmp_path_factory):
    """A run in which every block has a case that goes wrong in its own way: folder, status, and what it found."""
    folder = tmp_path_factory.mktemp("went_wrong")
    with pytest.MonkeyPatch.context() as patch:
        go_wrong(patch)
        return folder, *run(folder, "--minutes", 3, "--patience", 0.2, blocks=WRONG)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pid: int) -> None:
    until = time.time() + 10
    while alive(pid) and time.time() < until:
        time.sleep(0.1)
    assert not alive(pid)


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def test_a_failure_costs_the_case_it_happened_in(went_wrong):
    folder, status, data = went_wrong
    assert status == 1
    failed = {c["check"]: c["detail"] for c in data["checks"] if not c["ok"]}
    assert failed["raises"] == "RuntimeError: a case that raises"
    assert "ended with 11, in dies" in failed["dies"]
    assert "illegal memory access" in failed["loses the device"]
    assert "many times what it should take, in hangs" in failed["hangs"]
    # What came before and behind was done, in each of them.
    for block in WRONG:
        assert labels(data, block) == [f"{block} first", f"{block} last"], block
    assert "FAILED checks: dies" in (folder / "gpu.txt").read_text()
    # A case that hangs is ended with everything it had started.
    wait_until_gone(child_of(folder / "cache" / "processes" / "networks-0-1.log"))
    assert not data["left_out"]


def test_a_run_is_continued(went_wrong, dying, monkeypatch, tmp_path, capsys):
    folder = went_wrong[0]
    monkeypatch.setenv("DYING_BLOCKS", "mended")
    more = ["--minutes", 3, "--continue", folder / "gpu.json"]
    status, data = run(tmp_path / "second", *more, blocks=WRONG)
    assert status == 0, capsys.readouterr().out
    assert all(c["ok"] for c in data["checks"])
    # What went well is kept and not done again, what went wrong is replaced.
    assert sorted(c["check"] for c in data["checks"]) == sorted(
        [f"{block} {part}" for block in WRONG for part in ("first", "last")]
        + ["raises", "dies", "loses the device", "hangs"]
    )
    again = "".join(path.read_text() for path in (tmp_path / "second" / "cache" / "processes").glob("roots-*.lines"))
    assert "raises" in again
    assert "roots first" not in again
    assert len(data["records"]) == 2
    assert data["continues"]["date"]
    again = cli.main(["bench", "compare", str(folder / "gpu.json"), str(tmp_path / "second" / "gpu.json")])
    assert again == 0
    (tmp_path / "no.json").write_text('{"records": []}')
    assert gpu.main(["--device", "cpu", "--continue", str(tmp_path / "no.json")]) == 2
    assert "no run of benchmarks.gpu, it lacks checks" in capsys.readouterr().err


def test_compare_reads_its_records(went_wrong, tmp_path, capsys):
    path = went_wrong[0] / "gpu.json"
    assert cli.main(["bench", "compare", str(path), str(path)]) == 0
    assert "2 figures compared" in capsys.readouterr().out
    slower = json.loads(path.read_text())
    for record in slower["records"]:
        if record["impl"] == "dla_fast":
            record |= {k: 2 * record[k] for k in ("median_ms", "p20_ms", "p80_ms")}
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert cli.main(["bench", "compare", str(path), str(tmp_path / "slower.json")]) == 1


def test_time_that_is_up(dying, tmp_path):
    # The hanging case may take long, but its block's time is over.
    status, data = run(tmp_path, "--minutes", 0.2, "--grace", 1, "--patience", 100, blocks=["networks", "rest"])
    assert status == 1
    assert not data["complete"]
    assert "networks: what comes after hangs" in data["left_out"]
    assert labels(data, "networks") == ["networks first"]
    assert labels(data, "networks", ok=False) == ["hangs"]
    wait_until_gone(child_of(tmp_path / "cache" / "processes" / "networks-0-1.log"))
    status, data = run(tmp_path / "none", "--minutes", 0, blocks=["rest"])
    assert data["left_out"] == ["rest: rest first", "rest: rest last"]


def test_an_interruption_keeps_what_is_done(dying, tmp_path):
    """SIGTERM, as from a time limit, while a case hangs: whole JSON, and nothing left running."""
    code = "from benchmarks.gpu import run; run.CHILD = 'dying_blocks'; from benchmarks.gpu.__main__ import main; "
    command = f"import sys; {code} sys.exit(main(sys.argv[1:]))"
    arguments = ["--device", "cpu", "--small", "--minutes", "3", "--patience", "100", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments, "--blocks", "rest", "networks"],
        cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, until = tmp_path / "cache" / "processes" / "networks-0-1.log", time.time() + 60
    while not (log.exists() and log.read_text()) and time.time() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "what was done is kept" in err
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert labels(data, "rest") == ["rest first", "rest last"]
    assert labels(data, "networks") == ["networks first"]
    assert not data["complete"]
    wait_until_gone(child_of(log))


def test_processes_end_with_a_run_that_was_killed(dying, tmp_path):
    code = "from benchmarks.gpu import run; run.CHILD = 'dying_blocks'; from benchmarks.gpu.__main__ import main; "
    command = f"import sys; {code} sys.exit(main(sys.argv[1:]))"
    arguments = ["--device", "cpu", "--small", "--minutes", "3", "--patience", "100", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments, "--blocks", "networks"],
        cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log, until = tmp_path / "cache" / "processes" / "networks-0-1.log", time.time() + 60
    while not (log.exists() and log.read_text() and (tmp_path / "gpu.json").exists()) and time.time() < until:
        time.sleep(0.1)
    process.kill()
    process.wait()
    wait_until_gone(child_of(log))
    assert labels(json.loads((tmp_path / "gpu.json").read_text()), "networks") == ["networks first"]


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert "no CUDA device was found, so nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_a_build_that_fails_is_a_record(dying, monkeypatch, tmp_path):
    """The blocks go on with what there is, Triton's kernels above all."""
    monkeypatch.setattr(running, "BUILD", [sys.executable, "-c", "raise SystemExit('no compiler here')"])
    monkeypatch.setenv("DYING_BLOCKS", "mended")
    status, data = run(tmp_path, "--minutes", 2, blocks=["build", "roots", "bandwidth"])
    assert status == 1
    assert "no compiler here" in next(c["detail"] for c in data["checks"] if c["block"] == "build")
    assert labels(data, "roots") == ["raises", "roots first", "roots last"]
    assert len(data["records"]) == 2


def test_a_build_that_hangs_is_ended(dying, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "BUILD", [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(running, "BUILD_SECONDS", 2.0)
    monkeypatch.setenv("DYING_BLOCKS", "mended")
    _, data = run(tmp_path, "--minutes", 2, blocks=["build", "bandwidth"])
    assert data["checks"][0]["detail"].startswith("out of time")
    assert labels(data, "bandwidth") == ["bandwidth first", "bandwidth last"]


@pytest.mark.parametrize("small", [False, True])
def test_every_block_lists_its_cases(small):
    for device in ("cpu", "meta"):
        for block in BLOCKS.values():
            found = [case.label for case in block.cases(Setting(torch.device(device), small))]
            assert found
            assert len(set(found)) == len(found), block.name


def test_timetable():
    compiled = [rehearsal.Compiled(name, 100, 100, 160.0, 4.0, []) for name in BLOCKS]
    rows = {row.what: row for row in rehearsal.timetable(compiled, 16)}
    roots, checks, nodes = (rows[BLOCKS[name].title] for name in ("roots", "checks", "nodes"))
    build = rows["build of the extension, beside the compiling"]
    assert roots.begins < build.ends <= checks.begins
    assert nodes.begins >= checks.ends
    # Fewer cores make everything later.
    slow = {row.what: row for row in rehearsal.timetable(compiled, 4)}
    assert slow[BLOCKS["nodes"].title].ends > nodes.ends


LEFT_OUT = """
import sys
import torch
from benchmarks.gpu import draw, warm
from dla_fast import functional

def call():
    xs = [torch.empty(2, 32, 16, 16, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    w, v = torch.empty(32, 64, 1, 1, device="meta", dtype=torch.bfloat16), torch.empty(32, device="meta")
    functional.aggregate(xs, w, v, v, v, v, training=True)

if __name__ == "__main__":
    jobs = draw.jobs_of(call, 90)
    pool = warm.Pool(90, 1)
    made = [future.result() for future in pool.submit(jobs[:-1], lambda made: None)]
    pool.close()
    assert not any(m.error for m in made), made
    warm.start(90, warm.has_library())
    print(len(jobs), *[warm.make(job).found for job in jobs])
"""


@needs_triton
def test_a_kernel_that_was_not_compiled_beforehand_is_noticed(tmp_path):
    """All but one specialisation are compiled; another process finds those, launchers included, and misses the one."""
    (tmp_path / "left_out.py").write_text(LEFT_OUT)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "left_out.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["3", "True", "True", "False"]


def test_what_is_quoted_does_not_tell_where_the_checkout_lies(tmp_path):
    collected = report.Collected(tmp_path / "gpu.json", "cpu")
    found = {"check": "a", "ok": False, "detail": f'File "{HERE.parent / "dla_fast" / "nn.py"}", line 3'}
    collected.add({"record": found, "label": "a", "block": "checks"})
    assert str(HERE.parent) not in json.dumps(collected.save(complete=True)["checks"])
    assert "dla_fast" in found["detail"]
