"""Options and files of every command: what cannot be meant is one line and status 2, before anything is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench_helpers import RATES, run

from dla_fast import _starting, cli
from dla_fast.bench import cases, files, report
from dla_fast.commands import bench, demo, tune, verify

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    def measured(*_, **__):
        pytest.fail("something was measured")

    monkeypatch.setattr(bench, "jobs", measured)
    monkeypatch.setattr(demo, "_compare", measured)
    monkeypatch.setattr(tune, "tune", measured)
    monkeypatch.setattr(cases, "measure_rates", measured)


def refused(capsys, *arguments: object) -> str:
    """The one line that a command line ends with."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.startswith(f"dla_fast {arguments[0]}: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("bench --seconds", ["nan", "-1", "0", "inf", "1e400", "x", ""]),
        ("bench --minutes", ["nan", "-1", "0", "inf", "x"]),
        ("bench --threshold", ["nan", "-0.1", "inf", "x"]),
        ("bench --size", ["0", "-1", "7", "33", "1.5", "nan", "99999999"]),
        ("bench --rounds", ["0", "-1", "nan", "1e3"]),
        ("bench --rotate", ["0", "-1", "x"]),
        ("bench --batch", ["0", "-1", "nan", str(2**70)]),
        ("bench --device", ["cpu:1", "meta", "nope", ""]),
        ("demo --device", ["meta", "nope"]),
        ("tune --batch", ["0", "-1", "nan"]),
        ("tune --minutes", ["nan", "0", "inf"]),
    ],
)
def test_numbers(capsys, option, values):
    for value in values:
        command, name = option.split()
        assert name in refused(capsys, command, name, value)


def test_sizes_that_networks_take(capsys):
    assert "the nearest is 64" in refused(capsys, "bench", "memory", "--models", "dla34up", "--size", 63)
    for size, suite in ((63, "nodes"), (7, "necks"), (7, "ops")):
        with pytest.raises(pytest.fail.Exception, match="something was measured"):
            cli.main(["bench", suite, "--size", str(size)])


@pytest.mark.parametrize("option", ["bench --json", "bench --html", "tune --out"])
def test_files_that_cannot_be_written(capsys, option, tmp_path):
    command, name = option.split()
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    file.write_text("mine")
    (tmp_path / "link").symlink_to("/dev/null")
    found = {
        "/dev/null": "no ordinary file",
        pipe: "no ordinary file",
        tmp_path / "link": "no ordinary file",
        tmp_path: "it is a folder",
        "": "it is a folder",
        file / "below.json": "file is no folder",
        tmp_path / ("x" * 300): "too long",
        "a\0b": "null",
        "/proc/nowhere/a.json": "cannot be written",
    }
    for path, why in found.items():
        assert why in refused(capsys, command, name, path).lower(), path
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


@pytest.mark.skipif(os.name == "nt", reason="of POSIX")
def test_files_that_may_not_be_written(monkeypatch, tmp_path):
    file = tmp_path / "run.json"
    file.write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert files.why_not(file) == "it may not be written"
    monkeypatch.undo()
    assert files.why_not(file) is None
    # Where what is printed goes to a file, that file is not replaced.
    monkeypatch.setattr(os, "fstat", lambda number: file.stat())
    assert files.why_not(file) == "what is printed goes there"


def test_one_file_for_two(capsys, tmp_path):
    assert "--json is the same file" in refused(
        capsys, "bench", "--json", tmp_path / "a", "--html", tmp_path / "x" / ".." / "a"
    )


def test_writing_replaces_what_a_link_points_at(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    files.write(link, "new\u00e9")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new\u00e9"
    with pytest.raises(OSError, match="no ordinary file"):
        files.write(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("what", ["--json", "--html"])
def test_a_disk_that_fills_up_is_told_after_the_table(monkeypatch, capsys, tmp_path, what):
    monkeypatch.undo()
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)
    monkeypatch.setattr(cases, "launch_cases", lambda: [cases.Case("tiny", (8, 4), 8, 4, 4)])
    monkeypatch.setattr(report, "render", lambda run: "page")

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write", full)
    file = tmp_path / "run"
    assert run("launch", "--peers", "eager", "--variants", "--modes", "inference", what, file) == 1
    said = capsys.readouterr()
    assert "tiny" in said.out
    assert f"{file}: No space left on device" in said.err
    assert len([line for line in said.err.splitlines() if "bench: " in line]) == 1


# --- interrupts -------------------------------------------------------------------------------------------------------


def test_an_interrupted_verify_shows_what_was_checked(monkeypatch, capsys):
    work = iter([verify.Row("merge", "cpu", "cpu", "float32", 3, 0.5), KeyboardInterrupt()])

    def check(job):
        row = next(work)
        if isinstance(row, BaseException):
            raise row
        return row

    monkeypatch.setattr(verify, "check", check)
    assert cli.main(["verify", "--ops", "merge"]) == 130
    said = capsys.readouterr()
    assert "verify: 1 of 1 hold" in said.out
    assert "verify: interrupted; 1 of " in said.err


INTERRUPTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    {then}
"""


@pytest.mark.parametrize("then", ["raise", "pass  # as some imports do"])
@pytest.mark.parametrize("how", ["module", "script", "library"])
def test_an_interrupt_while_torch_is_imported(tmp_path, how, then):
    """With a torch that is interrupted while it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(INTERRUPTED.format(then=then))
    script = tmp_path / "dla_fast_" / "dla_fast"
    script.parent.mkdir()
    script.write_text("from dla_fast.cli import main\nmain()\n")
    line = {"module": ["-m", "dla_fast", "doctor"], "script": [str(script)], "library": ["-c", "import dla_fast"]}[how]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # Whoever runs the tests in the background has interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if how == "library":
        # Whoever imports the package has the interrupt as ever.
        assert done.returncode not in (0, 130)
        assert "Traceback" in done.stderr
        return
    assert done.returncode == 130
    assert done.stderr == "\ndla_fast: interrupted\n"


def test_the_command_line_takes_interrupts_back(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, _starting._interrupted)
        monkeypatch.setattr(_starting, "_waiting", True)
        with pytest.raises(SystemExit):
            cli.main(["--version"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("argv", "original", "ours"),
    [
        (["-m"], ["python", "-m", "dla_fast", "bench"], True),
        (["-m"], ["python", "-W", "error", "-m", "dla_fast.commands.demo_memory"], True),
        (["-m"], ["python", "-mdla_fast"], True),
        (["-m"], ["python", "-m", "mine", "-m", "dla_fast"], False),
        (["/bin/dla_fast", "bench"], ["python", "/bin/dla_fast", "bench"], True),
        (["train.py"], ["python", "train.py", "-m", "dla_fast"], False),
        ([], [], False),
    ],
)
def test_whose_process_it_is(monkeypatch, argv, original, ours):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert _starting._is_command_line() == ours
