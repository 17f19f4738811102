"""``python -m dla_fast train | evaluate | predict``: every option, what is printed and written, and what goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from task_helpers import colours

from dla_fast import cli, tasks
from dla_fast.tasks import options, weights

ROOT = Path(__file__).resolve().parents[1]
# The status of a GPU that is not there: of one that cannot be meant where there are others.
NO_GPU = 2 if torch.cuda.is_available() else 1
TINY = ["--model", "dla46_c", "--size", "32", "--epochs", "1", "--batch", "6", "--workers", "0", "--optimizer", "adamw"]
TINY += ["--lr", "0.003", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, timm, maker):
    """A few drawn streets and shapes, and images in three colours."""
    root = tmp_path_factory.mktemp("made")
    maker.scenes(root / "scenes", 0, train=6, val=2)
    maker.camvid(root / "camvid", 0, train=6, val=2)
    maker.boundaries(root / "boundaries", 0, train=6, val=2, test=1)
    maker.voc(root / "voc", 0, train=6, val=2)
    colours(root / "colours")
    return root


CASES = {
    "classification": ("colours", "folder", ["--resize", "1", "--crops", "10"], ["top-1"]),
    "fine-grained": ("colours", "folder", ["--resize", "1"], ["top-1"]),
    "segmentation": ("scenes", "cityscapes", ["--class-weights", "median"], ["mIoU", "pixel accuracy"]),
    "boundary": ("boundaries", "bsds500", ["--thresholds", "9"], ["ODS", "OIS", "AP"]),
}


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    """A run of each task, trained at first use, and what was printed."""
    root, known = tmp_path_factory.mktemp("runs"), {}

    def run(name, capsys):
        if name not in known:
            data, layout, more, _ = CASES[name]
            command = ["train", name, "--data", str(made / data), "--layout", layout, "--out", str(root / name)]
            assert cli.main([*command, *TINY, *more]) == 0
            known[name] = capsys.readouterr().out
        return root / name, known[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_trained_evaluated_and_used(name, runs, made, tmp_path, capsys):
    run, said = runs(name, capsys)
    data, _, _, metrics = CASES[name]
    last = said.splitlines()[-1]
    assert last.startswith("epoch 1/1: loss ")
    figures = tmp_path / "figures.json"
    plot = ["--plot", str(tmp_path / "curve.png")] if name == "boundary" else []
    assert cli.main(["evaluate", name, "--weights", str(run), "--json", str(figures), *plot]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(figures.read_text())
    assert list(found["metrics"])[: len(metrics)] == metrics
    for metric in metrics:
        assert f"{metric} {found['metrics'][metric]:.4f}" in printed
        assert f"{metric} {found['metrics'][metric]:.4f}" in last
    if plot:
        assert Image.open(tmp_path / "curve.png").format == "PNG"

    images = sorted(path for path in (made / data).rglob("*") if path.suffix in (".png", ".jpg"))[:2]
    out = tmp_path / "out"
    assert cli.main(["predict", name, *map(str, images), "--weights", str(run), "--out", str(out)]) == 0
    written = sorted(path.name for path in out.iterdir())
    assert capsys.readouterr().out == f"{len(written)} files in {out}\n"
    expected = {
        "segmentation": ["labels", "overlay"],
        "boundary": ["boundaries", "overlay", "thin"],
    }.get(name)
    if expected is None:
        assert written == ["predictions-1.png", "predictions.csv"]
        return
    assert written == sorted(f"{path.stem}-{what}.png" for path in images for what in expected)
    picture = Image.open(out / f"{images[0].stem}-{expected[0]}.png")
    assert picture.size == Image.open(images[0]).size
    if name == "segmentation":
        assert picture.mode == "P"
        assert np.asarray(picture).max() < 19
        assert picture.getpalette()[:3] == [128, 64, 128]


@pytest.mark.parametrize(
    ("name", "data", "layout"), [("segmentation", "camvid", "camvid"), ("boundary", "voc", "pascal")]
)
def test_the_other_layouts(name, data, layout, made, tmp_path, capsys):
    more = ["--scales", "0.5", "1", "--flip", "--window", "64"]
    more += ["--thresholds", "3"] if name == "boundary" else ["--down-ratio", "4"]
    command = ["train", name, "--data", str(made / data), "--layout", layout, "--out", str(tmp_path / "run")]
    assert cli.main([*command, *TINY, *more]) == 0
    said = capsys.readouterr().out
    assert cli.main(["evaluate", name, "--weights", str(tmp_path / "run"), *more[:6]]) == 0
    figure = f"{CASES[name][3][0]} {capsys.readouterr().out.rpartition(CASES[name][3][0])[2][1:7]}"
    assert figure in said


def test_predictions_do_not_depend_on_the_backend(runs, made, tmp_path, capsys):
    run, _ = runs("boundary", capsys)
    image = next((made / "boundaries").rglob("*.jpg"))
    pictures = []
    for backend in ("auto", "reference"):
        out = tmp_path / backend
        command = ["predict", "boundary", str(image), "--weights", str(run), "--out", str(out), "--backend", backend]
        assert cli.main(command) == 0
        pictures.append(np.asarray(Image.open(out / f"{image.stem}-boundaries.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("train classification --out RUN", 2, "--data has to be given"),
        ("train classification --data DATA", 2, "give --out for a new run, or --resume"),
        ("train classification --data DATA --out RUN --resume RUN", 2, "give --out for a new run, or --resume"),
        ("train classification --resume RUN", 2, "no run to go on with"),
        ("train classification --data ABSENT --out RUN", 1, "there is no such folder"),
        ("train classification --data DATA/train --out RUN", 1, "the layout folder needs a folder train there"),
        ("train classification --data DATA --out RUN --batch 19", 2, "--batch 19: the training split of .* has 18"),
        ("train classification --data DATA --out RUN --crops 3", 2, "--crops 3: expected 1 or 10"),
        (
            "train classification --data DATA --out RUN --batch 6 --model dla35",
            2,
            "--model dla35: unknown; expected one of dla34",
        ),
        ("train classification --data DATA --out RUN --batch 6 --model dla34up", 2, "it predicts at every pixel"),
        (
            "train classification --data DATA --out RUN --device cuda:99",
            NO_GPU,
            "no CUDA device was found|there is no such device",
        ),
        ("train classification --data DATA --out RUN --device tpu", 2, "--device tpu"),
        ("train classification --data DATA --out RUN --batch 6 --optimizer nothing", 2, "--optimizer nothing"),
        ("train classification --data DATA --out RUN --batch 6 --size 33", 2, "--size 33: expected a multiple of 32"),
        ("train segmentation --data DATA --out RUN", 1, "the layout cityscapes needs a folder leftImg8bit there"),
        ("train boundary --data DATA --out RUN --down-ratio 3", 2, "--down-ratio 3: expected 2, 4, 8 or 16"),
        ("train boundary --data DATA --out RUN", 1, "the layout bsds500 needs images there"),
        ("evaluate classification --data DATA --weights ABSENT", 2, "--weights .*ABSENT: there is no such file"),
        ("predict classification ABSENT --weights DATA/train/red/0.png", 1, "there is no such file or folder"),
        ("predict classification DATA/train/red --weights DATA/train/red/0.png", 2, "--model NAME does"),
        ("predict classification DATA/train/red --weights THEIRS --model dla34", 2, "--classes has to be given"),
        ("predict classification DATA/train/red/0.png --weights RUN --classes ABSENT", 2, "--classes .*ABSENT"),
    ],
)
def test_what_goes_wrong_is_a_line(words, status, message, made, tmp_path, capsys):
    places = {
        "DATA": made / "colours",
        "RUN": tmp_path / "run",
        "ABSENT": tmp_path / "ABSENT",
        "THEIRS": tmp_path / "theirs.pth",
    }
    torch.save({}, places["THEIRS"])
    line = re.sub("DATA|RUN|ABSENT|THEIRS", lambda match: str(places[match[0]]), words)
    assert cli.main(line.split()) == status
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train classification --lr 0", "argument --lr: expected more than 0, got 0"),
        ("train classification --epochs none", "argument --epochs: expected a whole number, got 'none'"),
        ("train classification --layout cityscapes", "argument --layout: invalid choice"),
        ("train segmentation --scales", "argument --scales: expected at least one argument"),
        ("train nothing", "invalid choice: 'nothing'"),
        ("evaluate boundary", "the following arguments are required: --weights"),
    ],
)
def test_options_are_checked_first(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", tasks.NAMES)
@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_tells_every_option_with_its_default(name, command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, name, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    task = tasks.get(name)
    for each in options.of(task.training if command == "train" else task.evaluation):
        assert f"--{each.name.replace('_', '-')}" in text
        if isinstance(each.default, float):
            assert f"(default: {each.default})" in text


@pytest.mark.parametrize("name", tasks.NAMES)
def test_options_of_evaluation_are_those_of_training_too(name):
    """An evaluation at the end of an epoch asks for them."""
    task = tasks.get(name)
    assert {each.name for each in options.of(task.evaluation)} <= {each.name for each in options.of(task.training)}


@pytest.mark.parametrize("absent", ["PIL", "torchmetrics"])
def test_a_missing_package_is_a_line(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; from dla_fast import cli; "
    code += "sys.exit(cli.main(['train', 'classification', '--data', 'x', '--out', 'y']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"{tasks.EXTRAS[absent]} not installed: pip install" in done.stderr
    assert done.stderr.count("\n") == 1


def test_labels_outside_the_classes_are_named(made, tmp_path, capsys):
    import shutil

    shutil.copytree(made / "scenes", tmp_path / "scenes")
    path = next((tmp_path / "scenes").rglob("gtFine/train/**/*_labelIds.png"))
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 77)).save(path)
    command = ["train", "segmentation", "--data", str(tmp_path / "scenes"), "--out", str(tmp_path / "run"), *TINY]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert f"{path}: values 77 in it are none of the 19 classes" in said


def test_the_file_of_weights_is_of_the_package(runs, capsys):
    run, _ = runs("segmentation", capsys)
    facts = weights.facts_of(run / weights.FILE)
    assert facts.palette[0] == [128, 64, 128]
