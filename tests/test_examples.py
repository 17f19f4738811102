"""The examples run, and what they say of swap_ holds."""

from __future__ import annotations

import collections
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dla_fast

ROOT = Path(__file__).resolve().parents[1]
ROOTS = [f"base.{r}.root" for r in ("level2", "level3.tree1", "level3.tree2", "level4.tree1", "level4.tree2", "level5")]
LADDERS = [f"dla_up.ida_{k}" for k in range(3)]


@pytest.fixture
def example(monkeypatch):
    """Imports a module of examples/ as ``python examples/<name>.py`` does."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def run(name, *arguments):
    """What an example prints, in a process with the same dla_fast as here."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Two test processes share the cores.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "units", "bound"),
    [
        ("detector", [], [*ROOTS, *LADDERS, "ida_up"], 1e-5),
        ("segmenter", ["--amp"], [*ROOTS, *LADDERS], 5e-2),
    ],
    ids=["detector", "segmenter in bfloat16"],
)
def test_runs_and_keeps_its_word(name, arguments, units, bound):
    said = run(name, *arguments)
    modules = len(re.findall(r"^\S+ +(?:aggregate|merge|block|conv) +swapped$", said, re.MULTILINE))
    counted = f"nodes {len(ROOTS)}, ladders {len(units) - len(ROOTS)}, blocks 12, convs 7"
    assert said.startswith(f"swapped {modules} ({counted}), skipped 0\n")
    assert re.findall(r"^(\S+) +(?:aggregate|merge) +swapped$", said, re.MULTILINE) == units
    curves = {
        when: [float(v) for v in values.split()]
        for when, values in re.findall(r"^loss (\w+) +(.*)$", said, re.MULTILINE)
    }
    for losses in curves.values():
        assert all(v == v and v < 100 for v in losses)
        assert losses[-1] < losses[0]
    assert curves["after"][0] == pytest.approx(curves["before"][0], rel=bound)
    last = said.splitlines()[-1]
    assert last.startswith(f"{name}: {modules} units swapped, max difference ")
    assert float(re.search(r"max difference (\S+),", last)[1]) < bound
    assert re.search(r"inference \d+\.\d\dx, training step \d+\.\d\dx$", last)


@pytest.mark.skipif(dla_fast.backend.can_run("cpu", "merge", "cpu", torch.float32) is not None, reason="no CPU kernels")
@pytest.mark.parametrize(("name", "steps", "ladders"), [("Detector", 8, 4), ("Segmenter", 6, 3)])
def test_every_step_of_every_ladder_is_fused(example, name, steps, ladders):
    model = getattr(example("networks"), name)().eval()
    report = dla_fast.swap_(model, units=("nodes", "ladders"), verify=False)
    assert len(report.swapped) == ladders + len(ROOTS)
    seen = collections.Counter()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name.split("::")[1]] += 1
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad(), dla_fast.use_backend("cpu"):
        model(torch.randn(1, 3, 64, 64))
    if name == "Detector":
        # Projections and nodes are 3x3, and every step upsamples and adds.
        wanted = {"conv_norm_act_inference": 2 * steps + len(ROOTS), "upsample_add": steps}
    else:
        # Projections are 1x1, and nodes upsample on the way.
        wanted = {"conv_norm_act_inference": 2 * steps + len(ROOTS)}
    assert {op: seen[op] for op in wanted} == wanted


def test_the_base_takes_timm_s_weights(example, timm):
    theirs = timm.create_model("dla34", num_classes=0).eval()
    base = example("networks").DLA34().eval()
    base.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(base(images)[-1], theirs.forward_features(images))


def test_targets_are_decoded_again(example):
    detector = example("detector")
    _, labels, objects = example("common").scenes(3, 128, torch.Generator().manual_seed(1), objects=3)
    assert labels.unique().tolist() == [0, 1, 2, 3]
    maps = detector.targets(objects, 32)
    logits = {**maps, "heatmap": torch.logit(maps["heatmap"], eps=1e-4)}
    assert detector.recall(logits, objects) == 1
    best = detector.decode(logits, 3)
    for peaks, wanted in zip(best, objects, strict=True):
        # As sets: peaks are sorted by score, and all scores are the same.
        found = sorted(peaks[:, 1:].tolist())
        torch.testing.assert_close(torch.tensor(found), torch.tensor(sorted(wanted.tolist())), atol=1e-3, rtol=0)
    worse = {**logits, "heatmap": logits["heatmap"].flip(2)}
    assert detector.loss(logits, maps) < detector.loss(worse, maps)


def test_mean_iou(example):
    segmenter = example("segmenter")
    labels = torch.tensor([0, 0, 1, 1])
    assert segmenter.mean_iou(labels, labels, 4) == 1
    assert segmenter.mean_iou(torch.tensor([0, 0, 0, 1]), labels, 4) == pytest.approx((2 / 3 + 1 / 2) / 2)
