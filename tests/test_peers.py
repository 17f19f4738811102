"""Peers outside PyTorch: that they agree, run as they should, and what is said where they are missing.

The packages themselves where they are installed, else stand-ins with their interface, in which the exported network is
the module that it came from.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from bench_helpers import CPU, RATES, quick, run
from torch import nn

from dla_fast.bench import cases, exported, network_timing, networks, peers, timing

TINY = networks.Network("dla46_c", 64, 2)
OUTSIDE = ("onnxruntime", "openvino")


class Computer:
    """A stand-in for both packages, with what was asked of them."""

    def __init__(self) -> None:
        self.networks: list[nn.Module] = []
        self.settings: dict[str, object] = {}
        self.error = 0.0
        self.refuses_bfloat16 = False

    def export(self, model: nn.Module, images: torch.Tensor) -> bytes:
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        self.networks.append(model)
        return bytes([len(self.networks) - 1])

    def outputs(self, program: bytes, x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = networks.tensors_of(self.networks[program[0]](torch.from_numpy(x)))
        return [y.numpy() * (1 + self.error) for y in found]


def view(pointer: int, shape: tuple[int, ...]) -> np.ndarray:
    """The floats at an address."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(pointer)).reshape(shape)


def onnxruntime_of(computer: Computer) -> dict[str, object]:
    class SessionOptions:
        def add_session_config_entry(self, name: str, value: str) -> None:
            computer.settings[name] = value

    class Binding:
        def bind_input(self, name, device, device_id, dtype, shape, pointer):
            assert (name, device, dtype) == ("x", "cpu", np.float32)
            self.x, self.outputs = view(pointer, shape), []

        def bind_output(self, name, device, device_id, dtype, shape, pointer):
            self.outputs.append(view(pointer, shape))

    class InferenceSession:
        def __init__(self, program, options, providers):
            assert providers == ["CPUExecutionProvider"]
            computer.settings |= vars(options)
            self.program = program

        def get_outputs(self):
            found = computer.outputs(self.program, np.zeros((2, 3, 64, 64), np.float32))
            return [types.SimpleNamespace(name=f"y{i}", shape=list(y.shape)) for i, y in enumerate(found)]

        def io_binding(self):
            return Binding()

        def run_with_iobinding(self, binding):
            for target, y in zip(binding.outputs, computer.outputs(self.program, binding.x), strict=True):
                np.copyto(target, y)

    return {"SessionOptions": SessionOptions, "InferenceSession": InferenceSession}


def openvino_of(computer: Computer) -> dict[str, object]:
    class Request:
        def __init__(self, program):
            self.program = program

        def set_input_tensor(self, tensor):
            self.x = tensor.data

        def infer(self):
            self.found = computer.outputs(self.program, self.x)

        def get_output_tensor(self, i):
            return types.SimpleNamespace(data=self.found[i])

    class Compiled:
        def __init__(self, program, precision):
            self.program, self.precision = program, precision
            self.outputs = computer.outputs(program, np.zeros((2, 3, 64, 64), np.float32))

        def get_property(self, name):
            assert name == "INFERENCE_PRECISION_HINT"
            return types.SimpleNamespace(to_string=lambda: self.precision)

        def create_infer_request(self):
            return Request(self.program)

    class Core:
        def read_model(self, program):
            return program.read()

        def compile_model(self, program, device, settings):
            assert device == "CPU"
            computer.settings |= settings
            precision = settings["INFERENCE_PRECISION_HINT"]
            return Compiled(program, "f32" if computer.refuses_bfloat16 else precision)

    def tensor(data, shared_memory):
        assert shared_memory
        return types.SimpleNamespace(data=data)

    return {"Core": Core, "Tensor": tensor}


@pytest.fixture
def stand_ins(monkeypatch):
    """Both packages' stand-ins in the packages' place."""
    computer = Computer()
    members = {"onnx": {}, "onnxruntime": onnxruntime_of(computer), "openvino": openvino_of(computer)}
    for name, found in members.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(exported, "export", computer.export)
    return computer


@pytest.fixture
def packages(request):
    """The packages, or their stand-ins where one is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", *OUTSIDE)):
        request.getfixturevalue("stand_ins")


def without(monkeypatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))


def test_they_agree_and_are_timed(packages, monkeypatch):
    pauses, right = [], timing.time_runners
    monkeypatch.setattr(
        timing, "time_runners", lambda *args, **options: pauses.append(options["pause_s"]) or right(*args, **options)
    )
    outcome = network_timing.time_network(TINY, "inference", quick("eager", *OUTSIDE), RATES)
    assert pauses == [exported.PAUSE_S], "each runtime has the cores for itself"
    network_timing.time_network(TINY, "inference", quick("eager"), RATES)
    assert pauses[1] == 0
    assert [(r["impl"], r.get("error")) for r in outcome.records] == [
        (impl, None) for impl in ("dla_fast", "eager", *OUTSIDE)
    ]
    assert {r["layout"] for r in outcome.records if r["impl"] in OUTSIDE} == {"contiguous"}
    assert not outcome.skipped


def test_two_outputs_and_new_images(packages):
    network = networks.Network("dla34up", 64, 2)
    state = networks.initial_state("dla34up")
    settings = timing.Settings(CPU)
    expected = networks.implementation(network, "inference", "eager", state, settings)[0]()
    for impl in OUTSIDE:
        found = networks.implementation(network, "inference", impl, state, settings)[0]()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_one_that_disagrees_gives_no_figure(stand_ins):
    stand_ins.error = 0.01
    (record,) = network_timing.time_network(TINY, "inference", quick("eager", "openvino"), RATES).records
    assert record["impl"] == "openvino"
    assert "dla_fast and openvino differ in output 0" in record["error"]
    assert record["median_ms"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_and_precision(stand_ins, dtype):
    settings = timing.Settings(CPU, dtype=dtype, rounds=3, seconds=0.02, peers=("eager", *OUTSIDE))
    with networks.threads(1):
        outcome = network_timing.time_network(TINY, "inference", settings, RATES)
    assert stand_ins.settings["INFERENCE_NUM_THREADS"] == 1
    assert stand_ins.settings["INFERENCE_PRECISION_HINT"] == {"float32": "f32", "bfloat16": "bf16"}[dtype]
    impls = [r["impl"] for r in outcome.records]
    assert "openvino" in impls, outcome
    assert ("onnxruntime" in impls) == (dtype == "float32")
    if dtype == "float32":
        assert stand_ins.settings["intra_op_num_threads"] == 1
        assert stand_ins.settings["inter_op_num_threads"] == 1
    for model in stand_ins.networks:
        # What is rounded is rounded once: all compute with the same weights.
        assert all(torch.equal(p, p.to(settings.torch_dtype).float()) for p in model.parameters())


def test_a_processor_that_has_no_bfloat16(stand_ins):
    stand_ins.refuses_bfloat16 = True
    settings = timing.Settings(CPU, dtype="bfloat16", rounds=3, seconds=0.02, peers=("eager", "openvino"))
    outcome = network_timing.time_network(TINY, "inference", settings, RATES)
    assert [r["impl"] for r in outcome.records] == ["dla_fast", "eager"]
    assert outcome.skipped[0]["reason"] == "RuntimeError: it computes in f32 on this processor, not in bf16"


def test_only_whole_networks_in_inference_on_a_cpu():
    def found(device: str, mode: str) -> set[str]:
        return {*peers.network_implementations(device, torch.float32, OUTSIDE, mode)} & {*OUTSIDE}

    assert found("cpu", "inference") == {*OUTSIDE}
    assert not found("cpu", "training")
    assert not found("meta", "inference")
    assert not {*peers.implementations("aggregate", "cpu", torch.float32, OUTSIDE, "inference")} & {*OUTSIDE}


def test_absent_packages_are_one_line(monkeypatch, capsys):
    without(monkeypatch, "onnx", *OUTSIDE)
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)
    options = ["--models", "dla46_c", "--size", 64, "--batch", 2, "--modes", "inference", "--variants"]
    assert run("models", *options, "--peers", "eager", *OUTSIDE) == 0
    said = capsys.readouterr().out.splitlines()
    for impl in OUTSIDE:
        (line,) = [line for line in said if line.startswith(f"  {impl}: ")]
        assert line.startswith(f"  {impl}: onnx, {impl} not installed: pip install onnx {impl} (or ")
        assert '".[peers]"' in line
