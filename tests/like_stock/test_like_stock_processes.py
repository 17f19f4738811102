"""Several processes: parallel training on two, whole models handed from one to another, and forked workers."""

from __future__ import annotations

import subprocess
import sys

import process_cases
import pytest
import serving
import torch
import torch.distributed as dist
from pairs import Seen, assert_alike, freeze, image, pair, step

pytestmark = pytest.mark.skipif(serving.INTERPRETED, reason="what lies between the operators is the same")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has seen, see process_cases.py."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(process_cases.main, (folder, sys.path), nprocs=process_cases.WORLD)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(process_cases.WORLD)]


@pytest.mark.parametrize("name", process_cases.SCENARIOS)
def test_parallel_training(ranks, name):
    for found in ranks:
        stock, swapped = (found[name, swaps] for swaps in (False, True))
        assert "raised" not in stock, stock["raised"]
        assert "raised" not in swapped, swapped["raised"]
        if name in process_cases.HALVES:
            # In halves a gradient that is a sum of what cancels is right but to the size of the largest.
            gradients = [[seen.pop(k) for k in list(seen) if k.endswith(".grad")] for seen in (stock, swapped)]
            want, got = (torch.cat([g.flatten() for g in several]) for several in gradients)
            assert (got - want).abs().max() <= 2e-2 * want.abs().max()
        assert_alike([Seen(stock), Seen(swapped)], 2e-2 if name in process_cases.HALVES else 1e-9)


@pytest.mark.parametrize("name", process_cases.SYNCED)
def test_parallel_training_of_joint_batches(ranks, name):
    for found in ranks:
        got, want = found["synced", name], found["synced", "unused alone" if "unused" in name else "none"]
        assert_alike([Seen(want), Seen(got)])
    first, second = (found["synced", name] for found in ranks)
    for key, value in first.items():
        if isinstance(value, torch.Tensor) and not key.startswith("output"):
            torch.testing.assert_close(second[key], value, rtol=0, atol=0, msg=key)


def infer(model, x):
    with torch.no_grad():
        return model.eval()(x)


ELSEWHERE = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
assert "dla_fast" not in sys.modules
found = []
for model, x in torch.load({given!r}, weights_only=False):
    y = model(x)
    y.sum().backward()
    with torch.no_grad():
        found.append([y.detach(), model.eval()(x), [p.grad for p in model.parameters()], model])
assert "dla_fast" in sys.modules
torch.save(found, {kept!r})
"""


def test_whole_models_in_a_fresh_process(tmp_path):
    """Saved, loaded where nothing was imported, trained, saved there and loaded here."""
    models, x = [], image()
    for name, frozen in (("concatenating", False), ("adding", True), ("node", True)):
        stock, swapped = pair(name, verify=False)
        models.append((stock, freeze(swapped.eval()).train() if frozen else swapped))
    given, kept = tmp_path / "given.pt", tmp_path / "kept.pt"
    torch.save([(swapped, x) for _, swapped in models], given)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(given, weights_only=True)
    program = ELSEWHERE.format(paths=sys.path, given=str(given), kept=str(kept))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    for (stock, swapped), (y, evaluated, gradients, back) in zip(
        models, torch.load(kept, weights_only=False), strict=True
    ):
        want = stock(x)
        want.sum().backward()
        torch.testing.assert_close([y, evaluated], [want, infer(stock, x)], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients, [p.grad for p in stock.parameters()], rtol=1e-9, atol=1e-9)
        assert [type(m).__name__ for m in back.modules()] == [type(m).__name__ for m in swapped.modules()]
        torch.testing.assert_close(infer(back, x), infer(stock, x), rtol=1e-9, atol=1e-9)


class Answers(torch.utils.data.Dataset):
    """What a model says to images, as features are made by a dataset."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return infer(self.model, image(seed=i))


@pytest.mark.parametrize("frozen", [False, True])
def test_workers_that_run_the_model(frozen):
    stock, swapped = pair("adding", verify=False)
    if frozen:
        freeze(swapped.eval())
    infer(swapped, image())
    options = {"num_workers": 2, "timeout": 300, "multiprocessing_context": "fork"}
    found = [list(torch.utils.data.DataLoader(Answers(model), **options)) for model in (stock, swapped)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def in_a_fork(run, file):
    """What ``run`` gives in a forked process, which is ended where it does not answer."""

    def child():
        torch.save(run(), file)

    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        pytest.fail("the forked process does not answer")
    assert process.exitcode == 0
    return torch.load(file, weights_only=False)


def test_a_fork_after_the_model_has_run(tmp_path):
    """Threads of the parent and what it keeps between calls are not the child's: it infers and trains all the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, found = image(), []
        for swaps, frozen in ((False, False), (True, False), (True, True)):
            model = pair("nodes", verify=False)[swaps]
            step(model, x)
            model.zero_grad()
            if frozen:
                freeze(model.eval())
            infer(model, x)

            def run(model=model):
                torch.set_num_threads(1)
                given, y = x.clone().requires_grad_(), infer(model, x)
                model.train()
                return y, step(model, given).detach(), [p.grad for p in model.parameters()], given.grad

            found.append(in_a_fork(run, tmp_path / "found.pt"))
            # The parent goes on as if nothing had been.
            found[-1] = *found[-1], step(model.train(), x), list(model.buffers())
        for got in found[1:]:
            torch.testing.assert_close(got, found[0], rtol=1e-8, atol=1e-8)
    finally:
        torch.set_num_threads(before)
