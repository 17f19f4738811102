"""What a stranger who installs the package meets: a torch that stays, and reasons that say what went wrong.

Seconds each; ``make test-install`` goes the whole way with the real packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from building import (
    COMPILER,
    ROOT,
    add_cuda,
    at_startup,
    build_record,
    copy_tree,
    make_tiny,
    make_toolkit,
    pretend_cuda,
    run,
    script,
    setup,
)

TORCH = importlib.metadata.version("torch")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


@pytest.fixture
def tiny_tree(tree):
    return make_tiny(tree)


@pytest.fixture
def cuda_tree(tiny_tree):
    return add_cuda(tiny_tree)


# --- which torch ------------------------------------------------------------------------------------------------------


def fake_wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    info = f"{name}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Packages that have nothing in them, of which the newest torchvision asks for a newer torch."""
    folder = tmp_path_factory.mktemp("index")
    for version in (TORCH, "99.0"):
        fake_wheel(folder, "torch", version)
    fake_wheel(folder, "torchvision", "1.0", f"torch=={TORCH.split('+')[0]}")
    fake_wheel(folder, "torchvision", "2.0", "torch==99.0")
    fake_wheel(folder, "timm", "1.5", "torch", "torchvision")
    for name in ("tqdm", "scikit_learn", "matplotlib"):
        fake_wheel(folder, name, "9.0")
    return folder


@needs_compiler
@pytest.mark.parametrize(
    ("target", "built", "want"),
    [
        ([".[demo]"], "1", {"torch": TORCH, "torchvision": "1.0"}),
        (["-e", ".[demo]"], "1", {"torch": TORCH, "torchvision": "1.0"}),
        # What went wrong without the pin, and is right where there is no extension.
        ([".[demo]"], "0", {"torch": "99.0", "torchvision": "2.0"}),
    ],
    ids=["built", "editable", "not built"],
)
def test_pip_keeps_the_torch_that_the_extension_is_for(tiny_tree, index, tmp_path, target, built, want):
    """Whatever else is installed at the same time; nothing that is here already is to decide it."""
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run", "--ignore-installed"]
    options = ["--no-build-isolation", "--no-index", "--find-links", str(index), "--report", str(tmp_path / "plan")]
    # The machine's own settings of pip, such as constraints, are left out.
    result = run([*pip, *options, *target], tiny_tree, DLA_FAST_BUILD_EXT=built, PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan").read_text())["install"]
    chosen = {each["metadata"]["name"]: each["metadata"]["version"] for each in plan}
    assert {name: chosen[name] for name in want} == want


def test_a_torch_that_pip_does_not_know_is_not_asked_for(tiny_tree, tmp_path):
    """One found on PYTHONPATH, say, beside an installed one."""
    path = at_startup(tmp_path / "start", "import torch\ntorch.__version__ = torch.__version__.__class__('98.0')\n")
    result = setup(tiny_tree, "dist_info", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    (metadata,) = tiny_tree.glob("*.dist-info/METADATA")
    assert "Requires-Dist: torch>=2.11\n" in metadata.read_text()


# --- sources that hide what is installed ------------------------------------------------------------------------------


IMPORT = """
import sys, warnings
# This environment's own package may be an editable install, whose hook would find what the sources lack.
sys.meta_path[:] = [found for found in sys.meta_path if "__editable__" not in getattr(found, "__module__", "")]
{hook}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from dla_fast import _extension
print(_extension.STATUS.loaded)
print(_extension.STATUS.reason)
print(len([w for w in caught if "dla_fast" in str(w.message)]))
"""

# As setuptools does it for an editable install: a finder behind Python's own.
HOOK = """
import importlib.util, pathlib
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        file = pathlib.Path({site!r}, *name.split(".")).with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("way", ["path", "hook"])
def test_an_unbuilt_checkout_says_that_it_hides_what_is_installed(tree, tmp_path, way):
    site = tmp_path / "site"
    shutil.copytree(tree / "dla_fast", site / "dla_fast")
    (site / "dla_fast" / "_build.py").write_text("WITH_CPU = True\n")
    code = IMPORT.format(hook=HOOK.format(site=str(site)) if way == "hook" else "")
    result = run([sys.executable, "-c", code], tree, PYTHONPATH=str(site) if way == "path" else None)
    assert result.returncode == 0, result.stderr
    loaded, reason, warned = result.stdout.splitlines()
    assert loaded == "False"
    assert f"was not built in {tree}/dla_fast, and these sources hide the dla_fast in {site}/dla_fast; " in reason
    assert "run from another folder than the checkout, or build in it" in reason
    assert warned == "1"


def test_an_unbuilt_checkout_on_its_own_says_how_to_build_it(tree):
    result = run([sys.executable, "-c", IMPORT.format(hook="")], tree)
    assert result.returncode == 0, result.stderr
    _, reason, warned = result.stdout.splitlines()
    assert reason.startswith("the C++ extension was not built: in dla_fast's checkout run")
    assert warned == "0"


@pytest.mark.parametrize(
    ("env", "status", "by"),
    [
        ({}, 4, "module"),
        ({}, 4, "script"),
        ({"DLA_FAST_DISABLE": "1"}, 0, "module"),
        ({"DLA_FAST_TEST_BACKENDS": "triton"}, 0, "module"),
    ],
    ids=["kernels", "bare pytest", "disabled", "triton"],
)
def test_the_tests_do_not_run_without_what_they_test(tree, env, status, by):
    """Else an unbuilt checkout passes: on the reference, and without the tests that find no kernel to run.

    The script leaves the checkout off the path, and would test what is installed.
    """
    pytest_script = Path(sys.executable).with_name("pytest")
    if by == "script" and not pytest_script.exists():
        pytest.skip("no pytest beside this Python")
    command = [str(pytest_script)] if by == "script" else [sys.executable, "-m", "pytest"]
    (tree / "tests").mkdir()
    (tree / "benchmarks" / "gates").mkdir(parents=True)
    for name in ("tests/conftest.py", "tests/serving.py", "benchmarks/gates/quick_interpreter.py"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "tests" / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    result = run([*command, "-q", "-p", "no:cacheprovider"], tree, **env)
    assert result.returncode == status, result.stdout + result.stderr
    if status:
        said = [line for line in result.stderr.splitlines() if line]
        assert said[0].startswith("ERROR: the C++ extension was not built")
        assert len(said) == 2
    else:
        assert "1 passed" in result.stdout


# --- what the compiler said -------------------------------------------------------------------------------------------


def without_ninja(folder: Path) -> dict[str, str | None]:
    """Settings under which torch compiles file by file."""
    script(folder / "bin" / "ninja", "#!/bin/sh\nexit 1\n")
    return {"PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_the_first_error_is_the_reason(tiny_tree, tmp_path, ninja):
    (tiny_tree / "csrc" / "bindings.cpp").write_text("#warning so what\n#error first\n#error second\n")
    result = setup(tiny_tree, "build_ext", "--inplace", **({} if ninja else without_ninja(tmp_path / "none")))
    assert result.returncode == 0, result.stderr
    assert ("ninja: build stopped" in result.stdout) == ninja
    assert "#error second" in result.stdout
    reason = "the C++ extension was not built: compilation failed: csrc/bindings.cpp:2:2: error: #error first"
    assert build_record(tiny_tree / "dla_fast")["REASON"] == reason
    doctor = run([sys.executable, "-m", "dla_fast", "doctor"], tiny_tree)
    assert reason in doctor.stdout


@needs_compiler
def test_an_error_of_the_linker_is_the_reason(tiny_tree):
    text = (tiny_tree / "setup.py").read_text()
    assert text.count('"extra_link_args": link') == 1
    (tiny_tree / "setup.py").write_text(text.replace('"extra_link_args": link', '"extra_link_args": ["-lnowhere"]'))
    result = setup(tiny_tree, "build_ext", "--inplace")
    assert result.returncode == 0, result.stderr
    reason = str(build_record(tiny_tree / "dla_fast")["REASON"])
    assert "compilation failed: " in reason
    assert "nowhere" in reason


# Knows its version, which torch asks for first, and no source.
NVCC = """#!/bin/sh
[ "$*" = --version ] && exec echo "Cuda compilation tools, release {version}, V{version}.1"
echo "{tree}/csrc/cuda/nothing.cu(3): error: identifier \\"nothing\\" is undefined" >&2
echo '1 error detected in the compilation of "nothing.cu".' >&2
exit 2
"""


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_cuda_sources_that_do_not_compile_leave_the_cpu_kernels(cuda_tree, tmp_path, ninja):
    nvcc = NVCC.format(version=torch.version.cuda or "13.0", tree=cuda_tree)
    env = {} if ninja else without_ninja(tmp_path / "none")
    env |= {"PYTHONPATH": pretend_cuda(tmp_path / "start"), "CUDA_HOME": str(make_toolkit(tmp_path / "cuda", nvcc))}
    result = setup(cuda_tree, "build_ext", "--inplace", **env)
    assert result.returncode == 0, result.stderr
    assert "1 error detected in the compilation" in result.stdout
    record = build_record(cuda_tree / "dla_fast")
    assert record["WITH_CPU"] is True
    error = 'compilation failed: csrc/cuda/nothing.cu(3): error: identifier "nothing" is undefined'
    assert record["CUDA_REASON"] == f"the CUDA kernels were not built: {error}"
    doctor = run([sys.executable, "-m", "dla_fast", "doctor"], cuda_tree)
    assert "C++ extension  loaded" in doctor.stdout
    assert error in doctor.stdout

    result = setup(cuda_tree, "build_ext", "--inplace", DLA_FAST_BUILD_CUDA="1", **env)
    assert result.returncode != 0
    assert f"DLA_FAST_BUILD_CUDA=1, but {error}" in result.stderr


@needs_compiler
def test_an_nvcc_for_another_cuda_is_told_in_whole_words(cuda_tree, tmp_path):
    nvcc = NVCC.format(version="1.5", tree=cuda_tree)
    env = {"PYTHONPATH": pretend_cuda(tmp_path / "start"), "CUDA_HOME": str(make_toolkit(tmp_path / "cuda", nvcc))}
    result = setup(cuda_tree, "build_ext", "--inplace", **env)
    assert result.returncode == 0, result.stderr
    reason = str(build_record(cuda_tree / "dla_fast")["CUDA_REASON"])
    assert "The detected CUDA version (1.5) mismatches" in reason


@needs_compiler
@pytest.mark.parametrize(
    ("given", "part"),
    [(True, "bin/nvcc"), (True, "include/cuda_runtime.h"), (False, "include/cuda_runtime.h")],
    ids=["given without nvcc", "given without headers", "found without headers"],
)
def test_half_a_toolkit_is_named(cuda_tree, tmp_path, given, part):
    """Torch takes any folder for one; without the headers every file would fail."""
    home = make_toolkit(tmp_path / "cuda", "#!/bin/sh\nexit 1\n")
    (home / part).unlink()
    env = {"PYTHONPATH": pretend_cuda(tmp_path / "start"), "CUDA_HOME": None, "CUDA_PATH": None}
    if given:
        env["CUDA_HOME"] = str(home)
        reason = f"CUDA_HOME={home} has no {part}"
    else:
        env["PATH"] = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
        reason = f"{home} has no {part} (set CUDA_HOME)"
    result = setup(cuda_tree, "build_ext", "--inplace", DLA_FAST_BUILD_CUDA="1", **env)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"DLA_FAST_BUILD_CUDA=1, but the CUDA kernels cannot be built: {reason}"


# --- what is to be seen -----------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_commands_are_shown_on_request_and_warnings_always(tiny_tree, tmp_path, ninja):
    with (tiny_tree / "csrc" / "bindings.cpp").open("a") as source:
        source.write("#warning look here\n")
    env = {} if ninja else without_ninja(tmp_path / "none")
    # Without ninja what is there already is not compiled again.
    for verbose in (None, "1"):
        shutil.rmtree(tiny_tree / "build", ignore_errors=True)
        result = setup(tiny_tree, "build_ext", "--inplace", DLA_FAST_VERBOSE=verbose, **env)
        assert result.returncode == 0, result.stderr
        assert "warning: #warning look here" in result.stdout
        assert (" -fvisibility=hidden " in result.stdout) == (verbose == "1")
        if verbose is None:
            assert ("[1/1] csrc/bindings.cpp" if ninja else "csrc/bindings.cpp") in result.stdout.splitlines()
