"""load_pretrained: files and what is in them, models and what is around them, and the web at its worst."""

from __future__ import annotations

import argparse
import hashlib
import io
import pathlib
import socket
import threading

import pytest
import torch
from checkpoint_helpers import KINDS, Detector, drawn, segmenter, serving, with_projects
from model_helpers import tiny
from torch import nn

import dla_fast
from dla_fast.models import pretrained


@pytest.fixture(scope="module")
def data():
    """A checkpoint as the original's authors have it, as bytes."""
    file = io.BytesIO()
    torch.save(dla_fast.convert_state_dict(drawn("classification").state_dict(), to="original"), file)
    return file.getvalue()


@pytest.fixture
def web():
    with serving(each=150_000) as server:
        yield server


@pytest.fixture
def path(tmp_path, data):
    file = tmp_path / "own" / "checkpoint.pth"
    file.parent.mkdir()
    file.write_bytes(data)
    return file


@pytest.fixture(scope="module")
def wanted(data):
    return dla_fast.convert_state_dict(torch.load(io.BytesIO(data), weights_only=True), to="timm")


def load(model, source, **options):
    return dla_fast.load_pretrained(model, source, progress=False, **options)


def assert_loaded(model, wanted):
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


def refuses(model, source, message, error=ValueError, **options):
    """It raises, and nothing of the model is changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load(model, source, **options)
    assert_loaded(model, before)


def digest(data):
    return hashlib.sha256(data).hexdigest()


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_of_every_kind(path, wanted, data, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    other = path.with_suffix(".safetensors")
    safetensors.save_file({f"module.{k}": v.clone() for k, v in wanted.items()}, other)
    old = tmp_path / "old.tar"
    torch.save({"state_dict": wanted, "epoch": 3}, old, _use_new_zipfile_serialization=False)
    for source in (path, str(path), path.as_uri(), other, old):
        model = tiny()
        report = load(model, source, sha256=digest(path.read_bytes()) if source == path else True)
        assert_loaded(model, wanted)
        assert set(report.loaded) == set(wanted)
        assert not report.kept
    assert report.within == "state_dict"
    monkeypatch.setattr(pretrained, "PUBLISHED", {"dla34": digest(data)[:8]})
    published = tmp_path / f"dla34-{digest(data)[:8]}.pth"
    refuses(tiny(), "dla34", f"put it there, or give the URL of {published.name}", FileNotFoundError, folder=tmp_path)
    published.write_bytes(data)
    assert load(tiny(), "dla34", folder=tmp_path).source == str(published)
    published.write_bytes(data[:-1])
    refuses(tiny(), published, "expected a file whose SHA-256 starts with")
    assert published.exists(), "a file of one's own is left where it is"


def test_files_that_are_none(path, data, tmp_path):
    bad, model = tmp_path / "bad.pth", tiny()
    refuses(model, bad, "bad.pth: no such file", FileNotFoundError)
    refuses(model, tmp_path, "a folder, no file", FileNotFoundError)
    for content, message in (
        (data[:5000], "truncated, or no checkpoint"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1", "truncated, or no checkpoint: torch.save writes other files$"),
        (b"\n<!DOCTYPE html><html></html>", "a web page, not a checkpoint"),
    ):
        bad.write_bytes(content)
        refuses(model, bad, f"bad.pth: {message}")
    torch.save({"state_dict": tiny().state_dict(), "args": argparse.Namespace(lr=1)}, bad)
    refuses(model, bad, r"holds argparse\.Namespace, .*torch\.serialization\.safe_globals")
    with torch.serialization.safe_globals([argparse.Namespace]):
        load(model, bad)
    torch.save([1, 2], bad)
    refuses(model, bad, "expected a mapping of names to tensors, got list")
    torch.save({"conv1.weight": torch.ones(1)}, bad)
    refuses(model, bad, "this is no DLA network")
    bad.with_suffix(".safetensors").write_bytes(data[:100])
    refuses(model, bad.with_suffix(".safetensors"), "truncated, or no safetensors file")
    refuses(model, path, "expected a file whose SHA-256", sha256="0" * 8)
    refuses(model, path, "sha256: expected 8 to 64", sha256="12")
    refuses(model, path, "head: expected", head="keep")
    refuses(model, "ftp://127.0.0.1/a.pth", "expected a path or a URL of http or https")
    refuses(model, 3, "expected a path, a URL or a name, got int", TypeError)
    refuses(nn.Linear(1, 1), path, "model: expected a DLA network.*weight$")
    refuses(nn.Sequential(nn.Sequential(tiny())), path, r"model: expected a DLA network.*; model\.0\.0 is one$")
    with pytest.raises(ValueError, match="meta device"):
        load(tiny(device="meta"), path)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "wrap"),
    [("classification", "module."), ("segmentation, original", ""), ("detection", "_orig_mod."), ("detection", "")],
)
@pytest.mark.parametrize("source", KINDS)
def test_every_network_into_every_other(source, target, wrap, tmp_path):
    theirs, model = drawn(source), KINDS[target]()
    file = tmp_path / "c.pth"
    torch.save({f"{wrap}{k}": v for k, v in theirs.state_dict().items() if "num_batches" not in k or wrap}, file)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    same = source.partition(",")[0] == target.partition(",")[0]
    # A detector may have a classification head in its base, which another does not miss.
    exact = same or (source, target) == ("detection with a head in its base", "detection")
    if not exact and (source, target) != ("detection with a head in its base", "classification"):
        refuses(model, file, "with head='drop' the model's own values stay there$")
    around = {"": lambda m: m, "module.": nn.DataParallel, "_orig_mod.": lambda m: torch.compile(m, backend="eager")}[
        wrap
    ]
    report = load(around(model), file, head="error" if exact else "drop")
    state = model.state_dict()
    bare = dla_fast.convert_state_dict(theirs.state_dict(), to="original" if "original" in target else "timm")
    prefix = "" if target == "classification" else "base."
    bare = {
        prefix + key.removeprefix("base."): value for key, value in bare.items() if key.startswith(("base", "level"))
    }
    assert len(bare) > 100
    for key, value in bare.items():
        if "num_batches" not in key:
            assert torch.equal(state[key], value), key
    loaded = {key.removeprefix(wrap) for key in report.loaded}
    kept = {key.removeprefix(wrap) for key in report.kept}
    assert loaded | kept == set(state)
    assert not loaded & kept
    assert all(torch.equal(state[key], own[key]) for key in kept)
    if exact:
        assert all("num_batches" in key for key in kept)
    assert str(report).startswith(f"{file}: {len(loaded)} loaded, {len(kept)} kept, {len(report.dropped)} dropped")


def test_other_classes(path, wanted, tmp_path):
    model = tiny(num_classes=7)
    refuses(model, path, r"fc: the checkpoint has fc\.bias \(5,\) where the model has \(7,\).*head='drop'")
    head = model.fc.weight.detach().clone()
    report = load(model, path, head="drop")
    assert set(report.kept) == {"fc.weight", "fc.bias"} == {key for key in report.dropped if "project" not in key}
    assert torch.equal(model.fc.weight, head)
    assert_loaded(model, {key: value for key, value in wanted.items() if not key.startswith("fc")})
    # Without a head there is nothing that could stay untrained.
    assert set(load(tiny(num_classes=0), path).dropped) >= {"fc.weight", "fc.bias"}
    assert set(load(tiny(features_only=True), path).dropped) >= {"fc.weight", "fc.bias"}
    # Of a detector's heads those that fit are loaded.
    source, target = drawn("detection"), Detector(classes=4)
    torch.save(source.state_dict(), tmp_path / "detector.pth")
    refuses(target, tmp_path / "detector.pth", r"hm: the checkpoint has hm\.2\.bias \(3,\) where")
    report = load(target, tmp_path / "detector.pth", head="drop")
    assert {key.partition(".")[0] for key in report.kept} == {"hm"}
    assert torch.equal(target.wh[2].weight, source.wh[2].weight)
    # A network that does not fit is an error whatever the head does.
    for model in (tiny(in_chans=1), tiny(in_chans=4)):
        refuses(model, path, r"network: the checkpoint has base_layer\.0\.weight", head="drop")
    wide = segmenter()
    wide.dla_up.ida_0.node_1 = nn.Conv2d(3, 3, 1)
    torch.save(segmenter().state_dict(), tmp_path / "segmenter.pth")
    refuses(wide, tmp_path / "segmenter.pth", "dla_up: the checkpoint lacks dla_up", head="drop")


def test_a_linear_head_and_timms_network(timm, path, wanted, tmp_path):
    model = tiny()
    model.fc = nn.Linear(16, 5)
    load(model, path)
    assert torch.equal(model.fc.weight, wanted["fc.weight"].flatten(1))
    averaged = torch.optim.swa_utils.AveragedModel(tiny())
    averaged.n_averaged += 3
    load(averaged, path)
    assert_loaded(averaged.module, wanted)
    assert averaged.n_averaged == 3
    theirs = timm.create_model("dla46_c", num_classes=4)
    torch.save(dla_fast.convert_state_dict(theirs.state_dict(), to="detector"), tmp_path / "d.pth")
    target = timm.create_model("dla46_c", num_classes=4)
    report = load(target, tmp_path / "d.pth")
    assert_loaded(target, theirs.state_dict())
    assert report.renamed["base.level2.root.conv.weight"] == "level2.root.conv.weight"
    assert all(why == "a project layer that nothing uses" for why in report.dropped.values())
    originals = with_projects(tiny())
    assert set(load(originals, path).loaded) == set(originals.state_dict())
    # A counter that an old checkpoint lacks stays.
    old = {key: value for key, value in wanted.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, path)
    assert all(key.endswith("num_batches_tracked") for key in load(tiny(), path).kept)


# --- the web ----------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once(web, wanted, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = f"dla34-{digest(data)[:8]}.pth"
    web.files[f"/{name}"] = data
    web.ways["/latest.pth"] = f"/{name}"
    model = tiny()
    report = dla_fast.load_pretrained(model, f"{web.url}/{name}")
    assert_loaded(model, wanted)
    assert report.source == str(tmp_path / "checkpoints" / name)
    assert name in capsys.readouterr().err
    load(tiny(), f"{web.url}/{name}?download=1")
    assert web.asked == [(f"/{name}", None)]
    # A redirect; and without a hash in the name two URLs that end alike are two files.
    load(tiny(), f"{web.url}/latest.pth")
    web.files["/other/latest.pth"] = b"nothing"
    refuses(tiny(), f"{web.url}/other/latest.pth", "no checkpoint.*; delete it, and the next call fetches it$")
    assert capsys.readouterr().err == ""
    assert not list((tmp_path / "checkpoints").glob("*.part*"))


@pytest.mark.parametrize("way", ["breaks off", "no tag", "breaks off once"])
def test_what_breaks_off_goes_on(web, wanted, data, tmp_path, way):
    name = f"small-{digest(data)[:10]}.pth"
    web.files[f"/{name}"], web.ways[f"/{name}"] = data, way
    if way == "breaks off once":
        part = len(data) - 150_000
        refuses(
            tiny(), f"{web.url}/{name}", rf"150000 bytes are kept, .* put it at .*{name}$", OSError, folder=tmp_path
        )
        web.ways.clear()
        model = tiny()
        load(model, f"{web.url}/{name}", folder=tmp_path)
        assert web.asked[-1] == (f"/{name}", "bytes=150000-")
        assert part > 0
    else:
        model = tiny()
        load(model, f"{web.url}/{name}", folder=tmp_path)
        assert [asked for _, asked in web.asked] == [
            None if not start else f"bytes={start}-" for start in range(0, len(data), 150_000)
        ]
    assert_loaded(model, wanted)


def test_a_part_that_cannot_go_on_begins_anew(web, wanted, data, tmp_path):
    url = f"{web.url}/small.pth"
    web.files["/small.pth"] = b"another version" * 20_000
    web.ways["/small.pth"] = "breaks off once"
    refuses(tiny(), url, "bytes are kept", OSError, folder=tmp_path)
    # By the time it is another file, and says so by its tag.
    web.files["/small.pth"], web.tag = data, '"2"'
    web.ways.clear()
    load(model := tiny(), url, folder=tmp_path)
    assert_loaded(model, wanted)
    assert web.asked[-1] == ("/small.pth", "bytes=150000-")
    # A server that knows no ranges can still give it whole.
    name = f"small-{digest(data)[:8]}.pth"
    (tmp_path / f"{name}.part").write_bytes(data[:1000])
    web.files[f"/{name}"], web.ways[f"/{name}"] = data, "no ranges"
    refuses(tiny(), f"{web.url}/{name}", "150000 bytes came of|could not be fetched", OSError, folder=tmp_path)
    web.ways.clear()
    # All of it is there already, or more than there is.
    for start in (data, data + b"x"):
        for file in tmp_path.glob(f"{name}*"):
            file.unlink()
        (tmp_path / f"{name}.part").write_bytes(start)
        load(model := tiny(), f"{web.url}/{name}", folder=tmp_path)
        assert_loaded(model, wanted)


def test_what_is_not_the_file(web, data, tmp_path):
    options, model = {"folder": tmp_path}, tiny()
    wrong = f"{web.url}/small-00000000.pth"
    refuses(
        model, wrong, r"404 Not Found\. Or fetch it by hand and put it at .*small-00000000\.pth$", OSError, **options
    )
    web.files["/small-00000000.pth"] = data
    for _ in range(2):
        refuses(model, wrong, rf"starts with 00000000, got {digest(data)}; it was put aside as .*\.wrong$", **options)
    assert len(web.asked) == 3
    assert not (tmp_path / "small-00000000.pth").exists()
    load(model, wrong, sha256=digest(data), **options)
    load(model, wrong, sha256=False, **options)
    web.files["/page.pth"] = b"<!doctype html><title>Sign in</title>"
    refuses(model, f"{web.url}/page.pth", "expected a checkpoint, got a web page", **options)
    refuses(model, f"{web.url}/", "expected a URL that ends in the name of a file", **options)
    web.files["/empty.pth"] = b""
    refuses(model, f"{web.url}/empty.pth", "could not be fetched: 0 bytes came of 0", OSError, **options)
    assert not list(tmp_path.glob("*.part"))


def test_offline(tmp_path, data):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/dla34-ba72cf86.pth"
        where = tmp_path / "dla34-ba72cf86.pth"
        with pytest.raises(OSError, match="could not be fetched: .*refused") as raised:
            load(tiny(), url, folder=tmp_path)
    assert url in str(raised.value)
    assert str(raised.value).endswith(f"put it at {where}")
    # A file with no hash in its name, put where the error says.
    with pytest.raises(OSError, match="put it at") as raised:
        load(tiny(), url.replace("-ba72cf86", ""), folder=tmp_path)
    (tmp_path / str(raised.value).rpartition("put it at ")[2]).write_bytes(data)
    load(tiny(), url.replace("-ba72cf86", ""), folder=tmp_path)


def test_a_cache_that_cannot_be_written(web, data, wanted, tmp_path, monkeypatch):
    """Running as root nothing is forbidden: a file where the folder should be, and moving that fails, stand for it."""
    taken = tmp_path / "taken"
    taken.write_text("")
    for folder in (taken, taken / "below"):
        message = r"small\.pth could not be fetched: .*taken.*folder=\.\.\. names another cache.* put it at"
        refuses(tiny(), f"{web.url}/small.pth", message, OSError, folder=folder)
    (tmp_path / "small-00000000.pth").write_bytes(data)

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", forbidden)
        refuses(tiny(), f"{web.url}/small-00000000.pth", f"got {digest(data)}$", folder=tmp_path)
    assert not web.asked
    monkeypatch.setenv("HOME", str(tmp_path))
    web.files["/sm%C3%A5ll%201.pth"] = data
    load(model := tiny(), f"{web.url}/småll 1.pth", folder="~/cache")
    assert_loaded(model, wanted)
    (file,) = (tmp_path / "cache").glob("*.pth")
    load(tiny(), f"~/cache/{file.name}")


def test_several_at_once_fetch_once(web, data, tmp_path):
    name = f"small-{digest(data)[:8]}.pth"
    web.files[f"/{name}"] = data
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(load(tiny(), f"{web.url}/{name}", folder=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    assert len(web.asked) == 1
