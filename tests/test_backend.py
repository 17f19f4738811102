"""Which backend serves a call, and how one is forced."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

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
