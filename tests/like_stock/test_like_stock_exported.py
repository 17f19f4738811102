"""Programs made of a model: torch.export with symbolic sizes, AOTInductor, ONNX, and compiled autograd."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from pairs import compare, freeze, image, loss_of, pair, step
from torch.export import Dim, export

# Images, height and width, all symbols; the networks want multiples of eight.
SIZES = {"x": {0: Dim("n", min=1, max=64), 2: 8 * Dim("h", min=1, max=64), 3: 8 * Dim("w", min=1, max=64)}}
OTHERS = [(1, 16, 32), (3, 24, 40), (2, 48, 16)]


def targets(program):
    return [str(node.target) for node in program.graph.nodes]


def infer(call, x):
    with torch.no_grad():
        return call(x)


@pytest.mark.parametrize("name, strict", [("adding", False), ("blocks", True)])
def test_exported_with_symbolic_sizes(name, strict):
    """The program of the stock model, operator by operator; it takes every size."""
    programs = []
    models = pair(name, verify=False)
    for model in models:
        programs.append(export(model.eval(), (image(),), dynamic_shapes=SIZES, strict=strict))
    assert targets(programs[0]) == targets(programs[1])
    run = programs[1].module()
    for i, size in enumerate(OTHERS):
        x = image(size, seed=i)
        torch.testing.assert_close(infer(run, x), infer(models[0], x), rtol=1e-9, atol=1e-9)


def test_exported_for_training():
    programs = [export(model.train(), (image(),), dynamic_shapes=SIZES) for model in pair("node", verify=False)]
    assert targets(programs[0]) == targets(programs[1])
    assert "aten.batch_norm.default" in targets(programs[1])


@pytest.mark.parametrize("name", ["node", "blocks"])
def test_exported_by_names_of_arguments(name):
    """A swapped module alone, its sizes by the names that its original forward gives the arguments."""
    shapes = {0: Dim("n", min=1), 2: Dim("h", min=1), 3: Dim("w", min=1)}
    maps = [torch.randn(2, 4, 5, 6, dtype=torch.float64) for _ in range(2)]
    stock, swapped = (m.root if name == "node" else m.first for m in pair(name, verify=False))
    sizes = {"xs": (shapes, shapes)} if name == "node" else {"x": shapes, "shortcut": shapes}
    programs = [export(m.eval(), tuple(maps), dynamic_shapes=sizes) for m in (stock, swapped)]
    assert targets(programs[0]) == targets(programs[1])
    assert list(programs[0].graph_signature.user_inputs) == list(programs[1].graph_signature.user_inputs)


def test_frozen_models_export_what_they_were_made_of():
    stock, swapped = pair("blocks", verify=False)
    freeze(swapped.eval())
    infer(swapped, image())
    programs = [export(model.eval(), (image(),), dynamic_shapes=SIZES) for model in (stock, swapped)]
    assert targets(programs[0]) == targets(programs[1])
    assert list(programs[0].state_dict) == list(programs[1].state_dict)


def test_compiled_ahead_of_time(tmp_path):
    """AOTInductor: a library without Python, of one program for every size."""
    stock, swapped = pair("node", verify=False, dtype=torch.float32)
    x = image(dtype=torch.float32)
    sizes = {"x": {0: Dim("n", min=1, max=64), 2: Dim("h", min=2, max=64), 3: Dim("w", min=2, max=64)}}
    program = export(swapped.eval(), (x,), dynamic_shapes=sizes)
    # The compiler's time is most of this test's.
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp_cache_precompile_headers": False, "cpp.simdlen": 1}
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "node.pt2"), inductor_configs=quick
    )
    run = torch._inductor.aoti_load_package(package)
    for i, size in enumerate(OTHERS):
        x = image(size, dtype=torch.float32, seed=i)
        torch.testing.assert_close(infer(run, x), infer(stock.eval(), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["concatenating", "adding"])
def test_onnx_with_dynamic_axes(name):
    """The stock model's file to the byte, computed by ONNX Runtime at three sizes."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    stock, swapped = pair(name, verify=False, dtype=torch.float32)
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "h", 3: "w"}}
    files = []
    for model in (stock, swapped):
        file = io.BytesIO()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(), (image(dtype=torch.float32),), file, dynamo=False, input_names=["x"],
                output_names=["y"], dynamic_axes=axes,
            )  # fmt: skip
        files.append(file.getvalue())
    assert files[0] == files[1]
    session = runtime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
    for i, size in enumerate(OTHERS):
        x = image(size, dtype=torch.float32, seed=i)
        (got,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), infer(stock, x), rtol=1e-3, atol=1e-3)


def compiled_backward(model, x):
    """Forwards run eagerly, their backward passes captured as graphs."""
    compiler = torch.compile(backend="eager")
    outputs = []
    for i in range(2):
        y = model(x + i)
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss_of(y).backward()
        outputs.append(y)
    return outputs


def compiled_both_ways(model, x):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        return torch.compile(step, backend="eager")(model, x)


CASES = [(compiled_backward, "blocks"), (compiled_both_ways, "node")]


@pytest.mark.parametrize("scenario, name", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_compiled_autograd(scenario, name):
    compare(scenario, name, verify=False)
