"""Which samples, in what order, drawn how: it follows from a seed, an epoch and a place alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dla_fast.tasks import DataError, loading
from dla_fast.tasks.loading import Batches, Samples


def draws(index):
    return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def epoch(workers, epoch=0, first=0, **given):
    batches = Batches(10, 3, seed=given.pop("seed", 5), **given)
    batches.epoch, batches.first = epoch, first
    loader = loading.loader(Samples(10, draws), batches, workers=workers, stack=False)
    return [loaded.items for loaded in loader]


def test_worker_processes_change_nothing():
    assert epoch(0) == epoch(1) == epoch(2)


def test_an_epoch_goes_on_where_it_was():
    whole = epoch(0, epoch=4)
    assert epoch(1, epoch=4, first=2) == whole[2:]


def test_every_epoch_and_seed_has_its_own_order_and_draws():
    first, second, other = epoch(0), epoch(0, epoch=1), epoch(0, seed=6)
    assert len(first) == 3
    assert len({tuple(item[0] for batch in found for item in batch) for found in (first, second, other)}) == 3
    drawn = [item[1:] for found in (first, second, other) for batch in found for item in batch]
    assert len(set(drawn)) == len(drawn)


def test_persistent_workers_see_the_next_epoch():
    batches = Batches(10, 3, seed=5)
    loader = loading.loader(Samples(10, draws), batches, workers=1, stack=False)
    for number in range(2):
        batches.epoch = number
        assert [loaded.items for loaded in loader] == epoch(0, epoch=number)


def test_processes_share_a_batch_that_one_would_have():
    alone = [[key.place for key in batch] for batch in Batches(20, 6, seed=1)]
    parts = [[[key.place for key in batch] for batch in Batches(20, 3, rank=r, processes=2, seed=1)] for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_sample_once(processes):
    batches = [Batches(10, 4, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(key.place for each in batches for batch in each for key in batch) == list(range(10))
    assert all(len(list(each)) == len(each) for each in batches)


def broken(index):
    if index in (3, 4):
        raise DataError(f"image {index}: broken")
    return index


@pytest.mark.parametrize("workers", [0, 1])
def test_in_training_the_next_sample_stands_in_for_a_broken_one(workers):
    batches = Batches(10, 5, seed=0)
    loader = loading.loader(Samples(10, broken, replace=True), batches, workers=workers, stack=True)
    items = torch.cat([loaded.items for loaded in loader]).tolist()
    assert sorted(items) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    assert sorted({line for loaded in loader for line in loaded.failures}) == ["image 3: broken", "image 4: broken"]


def test_in_evaluation_a_broken_one_is_left_out():
    loader = loading.loader(Samples(5, broken), Batches(5, 2), workers=1, stack=True)
    assert [loaded.items.tolist() if loaded.items is not None else None for loaded in loader] == [[0, 1], [2], None]


def test_failures_are_errors_or_named_once():
    said = []
    failures = loading.Failures(skip=True, say=said.append)
    failures.see(["a: broken", "b: broken"])
    failures.see(["a: broken"])
    assert said == ["skipped: a: broken", "skipped: b: broken"]
    with pytest.raises(DataError, match="a: broken .--broken skip goes on"):
        loading.Failures(skip=False, say=pytest.fail).see(["a: broken"])


def test_what_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    with pytest.raises(DataError, match=r"notes\.png: there is no such file"):
        loading.open_image(path)
    path.write_text("no image")
    with pytest.raises(DataError, match=r"notes\.png: no readable image"):
        loading.open_image(path)


def test_a_truncated_image_is_named(tmp_path):
    from PIL import Image

    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.png: no readable image"):
        loading.open_image(path)
