"""The build, what it installs, and what an import does, each in a copy of the tree and a process of its own."""

from __future__ import annotations

import ensurepip
import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from building import (
    COMPILER,
    NVCC,
    ROOT,
    add_cuda,
    at_startup,
    blocked,
    build_record,
    copy_tree,
    make_tiny,
    make_toolkit,
    pretend_cuda,
    run,
    script,
    setup,
)

from dla_fast import _extension, ops

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


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DLA_FAST_BUILD_EXT", "DLA_FAST_BUILD_CUDA"])
def test_a_setting_that_means_nothing_is_an_error(tree, name):
    result = setup(tree, "--version", **{name: "maybe"})
    assert result.returncode != 0
    assert result.stderr.strip() == f"{name}=maybe: expected 0, 1 or auto"


def test_cuda_without_the_extension_is_a_contradiction(tree):
    result = setup(tree, "--version", DLA_FAST_BUILD_EXT="0", DLA_FAST_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "DLA_FAST_BUILD_EXT=0 switches it off" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
@needs_compiler
def test_cuda_asked_for_and_not_to_be_had(tiny_tree):
    (tiny_tree / "csrc" / "cuda").mkdir()
    (tiny_tree / "csrc" / "cuda" / "nothing.cu").write_text("")
    result = setup(tiny_tree, "build_ext", "--inplace", DLA_FAST_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "DLA_FAST_BUILD_CUDA=1, but the CUDA kernels cannot be built" in result.stderr
    assert "not a CUDA build" in result.stderr


# --- setuptools -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_setuptools(tmp_path_factory):
    """A path entry with the setuptools that comes with Python: 65.5 with Python 3.10 and 3.11, none from 3.12 on."""
    wheels = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("setuptools-*.whl"))
    if not wheels:
        pytest.skip("this Python brings no setuptools")
    folder = tmp_path_factory.mktemp("setuptools")
    with zipfile.ZipFile(wheels[-1]) as archive:
        archive.extractall(folder)
    return str(folder)


def test_pyproject_leaves_to_setup_py_what_setuptools_reads_differently():
    """Before 77 setuptools refuses a license that is a string or files of it; since then a table is on its way out."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text.split("[project]\n", 1)[1].split("\n[", 1)[0]
    assert not re.search(r"^license", project, re.MULTILINE)
    dynamic = re.search(r"^dynamic = (.*)$", project, re.MULTILINE)
    assert dynamic is not None
    assert '"license"' in dynamic[1]
    assert 'requires = ["setuptools>=64"' in text


def test_an_old_setuptools_builds_in_place(tree, old_setuptools):
    result = setup(tree, "build_ext", "--inplace", DLA_FAST_BUILD_EXT="0", PYTHONPATH=old_setuptools)
    assert result.returncode == 0, result.stderr
    assert "switched off" in result.stdout


@needs_compiler
def test_an_old_setuptools_compiles(tiny_tree, old_setuptools):
    env = {"DLA_FAST_BUILD_EXT": "1", "DLA_FAST_BUILD_CUDA": "0", "PYTHONPATH": old_setuptools}
    result = setup(tiny_tree, "build_ext", "--inplace", **env)
    assert result.returncode == 0, result.stderr
    assert build_record(tiny_tree / "dla_fast")["WITH_CPU"] is True
    result = run([sys.executable, "-c", "from dla_fast._extension import STATUS; print(STATUS)"], tiny_tree)
    assert "loaded=True" in result.stdout, result.stderr


@pytest.mark.parametrize("age", ["old", "installed"])
def test_an_sdist_carries_the_license_with_every_setuptools(tree, tmp_path, age, request):
    path = request.getfixturevalue("old_setuptools") if age == "old" else None
    result = setup(tree, "sdist", "--dist-dir", str(tmp_path / "out"), PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "project.license" not in result.stderr
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as tar:
        inside = {name.split("/", 1)[1]: name for name in tar.getnames() if "/" in name}
        metadata = tar.extractfile(inside["PKG-INFO"]).read().decode()
    assert "LICENSE" in inside
    assert "License-File: LICENSE" in metadata
    # What is not built yet has no torch of its own.
    assert "torch==" not in metadata
    assert re.search(r"^License(-Expression)?: BSD-3-Clause$", metadata, re.MULTILINE)


def test_a_setuptools_that_is_too_old_is_one_line(tree, tmp_path):
    path = at_startup(tmp_path / "start", "import setuptools\nsetuptools.__version__ = '63.4.3'\n")
    result = setup(tree, "build_ext", "--inplace", PYTHONPATH=path)
    assert result.returncode != 0
    said = (result.stdout + result.stderr).strip()
    assert said == (
        'dla_fast needs setuptools >= 64 to build, this is setuptools 63.4.3: pip install -U "setuptools>=64"'
    )


# --- without torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build_ext", "bdist_wheel", "dist_info"])
def test_without_torch_the_build_stops_with_one_line(tree, tmp_path, command):
    result = setup(tree, command, PYTHONPATH=blocked(tmp_path / "block", "torch"))
    assert result.returncode != 0
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert len(said) == 1, said
    assert said[0].startswith('dla_fast needs torch to build: pip install "torch>=2.11"')
    assert "pip install --no-build-isolation ." in said[0]


def test_sdist_needs_no_torch_and_has_the_sources(tree, tmp_path):
    (tree / "dla_fast" / "_build.py").write_text("TORCH_VERSION = 'of another machine'\n")
    result = setup(tree, "sdist", "--dist-dir", str(tmp_path / "out"), PYTHONPATH=blocked(tmp_path / "block", "torch"))
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    want = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")}
    want |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "dla_fast/__init__.py", "dla_fast/swap/__init__.py"}
    assert want <= names, want - names
    assert "dla_fast/_build.py" not in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_switched_off_the_wheel_is_pure_python_and_needs_no_torch(tree, tmp_path):
    env = {"DLA_FAST_BUILD_EXT": "0", "PYTHONPATH": blocked(tmp_path / "block", "torch")}
    result = setup(tree, "bdist_wheel", "--dist-dir", str(tmp_path / "out"), **env)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    assert "switched off" in str(build_record(tmp_path / "site" / "dla_fast")["REASON"])
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert re.search(r"^License(-Expression)?: BSD-3-Clause$", metadata, re.MULTILINE)
    assert 'Requires-Dist: triton>=3.6; sys_platform == "linux" and extra == "triton"' in metadata


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


# --- what an import does ----------------------------------------------------------------------------------------------


def test_import_is_light():
    """No CUDA context, none of the optional packages, and less than half a second over torch (best of three)."""
    code = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import dla_fast; "
        "print(time.perf_counter() - start); assert not torch.cuda.is_initialized(); "
        "print(sorted({'timm', 'sklearn', 'matplotlib', 'tqdm', 'triton'} & (set(sys.modules) - before)))"
    )
    seconds = []
    for _ in range(3):
        result = run([sys.executable, "-c", code], ROOT)
        assert result.returncode == 0, result.stderr
        took, extras = result.stdout.splitlines()
        assert extras == "[]"
        seconds.append(float(took))
        if min(seconds) < 0.5:
            break
    assert min(seconds) < 0.5, seconds


def test_every_operator_of_what_was_built_is_registered():
    built = {
        "cpu": _extension.STATUS.loaded,
        "cuda": _extension.STATUS.loaded and _extension.STATUS.has_cuda,
        "triton": True,
    }
    assert set(built) == set(ops.NAMESPACES)
    units = {"cuda": ("aggregate_inference", "batch_norm_act", "upsample", "upsample_add")}
    for backend, there in built.items():
        for unit in units.get(backend, ops.UNITS) if there else ():
            assert ops.find_missing(backend, unit, ops.NAMESPACES[backend]) is None


def test_import_without_triton(tmp_path):
    path = os.pathsep.join([blocked(tmp_path, "triton"), str(ROOT)])
    code = "import dla_fast; print([c.reason for c in dla_fast.backend.explain('aggregate') if c.backend == 'triton'])"
    result = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "None" not in result.stdout
