"""Training: what a run writes, how it goes on, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_helpers import CLASSES, TINY, colours, curve, train

from dla_fast import tasks
from dla_fast.tasks import DataError, TaskError, checkpoints, engine, logs, options, running, weights
from dla_fast.tasks.processes import Processes

HERE = Path(__file__).resolve().parent
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory, timm):
    return colours(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nothing disturbed, and what it said."""
    run, lines = tmp_path_factory.mktemp("runs") / "whole", []
    found = train(data, run, lines=lines)
    return run, found, lines


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}


def test_what_a_run_leaves(whole):
    run, found, lines = whole
    assert len(curve(run)) == STEPS
    epochs = logs.rows(run / logs.EPOCHS)
    assert [row["step"] for row in epochs] == ["3", "6"]
    assert float(epochs[1]["top-1"]) == found.metrics["top-1"]
    losses = [float(row[2]) for row in curve(run)]
    assert float(epochs[0]["loss"]) == pytest.approx(sum(losses[:3]) / 3)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000004.pth", "step-00000006.pth"]
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text())["task"] == "classification"
    assert lines[-1].startswith("epoch 2/2: loss ")
    facts = weights.facts_of(run / weights.FILE)
    assert (facts.task, facts.model, facts.classes) == ("classification", "dla46_c", list(CLASSES))
    assert (run / weights.FILE).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_tensorboard_has_the_same(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[0] / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([float(r[2]) for r in curve(whole[0])])
    assert events.Scalars("evaluation/top-1")[-1].value == pytest.approx(whole[1].metrics["top-1"])


def test_the_same_again_and_another_seed_differs(data, whole, tmp_path):
    train(data, tmp_path / "again")
    assert curve(tmp_path / "again") == curve(whole[0])
    train(data, tmp_path / "other", seed=1, epochs=1)
    assert curve(tmp_path / "other")[0][2] != curve(whole[0])[0][2]


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_it_is_the_uninterrupted_run(data, tmp_path):
    command = [sys.executable, str(HERE / "killed_training.py"), str(data), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_truncated_checkpoint_is_noticed_and_the_one_before_taken(data, whole, tmp_path, capsys):
    run, lines = tmp_path / "run", []
    train(data, run)
    newest = run / "checkpoints" / "step-00000006.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(data, run, resume=True, lines=lines)
    assert "a damaged checkpoint" in capsys.readouterr().err
    assert lines[0] == "going on from step 4, epoch 2"
    assert curve(run) == curve(whole[0])
    assert len(logs.rows(run / logs.EPOCHS)) == 2
    checkpoints.read(newest)


def test_a_run_that_had_ended(data, whole):
    lines = []
    assert train(data, whole[0], resume=True, lines=lines) is None
    assert len(curve(whole[0])) == STEPS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_step_and_the_run_goes_on(data, whole, tmp_path, monkeypatch, number):
    run, lines = tmp_path / "run", []
    original = engine.Trainer._step

    def stepping(self, items):
        if self.step == 4:
            os.kill(os.getpid(), number)
        return original(self, items)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patches:
            patches.setattr(engine.Trainer, "_step", stepping)
            with pytest.raises(KeyboardInterrupt):
                train(data, run, lines=lines)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert lines[-1] == f"interrupted after step 5, which is saved: --resume {run} goes on"
    train(data, run, resume=True, lines=lines)
    assert "going on from step 5, epoch 2" in lines
    assert curve(run) == curve(whole[0])


def test_a_run_is_not_overwritten_nor_resumed_with_other_options(data, whole, tmp_path):
    with pytest.raises(TaskError, match=f"--out {whole[0]}: there is a run already; --resume"):
        train(data, whole[0])
    with pytest.raises(TaskError, match=r"--lr 0.5: the run was begun with 0.003, and goes on with that"):
        train(data, whole[0], resume=True, lr=0.5)
    with pytest.raises(TaskError, match="no run to go on with"):
        train(data, tmp_path / "absent", resume=True)
    with pytest.raises(TaskError, match="it is no run of fine-grained"):
        train(data, whole[0], resume=True, task="fine-grained")


def test_the_reference_starts_with_the_same_loss(data, whole, tmp_path):
    run = tmp_path / "run"
    train(data, run, backend="reference")
    # Rounding differs, is magnified by norms over six values and grows with every step: the first is alike. The
    # reference's own two memory formats differ by 7e-5 of it, the two backends by 1.3e-4.
    first, other = (float(curve(each)[0][2]) for each in (run, whole[0]))
    assert first == pytest.approx(other, rel=1e-3)
    assert curve(run)[-1] != curve(whole[0])[-1]


@pytest.mark.parametrize(
    "given",
    [{"ema": 0.9}, {"amp": "bfloat16"}, {"optimizer": "sgd", "schedule": "poly", "warmup_epochs": 1}]
    + [{"clip_grad": 1.0, "smoothing": 0.1, "schedule": "step", "decay_epochs": 1, "memory": "low"}],
    ids=str,
)
def test_options_of_training_go_on_where_they_were(data, tmp_path, given):
    run, lines = tmp_path / "run", []
    train(data, run, **given)
    expected, saved = curve(run), (run / weights.FILE).read_bytes()
    (run / "checkpoints" / "step-00000006.pth").unlink()
    train(data, run, resume=True, lines=lines)
    assert "going on from step 4, epoch 2" in lines
    assert curve(run) == expected
    assert (run / weights.FILE).read_bytes() == saved


def test_the_learning_rate_of_a_poly_schedule(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, schedule="poly", lr=0.01)
    assert [float(row[3]) for row in curve(run)] == pytest.approx([0.01 * (1 - i / 6) ** 0.9 for i in range(6)])


def test_a_loss_that_is_no_number_ends_the_run(data, tmp_path):
    with pytest.raises(TaskError, match=r"the loss is (nan|inf) at step \d+; a smaller --lr"):
        train(data, tmp_path / "run", optimizer="sgd", lr=1e30, epochs=3)


def test_fewer_images_than_a_batch(data, tmp_path):
    with pytest.raises(DataError, match=r"--batch 19: the training split of .* has 18 images"):
        train(data, tmp_path / "run", batch=19)
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_named_and_skipped_or_an_error(tmp_path, capsys, timm):
    data = colours(tmp_path / "data")
    broken = [data / split / "light" / "3.png" for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"light/3\.png: no readable image: .*--broken skip"):
        train(data, tmp_path / "first")
    found = train(data, tmp_path / "second", broken="skip", workers=1)
    said = capsys.readouterr().err
    assert all(said.count(f"skipped: {path}") == 1 for path in broken)
    assert found.images == 17
    assert len(curve(tmp_path / "second")) == STEPS


def test_starting_from_weights_with_a_new_head(data, whole, tmp_path):
    two = colours(tmp_path / "data")
    for split in ("train", "val"):
        for path in (two / split / "red").iterdir():
            path.unlink()
        (two / split / "red").rmdir()
    lines = []
    train(two, tmp_path / "run", task="fine-grained", weights=str(whole[0]), epochs=1, lr=1e-6, lines=lines)
    assert "2 drawn anew: fc.weight, fc.bias" in lines[0]
    with pytest.raises(TaskError, match="--weights .*absent"):
        train(two, tmp_path / "other", weights=str(tmp_path / "absent"))


def test_evaluating_the_saved_weights_gives_the_figure_again(data, whole):
    task = tasks.get("classification")
    for source in (whole[0], whole[0] / weights.FILE, whole[0] / "checkpoints" / "step-00000006.pth"):
        found, tells = running.evaluate(task, {"batch": 7, "workers": 1}, source)
        assert tells
        if source.suffix != ".pth":
            best = max(float(row["top-1"]) for row in logs.rows(whole[0] / logs.EPOCHS))
            assert found.metrics["top-1"] == best
        else:
            assert found.metrics == whole[1].metrics


def test_weights_that_do_not_belong(data, whole, tmp_path):
    with pytest.raises(TaskError, match="it is a network of classification, not of fine-grained"):
        running.evaluate(tasks.get("fine-grained"), {}, whole[0])
    with pytest.raises(TaskError, match="there is no such file"):
        running.evaluate(tasks.get("classification"), {}, tmp_path / "absent")
    cut = tmp_path / weights.FILE
    cut.write_bytes((whole[0] / weights.FILE).read_bytes()[:1000])
    with pytest.raises(TaskError, match="no readable safetensors file"):
        running.evaluate(tasks.get("classification"), {}, cut)


def test_weights_from_elsewhere_need_a_name(data, whole, tmp_path):
    task, path = tasks.get("classification"), tmp_path / "theirs.pth"
    torch.save({"state_dict": weights.load(whole[0] / weights.FILE, weights.facts_of(whole[0] / weights.FILE),
                                           dense=False, device=torch.device("cpu")).state_dict()}, path)  # fmt: skip
    given = {"data": str(data), "size": 32, "resize": 1.0, "workers": 0}
    with pytest.raises(TaskError, match="--model NAME does"):
        running.evaluate(task, given, path)
    found, _ = running.evaluate(task, given, path, model="dla46_c")
    assert found.metrics["top-1"] == running.evaluate(task, {}, whole[0])[0].metrics["top-1"]


def test_two_processes_of_torchrun(data, tmp_path):
    """Half a batch each: one run's files, with the losses of both, and a figure that one process gives again."""
    run = tmp_path / "run"
    given = {"data": data, "out": run, "layout": "folder", "model": "dla46_c", "size": 32, "epochs": 1, "batch": 3}
    given |= {"lr": 0.003, "optimizer": "adamw", "schedule": "constant", "resize": 1, "workers": 0, "device": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dla_fast"]
    command += [
        "train",
        "classification",
        *(word for name, value in given.items() for word in (f"--{name}", str(value))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/1") == 1
    assert [row[0] for row in curve(run)] == ["1", "2", "3"]
    found, _ = running.evaluate(tasks.get("classification"), {}, run)
    assert found.metrics["top-1"] == float(logs.rows(run / logs.EPOCHS)[0]["top-1"])
    assert found.images == 18


def test_norms_that_share_statistics_need_gpus(data, tmp_path):
    chosen = options.make(
        tasks.get("classification").training,
        {**TINY, "data": str(data), "layout": "folder", "batch": 3, "sync_bn": True},
    )
    with pytest.raises(TaskError, match="--sync-bn: DistributedDataParallel takes SyncBatchNorm on GPUs alone"):
        engine.Trainer(tasks.get("classification"), chosen, tmp_path, Processes(0, 2, torch.device("cpu")))
