"""Settings of the build, what it packs and what an import does, each in a copy of the tree and a process of its own."""

from __future__ import annotations

import ensurepip
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from building import COMPILER, ROOT, at_startup, blocked, build_record, copy_tree, make_tiny, run, setup

from dla_fast import _extension, ops

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


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
