"""``python -m dla_fast``: doctor, demo, what goes wrong, and how the demo measures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dla_fast import _extension, backend, cli, ops
from dla_fast.bench import records
from dla_fast.commands import demo, demo_memory, demo_report, demo_setup, doctor
from dla_fast.proof import machine, measure

ROOT = Path(__file__).resolve().parents[1]
LAST_LINE = re.compile(
    r"demo: swapped (\d+) units, max logit difference (\d\.\de[+-]\d\d), "
    r"network (\d+\.\d\d)x \(frozen (\d+\.\d\d)x\), training step (\d+\.\d\d)x, "
    r"saved for backward (\d+\.\d\d)x(; .+)?"
)
TINY = ["demo", "--batch", "2", "--size", "64", "--runs", "1", "--device", "cpu"]


@pytest.fixture
def demo_extras(timm):
    """The demo's packages, with a timm that imports here."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    return timm


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Nothing here needs two, and on a busy machine threads that wait for each other take seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_subprocesses(monkeypatch):
    """Peak memory without the two processes of its own, which take seconds."""
    fake = iter([{"peak": 200, "step": step} for step in (100, 90, 50, 45)])
    monkeypatch.setattr(measure, "in_fresh_process", lambda module, arguments, **_: dict(next(fake)))


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_serves_what(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for op in backend.OPS:
        (chosen,) = [c.backend for c in backend.explain(op) if c.chosen]
        assert f"{op} on cpu: {chosen}\n" in out


def test_doctor_json(capsys, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["environment"]["MAX_JOBS"] == "3"
    assert {entry["op"] for entry in facts["backend"]["table"]} == set(backend.OPS)
    assert facts["backend"]["table"][0]["backends"]["reference"] is None


def test_doctor_tells_the_instruction_set_of_the_kernels(capsys, monkeypatch):
    if _extension.STATUS.loaded:
        from dla_fast import _C

        assert cli.main(["doctor"]) == 0
        assert f"instruction set  {_C.cpu_isa()}\n" in capsys.readouterr().out
    monkeypatch.setattr(_extension, "STATUS", dataclasses.replace(_extension.STATUS, loaded=False))
    assert cli.main(["doctor"]) == 0
    assert f"instruction set  {torch.backends.cpu.get_cpu_capability()} (of torch)\n" in capsys.readouterr().out


def test_doctor_shows_a_forced_backend_that_cannot_run(capsys):
    reason = backend.can_run("cuda", "upsample", "cpu", torch.float32)
    assert reason is not None
    with backend.use_backend("cuda"):
        assert cli.main(["doctor"]) == 0
    assert f"upsample on cpu: none, calls raise; cuda is forced: {reason}" in capsys.readouterr().out


def test_doctor_tells_of_the_cuda_kernels(monkeypatch, capsys):
    status = _extension.STATUS
    without = dataclasses.replace(status, has_cuda=False, cuda_reason="the CUDA kernels were not built: no nvcc")
    monkeypatch.setattr(_extension, "STATUS", without)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CUDA kernels   no: no nvcc" in out
    assert "DLA_FAST_BUILD_CUDA=1 pip install" in out
    built = dataclasses.replace(status, has_cuda=True, cuda_architectures=("8.0", "9.0", "10.0+PTX"))
    monkeypatch.setattr(_extension, "STATUS", built)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CUDA kernels   for compute capability 8.0, 9.0, 10.0+PTX" in out
    assert "DLA_FAST_BUILD_CUDA" not in out


def test_every_command_names_the_processor_alike():
    facts, recorded = doctor.collect()["cpu"], records.machine_facts(torch.device("cpu"), {})
    where = demo_report.machine({"task": {"device": "cpu"}, "serves": {}})
    assert f"with {facts['instruction set']};" in where
    assert records.instruction_set(recorded) == facts["instruction set"]
    assert recorded["cpu"] == facts["name"]


def test_doctor_says_once_why_there_is_no_extension(capsys):
    unloaded = "no compiler was found"
    entry = {"op": "merge", "device": "cpu", "serves": "reference", "backends": {"cpu": unloaded, "triton": "no GPU"}}
    lines = doctor._serving(entry, unloaded)
    assert "the C++ extension is not loaded, see above" in lines[1]
    assert "no GPU" in lines[2]


def test_help_has_no_default_where_the_text_explains_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    out = capsys.readouterr().out
    assert "(default: None)" not in out
    assert "samples of each peer (default: 15)" in " ".join(out.split())


@pytest.mark.parametrize("broken", ["_cuda_devices", "cpu_name", "instruction_set", "_version", "explain"])
def test_doctor_survives_what_is_broken(capsys, monkeypatch, broken):
    def fail(*_):
        raise OSError("it is broken")

    homes = {"explain": backend, "cpu_name": machine, "instruction_set": machine}
    monkeypatch.setattr(homes.get(broken, doctor), broken, fail)
    assert cli.main(["doctor"]) == 0
    assert "OSError: it is broken" in capsys.readouterr().out


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["nope"], ["doctor", "--nope"]])
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_lists_the_commands_and_imports_none(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("doctor", "verify", "demo", "bench"))


def test_interrupt_is_one_line_and_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ndla_fast doctor: interrupted\n"


def test_a_reader_that_leaves_is_no_traceback():
    line = f"{sys.executable} -m dla_fast doctor | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""


# --- demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    """As where the extension was not built: nothing but the reference serves the CPU."""
    monkeypatch.setattr(backend._default, "name", "auto")
    monkeypatch.delenv("DLA_FAST_DISABLE", raising=False)
    monkeypatch.setitem(ops._missing, ("cpu", "conv_norm_act"), "the C++ extension was not built: no compiler")
    monkeypatch.setitem(backend._chosen, ("conv_norm_act", "cpu"), "reference")


@pytest.fixture
def measured(monkeypatch):
    """The demo's figures without the minutes that they take; who serves is found out as ever."""
    pair = {"before": 2.0, "after": 1.0}
    each = {"level2.root": pair, "level2.tree1": {"before": 1.0, "after": 1.25}}
    rows = [demo_setup.LOGITS, "gradients, training, float64", "gradients, training, float32"]

    def compare(args, task, stages):
        result = {
            "task": dataclasses.asdict(task),
            "layouts": {"NCHW": 3.0, "channels_last": 2.0},
            "swapped": ["level2.root", "level2.tree1"],
            "counts": {"nodes": 1, "ladders": 0, "blocks": 1, "convs": 0},
            "frozen": {"units": 3, "bytes": 2**20},
            "serves": {},
            "reference": demo._reference("cpu"),
            "difference": {row: {"relative": 1e-7, "absolute": 1e-6, "PyTorch alone": 2e-7} for row in rows},
            "saved for backward": pair,
            "ms": dict.fromkeys(demo_report._TIMES, pair)
            | {f"each of the units, {how}": each for how in ("inference", "forward and backward")},
            "peak": {name: {"peak": 3, "step": 1} for name in pair},
        }
        logits = torch.randn(2, 10)
        tensors = {f"logits {name}": logits + 1e-7 for name in ("after", "PyTorch alone")}
        return result, {"photographs": torch.zeros(2, 3, 8, 8), "logits before": logits, **tensors}

    monkeypatch.setattr(demo, "_compare", compare)


def test_demo(demo_extras, capsys, tmp_path):
    picture = tmp_path / "demo.png"
    unasked = demo_report.failed({"reference": demo._reference("cpu")})
    assert cli.main([*TINY, "--out", str(picture)]) == unasked
    lines = capsys.readouterr().out.splitlines()
    match = LAST_LINE.fullmatch(lines[-1])
    assert match is not None, lines[-1]
    said = "\n".join(lines)
    assert f"swapped {match[1]} units (6 nodes, 12 blocks, 7 convs): base_layer, level0, " in said
    assert float(match[2]) < 1e-5
    assert "level4.tree2.root" in said
    # The network first.
    titles = [line for line in lines if re.match(r"  (network|units), ", line)]
    assert [line[2:36].rstrip() for line in titles] == [*demo_report._TIMES]
    assert titles[0].split()[-1] == f"{match[3]}x"
    assert titles[1].split()[-1] == f"{match[4]}x"
    assert ", since the network as it is runs faster so: " in lines[1]
    if not unasked:
        assert re.search(r"frozen: 37 convolutions, \d+\.\d MiB of folded norms", said)
        assert "  logits, frozen, float32" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_on_a_reference_that_nobody_asked_for_fails(demo_extras, no_kernels, no_subprocesses, capsys, tmp_path):
    assert cli.main([*TINY, "--model", "dla46_c", "--out", str(tmp_path / "demo.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    why = "cpu: the C++ extension was not built: no compiler"
    assert lines[0] == f"FAILED: on the PyTorch reference, though nobody asked for it: {why}"
    match = LAST_LINE.fullmatch(lines[-1])
    assert match is not None, lines[-1]
    assert match[7] == "; FAILED: on the reference, unasked"


def test_demo_tells_a_program_and_the_picture_too(demo_extras, no_kernels, measured, capsys, tmp_path):
    picture = tmp_path / "demo.svg"
    assert cli.main([*TINY, "--json", "--out", str(picture)]) == 1
    why = "cpu: the C++ extension was not built: no compiler"
    assert json.loads(capsys.readouterr().out)["reference"] == {"asked for": False, "reason": why}
    # matplotlib draws letters as paths, with the line that they make in a comment.
    assert "FAILED: on the PyTorch reference, though nobody asked for it" in picture.read_text()


@pytest.mark.parametrize(
    ("variables", "asks"),
    [
        ({"DLA_FAST_DISABLE": "1"}, "DLA_FAST_DISABLE=1"),
        ({"DLA_FAST_BACKEND": "reference"}, "DLA_FAST_BACKEND=reference"),
        ({}, "use_backend('reference')"),
    ],
)
def test_demo_on_a_reference_that_was_asked_for(
    demo_extras, no_kernels, measured, monkeypatch, capsys, tmp_path, variables, asks
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend._default, "name", "reference")
    assert cli.main([*TINY, "--out", str(tmp_path / "demo.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"on the PyTorch reference, as {asks} asks: no kernel of dla_fast ran"
    assert lines[-1].endswith("saved for backward 0.50x; on the reference, as asked")
    # What got slower is told, by name.
    assert "slower than before by themselves, inference: level2.tree1 0.80x" in lines


def test_demo_names_the_photographs_and_what_pytorch_alone_changes(demo_extras, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_reference", lambda device: None)
    picture = tmp_path / "demo.svg"
    assert cli.main([*TINY, "--out", str(picture)]) == 0
    svg = picture.read_text()
    for said in ("two sample photographs, china.jpg and flower.jpg", "PyTorch alone, NCHW/channels_last", "swap_",
                 "channels_last, since the network as it is runs faster so: 2 ms"):  # fmt: skip
        assert said in svg
    assert "FAILED" not in svg


def test_demo_json(demo_extras, no_subprocesses, capsys, tmp_path):
    out = ["--out", str(tmp_path / "demo.svg")]
    unasked = demo_report.failed({"reference": demo._reference("cpu")})
    assert cli.main([*TINY, "--json", "--channels-last", "--model", "dla46_c", *out]) == unasked
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["nodes"] == 6
    assert sum(result["counts"].values()) == len(result["swapped"])
    assert result["layouts"] is None
    assert result["difference"]["gradients, training, float64"]["relative"] < 1e-6
    assert result["task"]["channels_last"] is True
    for how in ("inference", "forward and backward"):
        assert set(result["ms"][f"each of the units, {how}"]) == set(result["swapped"])
    if sys.platform == "linux":
        assert result["peak"]["after"] == {"peak": 200, "step": 50, "step, unfragmented": 45}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18"], "--model resnet18: expected a DLA of timm"),
        (["--size", "8"], "--size 8: expected at least 32"),
        (["--size", "50"], "--size 50: expected a multiple of 32"),
        (["--batch", "1", "--size", "32"], "more than one value per channel"),
        (["--device", "nope"], "--device nope:"),
        (["--out", "demo.txt"], "--out demo.txt: expected a file ending in"),
        (["--out", "/nowhere/demo.png"], "--out /nowhere/demo.png: there is no folder /nowhere"),
    ],
)
def test_demo_bad_options(demo_extras, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("dla_fast demo: ")
    assert message in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("faster", ["NCHW", "channels_last"])
def test_demo_takes_the_layout_in_which_the_stock_network_is_faster(monkeypatch, demo_extras, faster):
    asked = []

    def interleave(steps, **_):
        asked.extend(steps)
        return {key: measure.Timing(*[1.0 if key[0] == faster else 2.0] * 3) for key in steps}

    monkeypatch.setattr(measure, "interleave", interleave)
    task = demo_setup.Task("dla46_c", 2, 64, "cpu", channels_last=faster == "NCHW", pretrained=False)
    chosen, ms = demo._faster_layout(task, demo_setup.make_model(task))
    assert chosen.channels_last == (faster == "channels_last")
    assert ms[faster] == 2.0
    assert len(asked) == 4


def test_demo_weights_that_cannot_be_fetched(demo_extras, capsys, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(demo_extras, "create_model", offline)
    assert cli.main([*TINY, "--pretrained", "--out", str(tmp_path / "demo.png")]) == 1
    message = "dla_fast demo: --pretrained: the weights could not be fetched: no route to host\n"
    assert capsys.readouterr().err == message


def test_demo_without_its_extras(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("timm", "sklearn") else real(name))
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dla_fast demo: timm, scikit-learn not installed: pip install timm scikit-learn")
    assert err.count("\n") == 1


def test_peak_memory_in_a_process_of_its_own(demo_extras):
    task = demo_setup.Task("dla46_c", 2, 64, "cpu", channels_last=False, pretrained=False)
    found = measure.in_fresh_process("dla_fast.commands.demo_memory", demo_memory.arguments(task, swapped=True))
    assert 0 < found["step"] < found["peak"]
    with pytest.raises(RuntimeError, match="demo_memory failed with exit status 2: .*--model"):
        measure.in_fresh_process("dla_fast.commands.demo_memory", [])


# --- measuring --------------------------------------------------------------------------------------------------------


def test_interleave_calls_in_turn(monkeypatch):
    calls = []
    rounds = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = measure.interleave(fns, rounds=3, warmup=2, min_sample_ms=0, progress=lambda: rounds.append(1))
    assert "".join(calls[6:]) == "ab" + "ba" + "ab"
    assert len(rounds) == 3
    assert list(times) == ["a", "b"]
    assert all(0 <= t.p20_ms <= t.median_ms <= t.p80_ms for t in times.values())
    slept = []
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    measure.interleave(fns, rounds=3, warmup=2, min_sample_ms=0, pause_s=0.5)
    assert slept == [0.5] * 6
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure.interleave(fns, rounds=0)


def test_interleave_repeats_what_is_short():
    count = 0

    def short() -> None:
        nonlocal count
        count += 1

    measure.interleave({"short": short}, rounds=2, warmup=0, min_sample_ms=0.5)
    assert count > 20


def test_summarise():
    assert measure.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == measure.Timing(3.0, 1.8, 4.2)
    assert measure.summarise([7.0]) == measure.Timing(7.0, 7.0, 7.0)


def test_saved_bytes_counts_storages_once():
    x = torch.randn(16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * weight  # saves x and weight, which are excluded
        y = y.exp()  # saves its output
        return y.view(4, 4).sin().sum()  # saves a view of the same storage

    assert measure.saved_bytes(forward, exclude=[x, weight]) == 16 * 4
    assert measure.saved_bytes(forward) == 3 * 16 * 4


def test_photographs_are_the_same_every_time(demo_extras):
    first, second = demo_setup.photographs(3, 32), demo_setup.photographs(3, 32)
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, second)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first[0], first[2])
