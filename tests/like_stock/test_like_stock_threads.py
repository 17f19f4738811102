"""Several threads at one model, each at its own, and choices of a backend that are made beside them."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from pairs import LAYOUTS, compare, image, loss_of, pair, step
from torch.utils.checkpoint import checkpoint

from dla_fast import backend, functional, use_backend

THREADS = 8
SMALL = (2, 8, 16)


def at_once(function):
    """What a function gives for 0 to 7, each in a thread of its own, none of which begins before all are there."""
    together = Barrier(THREADS, timeout=60)

    def run(i):
        together.wait()
        return function(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.fixture
def nothing_forced(monkeypatch):
    """The environment forces no backend, whatever the tests are run under."""
    monkeypatch.delenv("DLA_FAST_DISABLE", raising=False)
    monkeypatch.setattr(backend._default, "name", "auto")


@pytest.mark.parametrize(
    ("name", "layout", "forced"),
    [
        *((name, layout, "auto") for name in ("nodes", "concatenating") for layout in LAYOUTS),
        ("adding", "channels_last", "auto"),
        ("adding", "nchw", "reference"),
    ],
)
def test_one_model_in_evaluation(name, layout, forced):
    def scenario(model, x):
        model.eval()

        def run(i):
            own = image(SMALL, layout, seed=i).requires_grad_()
            y = model(own)
            (gradient,) = torch.autograd.grad(loss_of(y), own, retain_graph=True)
            # Of the parameters they add up, in whatever order the threads come.
            loss_of(y).backward(inputs=list(model.parameters()))
            with torch.no_grad():
                return y, gradient, model(own)

        return at_once(run)

    compare(scenario, name, layout, backend=forced)


@pytest.mark.parametrize(
    ("name", "layout"), [("nodes", "nchw"), ("concatenating", "channels_last"), ("adding", "nchw")]
)
def test_a_model_for_each_in_training(name, layout):
    def scenario(model, x):
        own = [copy.deepcopy(model) for _ in range(THREADS)]

        def run(i):
            # Every other thread is on the reference, and none takes notice.
            with use_backend("reference") if i % 2 else contextlib.nullcontext():
                y = step(own[i], image(SMALL, layout, seed=i))
            return y, [p.grad for p in own[i].parameters()], dict(own[i].named_buffers())

        return at_once(run)

    compare(scenario, name, layout)


@pytest.mark.parametrize("name", ["node", "blocks"])
def test_a_forced_node_leaves_nothing_in_force_beside_another_thread(monkeypatch, nothing_forced, name):
    """The node enters first and leaves first, while the other thread's choice is in force."""
    _, model = pair(name, backend="reference")
    turn = Barrier(2, timeout=60)
    run_link, seen = functional.run_link, []

    def slow(*arguments):
        if not seen:
            seen.append(backend.selected())
            turn.wait()
            turn.wait()
            seen.append(backend.selected())
        return run_link(*arguments)

    monkeypatch.setattr(functional, "run_link", slow)

    def node():
        step(model, image())
        turn.wait()
        return backend.selected()

    def other():
        turn.wait()
        with use_backend("cpu"):
            turn.wait()
            turn.wait()  # the node has been left
            inside = backend.selected()
        return inside, backend.selected()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(node), pool.submit(other)]
        assert [one.result() for one in both] == ["auto", ("cpu", "auto")]
    assert seen == ["reference", "reference"]
    assert backend.selected() == "auto"


@pytest.mark.parametrize("name", ["node", "blocks", "adding"])
def test_a_backward_asks_nobody_and_runs_anywhere(monkeypatch, name):
    """What serves a call serves its backward pass, in whichever thread, whatever is in force there."""

    def scenario(model, x):
        y = model(x)
        with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patches:
            patches.setattr(backend, "resolve", lambda *_: pytest.fail("a backward pass asked for a backend"))

            def backward():
                with use_backend("reference"):
                    (gradient,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
                    loss_of(gradient).backward()
                    return gradient

            return y, pool.submit(backward).result()

    compare(scenario, name)


@pytest.mark.parametrize("forced", ["reference", "cpu"])
def test_checkpointing_makes_the_choice_again_where_it_is_told_to(monkeypatch, nothing_forced, forced):
    """The forward pass runs again with the choice of the backward pass's thread; ``context_fn`` brings another."""
    _, model = pair("blocks")
    served, resolve = [], backend.resolve
    monkeypatch.setattr(backend, "resolve", lambda *a: served.append(resolve(*a)) or served[-1])
    x = image().requires_grad_()

    def ran(run):
        served.clear()
        run()
        return set(served)

    def contexts():
        return use_backend(forced), use_backend(forced)

    with use_backend(forced):
        y = checkpoint(model, x, use_reentrant=False)
        assert ran(lambda: loss_of(y).backward()) == {forced}
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    with ThreadPoolExecutor(1) as pool, use_backend("auto"):
        assert ran(lambda: pool.submit(loss_of(y).backward).result()) == {forced}
    y = checkpoint(model, x, use_reentrant=False)
    assert ran(lambda: loss_of(y).backward()) == {"cpu"}
