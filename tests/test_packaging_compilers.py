"""The build without a compiler, with a broken one, and with one that works: what runs afterwards, and why not more."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from building import (
    COMPILER,
    NVCC,
    add_cuda,
    build_record,
    copy_tree,
    make_tiny,
    make_toolkit,
    pretend_cuda,
    run,
    script,
    setup,
)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
RUN_ON_REFERENCE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dla_fast
import torch
from dla_fast import _extension
x = torch.randn(2, 3, 4, 4, requires_grad=True)
y = dla_fast.nn.AggregationNode(6, 5)(x, x)
y.sum().backward()
assert y.shape == (2, 5, 4, 4) and x.grad is not None
assert {c.backend for c in dla_fast.backend.explain("aggregate") if c.chosen} == {"reference"}
print(dla_fast.__file__)
print(_extension.STATUS.reason)
print(len([w for w in caught if "dla_fast" in str(w.message)]))
"""


# What the backends register has to be there whatever became of the extension.
TRITON_REGISTERED = """
import sys
import torch
from dla_fast import ops
names = {name for unit in ops.UNITS.values() for name in unit}
key = ops.NAMESPACES["triton"]
assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"dla_fast_triton::{name}", key) for name in names)
"""


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


@pytest.fixture
def tiny_tree(tree):
    return make_tiny(tree)


# --- without a compiler -----------------------------------------------------------------------------------------------


def no_compiler(tmp_path: Path) -> dict[str, str]:
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty)}


def test_without_a_compiler_it_installs_and_runs_on_the_reference(tree, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    installed = run([*pip, str(site), "."], tree, **no_compiler(tmp_path))
    assert installed.returncode == 0, installed.stderr
    result = run([sys.executable, "-c", RUN_ON_REFERENCE], tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    where, reason, warned = result.stdout.splitlines()
    assert where.startswith(str(site))
    assert reason == "the C++ extension was not built: no C++ compiler was found (c++, g++, clang++)"
    assert warned == "0"
    doctor = run([sys.executable, "-m", "dla_fast", "doctor"], tmp_path, PYTHONPATH=str(site))
    assert doctor.returncode == 0
    assert reason in doctor.stdout


def test_without_a_compiler_an_extension_asked_for_is_an_error(tree, tmp_path):
    result = setup(tree, "build_ext", "--inplace", DLA_FAST_BUILD_EXT="1", **no_compiler(tmp_path))
    assert result.returncode != 0
    why = "no C++ compiler was found (c++, g++, clang++)"
    assert result.stderr.strip() == f"DLA_FAST_BUILD_EXT=1, but the C++ extension cannot be built: {why}"


def test_a_compiler_that_does_not_exist_is_named(tree):
    result = setup(tree, "build_ext", "--inplace", DLA_FAST_BUILD_EXT="1", CXX="/nowhere/c++")
    assert result.returncode != 0
    assert "/nowhere/c++" in result.stderr


# --- with a compiler that is broken -----------------------------------------------------------------------------------


BROKEN = {
    "does not start": ("", "does not run: Exec format error"),
    "fails at everything": ("#!/bin/sh\necho broken >&2\nexit 1\n", "does not run: broken"),
    "knows its version": ('#!/bin/sh\n[ "$*" = --version ] && exec echo broken 1.0\nexit 1\n', "compilation failed"),
    "does nothing": ("#!/bin/sh\n", "compilation failed"),
}


@pytest.mark.parametrize(("program", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_compiler_leaves_triton_and_the_reference(tiny_tree, tmp_path, program, reason):
    compiler = script(tmp_path / "bin" / "c++", program)
    result = setup(tiny_tree, "build_ext", "--inplace", CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    assert "dla_fast: C++ extension not built" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr or reason == "compilation failed"
    record = build_record(tiny_tree / "dla_fast")
    assert record["WITH_CPU"] is record["WITH_CUDA"] is False
    assert reason in str(record["REASON"])
    result = run([sys.executable, "-c", RUN_ON_REFERENCE + TRITON_REGISTERED], tiny_tree)
    assert result.returncode == 0, result.stderr
    _, said, warned = result.stdout.splitlines()
    assert reason in said
    assert warned == "0"


@pytest.fixture
def cuda_tree(tiny_tree):
    return add_cuda(tiny_tree)


@pytest.fixture
def cuda_torch(tmp_path):
    return pretend_cuda(tmp_path / "start")


@needs_compiler
@pytest.mark.parametrize("knows", ["its version", "nothing"])
def test_a_broken_nvcc_leaves_the_rest(cuda_tree, cuda_torch, tmp_path, knows):
    text = NVCC.format(torch.version.cuda or "13.0") if knows == "its version" else "#!/bin/sh\nexit 1\n"
    env = {"CUDA_HOME": str(make_toolkit(tmp_path / "cuda", text)), "PYTHONPATH": cuda_torch}
    result = setup(cuda_tree, "build_ext", "--inplace", **env)
    assert result.returncode == 0, result.stderr
    assert "going on without it, see the compiler's output above" in result.stdout
    record = build_record(cuda_tree / "dla_fast")
    assert record["WITH_CPU"] is True
    assert record["WITH_CUDA"] is False
    assert str(record["CUDA_REASON"]).startswith("the CUDA kernels were not built: compilation failed: ")
    code = "from dla_fast._extension import STATUS; print(STATUS)" + TRITON_REGISTERED
    result = run([sys.executable, "-c", code], cuda_tree)
    assert result.returncode == 0, result.stderr
    assert "loaded=True" in result.stdout
    assert "has_cuda=False" in result.stdout

    result = setup(cuda_tree, "build_ext", "--inplace", DLA_FAST_BUILD_CUDA="1", **env)
    assert result.returncode != 0
    assert "DLA_FAST_BUILD_CUDA=1, but compilation failed" in result.stderr


@needs_compiler
def test_an_nvcc_that_is_a_script_leads_to_the_toolkit(cuda_tree, cuda_torch, tmp_path):
    toolkit = make_toolkit(tmp_path / "toolkit", NVCC.format(torch.version.cuda or "13.0"))
    # Beside a script there can be another toolkit's headers.
    make_toolkit(tmp_path, "")
    says = f'case "$*" in *dryrun*) echo "#\\$ TOP={toolkit}/bin/.." >&2;; esac'
    script(tmp_path / "bin" / "nvcc", f"#!/bin/sh\n{says}\nexit 1\n")
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    env = {"PATH": path, "PYTHONPATH": cuda_torch, "CUDA_HOME": None, "CUDA_PATH": None}
    result = setup(cuda_tree, "build_ext", "--inplace", **env)
    assert result.returncode == 0, result.stderr
    assert "nvcc is broken" in str(build_record(cuda_tree / "dla_fast")["CUDA_REASON"])
    assert "nvcc is broken" in result.stdout + result.stderr


# --- with a compiler --------------------------------------------------------------------------------------------------


@needs_compiler
def test_sources_that_do_not_compile(tiny_tree):
    (tiny_tree / "csrc" / "bindings.cpp").write_text("#error this does not compile\n")
    result = setup(tiny_tree, "build_ext", "--inplace")
    assert result.returncode == 0, result.stderr
    assert "dla_fast: C++ extension not built: compilation failed" in result.stdout
    record = build_record(tiny_tree / "dla_fast")
    assert record["WITH_CPU"] is False
    assert "compilation failed" in str(record["REASON"])
    result = run([sys.executable, "-c", RUN_ON_REFERENCE], tiny_tree)
    assert result.returncode == 0, result.stderr
    assert "compilation failed" in result.stdout

    result = setup(tiny_tree, "build_ext", "--inplace", DLA_FAST_BUILD_EXT="1")
    assert result.returncode != 0
    assert "DLA_FAST_BUILD_EXT=1, but compilation failed" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a tiny extension, unpacked."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.mktemp("wheel")
    tree = make_tiny(copy_tree(base / "tree"))
    # The record of another build, left behind in the tree, must not travel.
    (tree / "dla_fast" / "_build.py").write_text("TORCH_VERSION = 'stale'\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(base)]
    result = run([*pip, "."], tree, DLA_FAST_BUILD_EXT="1", MAX_JOBS="1")
    assert result.returncode == 0, result.stderr
    (path,) = base.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(base / "site")
    return base / "site"


def test_wheel_has_the_extension_and_its_record(wheel):
    package = wheel / "dla_fast"
    assert (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    record = build_record(package)
    assert record["TORCH_VERSION"] == torch.__version__
    assert record["WITH_CPU"] is True
    assert record["REASON"] is None
    assert record["COMPILER"]
    # The extension fits no other torch, so pip must not put another in its place.
    (metadata,) = wheel.glob("dla_fast-*.dist-info/METADATA")
    assert f"Requires-Dist: torch=={importlib.metadata.version('torch')}\n" in metadata.read_text()
    names = {path.relative_to(wheel).parts[0] for path in wheel.rglob("*") if path.is_file()}
    assert {name.split("-")[0] for name in names} == {"dla_fast"}
    result = run([sys.executable, "-c", "from dla_fast._extension import STATUS; print(STATUS)"], wheel)
    assert "loaded=True" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            f"TORCH_VERSION = {str(torch.__version__)!r}",
            "TORCH_VERSION = '2.11.0'",
            "was built for torch 2.11.0, this is",
        ),
        ("SANITIZE = None", "SANITIZE = 'address'", "was built with AddressSanitizer"),
        (None, None, "failed to load"),
    ],
    ids=["other torch", "sanitizer", "broken library"],
)
def test_an_extension_that_does_not_fit_is_one_warning_and_the_reference(wheel, tmp_path, old, new, reason):
    site = tmp_path / "site"
    shutil.copytree(wheel, site)
    record = site / "dla_fast" / "_build.py"
    if old is None:
        library = site / "dla_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        library.write_bytes(library.read_bytes()[:100])
    else:
        text = record.read_text()
        assert old in text
        record.write_text(text.replace(old, new))
    result = run([sys.executable, "-c", RUN_ON_REFERENCE], site)
    assert result.returncode == 0, result.stderr
    _, said, warned = result.stdout.splitlines()
    assert reason in said
    assert warned == "1"
