"""Which backend serves a call, and how one is forced."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from dla_fast import backend, functional, use_backend


def call(device: str = "cpu") -> torch.Tensor:
    norm = [t.to(device) for t in (torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))]
    return functional.aggregate(
        [torch.randn(1, 4, 3, 3, device=device)], torch.randn(4, 4, 1, 1, device=device), *norm, training=False
    )


def test_explain_names_one_choice_and_a_reason_for_the_others():
    for op in backend.OPS:
        for device in ("cpu", "cuda", "meta"):
            rows = backend.explain(op, device)
            assert [r.backend for r in rows] == list(backend.BACKENDS)
            assert sum(r.chosen for r in rows) == 1
            assert all(r.reason is None for r in rows if r.chosen)
    by_name = {r.backend: r for r in backend.explain("aggregate")}
    assert by_name["cpu"].chosen
    assert "triton is not installed" in by_name["triton"].reason or "TRITON_INTERPRET" in by_name["triton"].reason
    with pytest.raises(ValueError, match="op: unknown op 'attention'"):
        backend.explain("attention")


def test_forced_backend_raises_with_the_reason():
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for and cannot run agg"):
        call()
    x = torch.randn(1, 3, 4, 4)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="cannot run upsample: .*(CUDA|on cuda tensors)"):
        functional.upsample(x, torch.randn(3, 1, 4, 4), 2)
    assert functional.upsample(x, torch.randn(3, 1, 4, 4), 2).shape == (1, 3, 8, 8)


def test_use_backend_restores_and_nests():
    before = backend.selected()
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            raise ZeroDivisionError
        assert backend.selected() == "reference"
    assert backend.selected() == before
    with pytest.raises(ValueError, match="name: unknown backend 'tpu', expected auto, reference"), use_backend("tpu"):
        pass


@pytest.fixture
def nothing_forced(monkeypatch):
    """The environment forces no backend, whatever the tests are run under."""
    monkeypatch.delenv("DLA_FAST_DISABLE", raising=False)
    monkeypatch.setattr(backend._default, "name", "auto")


def elsewhere(function):
    """What a function gives in a thread that begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_choice_is_its_threads_own(nothing_forced):
    turn = Barrier(2, timeout=60)

    def first():
        with use_backend("reference"):
            turn.wait()
            turn.wait()
            inside = backend.selected()
        turn.wait()
        return inside, backend.selected()

    def second():
        turn.wait()
        with use_backend("cpu"):
            turn.wait()
            turn.wait()  # the first has left
            inside = backend.selected()
        return inside, backend.selected()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(first), pool.submit(second)]
        assert [one.result() for one in both] == [("reference", "auto"), ("cpu", "auto")]
        assert list(pool.map(lambda _: backend.selected(), range(4))) == ["auto"] * 4
    assert backend.selected() == "auto"


def test_a_new_thread_begins_with_the_default_and_a_copied_context_with_the_choice(nothing_forced):
    with use_backend("reference"):
        copied = contextvars.copy_context()
        assert elsewhere(backend.selected) == "auto"
        assert backend.asked_by() == "use_backend('reference')"
        assert elsewhere(backend.asked_by) is None
        assert elsewhere(lambda: [c.backend for c in backend.explain("merge") if c.chosen]) != ["reference"]
    assert elsewhere(lambda: copied.run(backend.selected)) == "reference"
    assert backend.selected() == "auto"


def test_a_choice_is_its_tasks_own(nothing_forced):
    async def task(name, turns, child):
        seen = []
        with use_backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(backend.selected())
            seen.append(await asyncio.to_thread(backend.selected))
            started = asyncio.create_task(child())
        seen.append(backend.selected())
        return seen, await started

    async def child():
        await asyncio.sleep(0)
        return backend.selected()

    async def main():
        return await asyncio.gather(task("reference", 3, child), task("cpu", 1, child)), backend.selected()

    (first, second), outside = asyncio.run(main())
    assert first == (["reference"] * 4 + ["auto"], "reference")
    assert second == (["cpu"] * 2 + ["auto"], "cpu")
    assert outside == backend.selected() == "auto"


def test_choices_that_generators_hold_end_in_any_order(nothing_forced):
    def holds(name):
        with use_backend(name):
            yield backend.selected()

    first, second, third = holds("reference"), holds("cpu"), holds("triton")
    assert [next(g) for g in (first, second, third)] == ["reference", "cpu", "triton"]
    second.close()
    assert backend.selected() == "triton"
    first.close()
    assert backend.selected() == "triton"
    with use_backend("reference"):
        third.close()
        assert backend.selected() == "reference"
    assert backend.selected() == "auto"


def test_what_was_raised_inside_shows_where_a_choice_cannot_be_left(nothing_forced):
    choice = use_backend("reference")
    contextvars.copy_context().run(choice.__enter__)
    with pytest.raises(RuntimeError, match="was entered in another") as raised:
        choice.__exit__(KeyError, KeyError("inside"), None)
    assert "KeyError: 'inside'" in "".join(traceback.format_exception(raised.value))


def test_a_choice_cannot_be_left_in_another_thread(nothing_forced):
    choices = [use_backend("reference"), use_backend("cpu")]
    for choice in choices:
        choice.__enter__()
    copied = contextvars.copy_context()

    def leave(choice):
        with pytest.raises(
            RuntimeError, match=r"use_backend\('(reference|cpu)'\) was entered in another thread or task"
        ):
            choice.__exit__(None, None, None)
        return backend.selected()

    assert elsewhere(lambda: leave(choices[0])) == "auto"
    assert elsewhere(lambda: copied.run(leave, choices[1])) == "cpu"
    assert backend.selected() == "cpu"
    backend._choices.set(backend._default)


def test_use_backend_decorates_and_is_entered_once(nothing_forced):
    @use_backend("reference")
    def inside(deep):
        return inside(deep - 1) if deep else backend.selected()

    assert inside(2) == "reference"
    assert elsewhere(lambda: inside(1)) == "reference"
    choice = use_backend("cpu")
    with choice:
        assert backend.selected() == "cpu"
    with pytest.raises((RuntimeError, AttributeError)), choice:
        pass
    assert backend.selected() == "auto"


def test_no_compiled_code_is_reused_under_another_choice(nothing_forced):
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append("dla_fast_cpu" in graph.code)
        return graph

    x, weight = torch.randn(1, 3, 4, 4), torch.randn(3, 1, 4, 4)
    compiled = torch.compile(lambda x: functional.upsample(x, weight, 2), fullgraph=True, backend=look)

    def ran():
        """Whether kernels ran, and whether that was compiled now."""
        before = len(graphs)
        y = compiled(x)
        assert torch.allclose(y, functional.upsample(x, weight, 2), atol=1e-5)
        return y.shape == (1, 3, 8, 8), len(graphs) - before

    for new in (1, 0):
        assert ran() == (True, new)
        for name in ("reference", "cpu"):
            with use_backend(name):
                assert ran() == (True, new)
                assert elsewhere(ran) == (True, 0)
    assert graphs == [True, False, True]
    with use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' was asked for and cannot run upsample"):
        compiled(x)

    async def alternate(name):
        with use_backend(name):
            for _ in range(3):
                assert ran() == (True, 0)
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(alternate("reference"), alternate("cpu"))

    asyncio.run(main())


def test_choices_inside_of_compiled_code(nothing_forced):
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append([name for name in ("dla_fast_cpu", "conv_transpose2d") if name in graph.code])
        return graph

    weight = torch.randn(3, 1, 4, 4)

    def inside(x):
        with use_backend("reference"):
            x = functional.upsample(x, weight, 2)
            with use_backend("cpu"):
                assert backend.selected() == "cpu"
            assert backend.selected() == "reference"
        return functional.upsample(x, weight, 2)

    compiled = torch.compile(inside, fullgraph=True, backend=look)
    x = torch.randn(1, 3, 2, 2)
    with use_backend("cpu"):
        torch.testing.assert_close(compiled(x), inside(x))
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), inside(x))
    assert graphs == [["dla_fast_cpu", "conv_transpose2d"], ["conv_transpose2d"]]

    def broken(x):
        with use_backend("reference"):
            torch._dynamo.graph_break()
            seen.append((backend.selected(), elsewhere(backend.selected)))
            x = functional.upsample(x, weight, 2)
        return functional.upsample(x, weight, 2)

    seen: list[tuple[str, str]] = []
    torch.testing.assert_close(torch.compile(broken, backend="eager")(x), inside(x))
    assert set(seen) == {("reference", "auto")}
    assert backend.selected() == "auto"


def test_meta_tensors_run_on_the_reference():
    assert call("meta").shape == (1, 4, 3, 3)


def test_the_reason_of_a_fallback_is_logged_once(caplog, monkeypatch):
    backend._logged.clear()
    monkeypatch.setitem(backend._chosen, ("upsample", "cpu"), "reference")
    monkeypatch.setattr(backend.ops, "missing", lambda name, op: f"there is no {name} kernel for {op} today")
    with caplog.at_level(logging.INFO, logger="dla_fast"):
        for _ in range(3):
            functional.upsample(torch.randn(1, 3, 4, 4), torch.randn(3, 1, 4, 4), 2)
    (record,) = caplog.records
    assert "upsample runs on the PyTorch reference" in record.getMessage()
    assert "no cpu kernel for upsample today" in record.getMessage()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment():
    code = "from dla_fast import backend; print(backend.resolve('aggregate', 'cpu', __import__('torch').float32))"
    assert run(code, DLA_FAST_BACKEND="reference").stdout == "reference\n"
    assert run(code, DLA_FAST_BACKEND="cpu").stdout == "cpu\n"
    assert "unknown backend 'fast'" in run(code, DLA_FAST_BACKEND="fast").stderr
    code = f"{code}\nwith backend.use_backend('cpu'): print(backend.selected())"
    assert run(code, DLA_FAST_BACKEND="cpu", DLA_FAST_DISABLE="1").stdout == "reference\nreference\n"


ISAS = ["generic", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]


def test_emulation_is_chosen_by_name_alone():
    code = "from dla_fast import _C; print(_C.cpu_isa())"
    best = run(code, DLA_FAST_CPU_ISA="").stdout.strip()
    assert best in ISAS[:-1]
    assert run(code, DLA_FAST_CPU_ISA="amx").stdout.strip() == best
    if best in ("avx512_bf16", "amx"):
        assert run(code, DLA_FAST_CPU_ISA="amx_emulated").stdout.strip() == "amx_emulated"


def test_every_instruction_set_holds_the_contract():
    """The kernels are compiled once for each; what this machine can run of them is held to the same bounds."""
    from dla_fast import _C

    assert _C.cpu_isa() in ISAS
    # The one in use is what the rest of the tests runs.
    for isa in ISAS[: ISAS.index(_C.cpu_isa())]:
        names = ("aggregate", "batch_norm_act", "cpu_convolution", "cpu_few_pixels", "cpu_finish")
        tests = [f"tests/test_{name}.py" for name in names]
        chosen = "many_blocks or norm_variants or any_shape or inference or one_to_eight or many_tiles or nan or far"
        chosen += " or ragged or test_error"
        arguments = ["-q", "-x", "-p", "no:cacheprovider", *tests, "-k", chosen]
        code = f"import pytest, sys; from dla_fast import _C; print(_C.cpu_isa()); sys.exit(pytest.main({arguments}))"
        done = run(code, DLA_FAST_CPU_ISA=isa)
        assert done.returncode == 0, f"{isa}\n{done.stdout[-3000:]}"
        assert done.stdout.startswith(f"{isa}\n")
        assert " passed" in done.stdout


def test_a_choice_made_while_a_call_is_compiled_breaks_no_guard(monkeypatch):
    """The first call on a device is what fills the table of choices, and it may be a compiled one."""
    torch._dynamo.reset()
    monkeypatch.delitem(backend._chosen, ("aggregate", "cpu"))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled().shape == (1, 4, 3, 3)
    assert backend._chosen["aggregate", "cpu"] == "cpu"
