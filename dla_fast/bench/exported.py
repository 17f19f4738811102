"""Whole networks outside PyTorch: ONNX Runtime and OpenVINO on the CPU, in inference, both from one ONNX export.

Each runs with as many threads as torch, and with one stream: what one caller waits for is timed, not throughput.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast import _extras

Call = Callable[[], list[Tensor]]
EXTRA = "peers"
# What each needs, by module: the package on the index.
MODULES = {
    "onnxruntime": {"onnx": "onnx", "onnxruntime": "onnxruntime"},
    "openvino": {"onnx": "onnx", "openvino": "openvino"},
}
# The dtypes that each computes in on a CPU; the network is given to it in float32, from which it rounds by itself.
DTYPES = {"onnxruntime": (torch.float32,), "openvino": (torch.float32, torch.bfloat16)}


# After this long the threads of every runtime sleep: OpenMP's wait actively for 7 to 15 ms after a call of torch.
PAUSE_S = 0.03


class Absent(RuntimeError):
    """A peer that is not installed; the message is one line that says how to install it."""


def runs(impl: str, device: str, dtype: torch.dtype, mode: str) -> bool:
    """Whether a peer exists for this: inference of whole networks on a CPU alone."""
    return device == "cpu" and mode == "inference" and dtype in DTYPES[impl]


def runner(impl: str, model: nn.Module, images: Tensor) -> Call:
    """A network in one of :data:`MODULES`, ready to be called.

    Args:
        impl: one of :data:`MODULES`.
        model: in evaluation mode; its parameters have the values of ``images``' dtype.
        images: (N, 3, H, W), of one of the dtypes of :data:`DTYPES`; read where they lie, in NCHW.

    Returns:
        One pass; gives the outputs in float32, which the next call overwrites.

    Raises:
        Absent: the package is not installed.
    """
    absent = _extras.missing(MODULES[impl], EXTRA)
    if absent is not None:
        raise Absent(absent)
    x = images.float().contiguous()
    program = export(model.float(), x)
    return _onnxruntime(program, x) if impl == "onnxruntime" else _openvino(program, x, images.dtype)


def export(model: nn.Module, images: Tensor) -> bytes:
    """The network as ONNX, for images of this size and number; its outputs are called y0, y1, …"""
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter that needs nothing but onnx itself says at length that another one is the default.
        warnings.simplefilter("ignore")
        outputs = model(images)
        count = 1 if isinstance(outputs, Tensor) else len(outputs)
        # Its annotation has paths alone.
        program: Any = io.BytesIO()
        names = [f"y{i}" for i in range(count)]
        torch.onnx.export(model, (images,), program, dynamo=False, input_names=["x"], output_names=names)
    exported: bytes = program.getvalue()
    return exported


def _onnxruntime(program: bytes, x: Tensor) -> Call:
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Within a pass its threads wait actively, after it they sleep: the next to be timed needs the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    outputs = [torch.empty(output.shape) for output in session.get_outputs()]
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, x.numpy().dtype, x.shape, x.data_ptr())
    for output, t in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(output.name, "cpu", 0, x.numpy().dtype, t.shape, t.data_ptr())

    def call(kept: Tensor = x) -> list[Tensor]:
        session.run_with_iobinding(binding)
        return outputs

    return call


def _openvino(program: bytes, x: Tensor, dtype: torch.dtype) -> Call:
    ov: Any = importlib.import_module("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Without the hint it computes float32 in bfloat16 where the processor has matrix units for that.
        "INFERENCE_PRECISION_HINT": precision,
        # Its threads stay where the system puts them, as everybody's do.
        "ENABLE_CPU_PINNING": False,
    }
    core = ov.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(program)), "CPU", settings)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen != precision:
        raise RuntimeError(f"it computes in {chosen} on this processor, not in {precision}")
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def call(kept: Tensor = x) -> list[Tensor]:
        request.infer()
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(compiled.outputs))]

    return call
