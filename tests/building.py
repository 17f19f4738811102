"""What the tests of the build share: copies of the tree, and stand-ins for sources, compilers and toolkits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# Stands in for the real sources, which take minutes: an extension module without torch's headers compiles in a second.
TINY_SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit__C(void) { return PyModule_Create(&module); }
"""

# torch asks nvcc for its version first, and compares it with that of its own CUDA.
NVCC = """#!/bin/sh
[ "$*" = --version ] && exec echo "Cuda compilation tools, release {0}, V{0}.1"
echo "nvcc is broken" >&2
exit 1
"""


def copy_tree(target: Path) -> Path:
    """The sources without anything that was built in them."""
    keep_out = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.py", "out", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, target, ignore=keep_out)
    return target


def run(command: list[str], cwd: Path, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Run with the environment's own settings of the build taken out, and ``env`` put in (None removes)."""
    full = {
        k: v for k, v in os.environ.items() if not k.startswith("DLA_FAST_") and k not in ("CC", "CXX", "PYTHONPATH")
    }
    for key, value in env.items():
        if value is None:
            full.pop(key, None)
        else:
            full[key] = value
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False)


def setup(tree: Path, *arguments: str, **env: str | None) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", *arguments], tree, **env)


def make_tiny(tree: Path) -> Path:
    """A copy of the tree with one source that compiles in a second."""
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "bindings.cpp").write_text(TINY_SOURCE)
    return tree


def add_cuda(tree: Path) -> Path:
    """The same with a CUDA source."""
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "nothing.cu").write_text("")
    return tree


def pretend_cuda(folder: Path) -> str:
    """A path entry that makes a CUDA build of a torch that is none, as far as compiling goes."""
    code = """
import torch
if torch.version.cuda is None:
    torch.version.cuda = "13.0"
    torch.cuda._is_compiled = lambda: True
    torch.cuda.is_available = lambda: False
"""
    return at_startup(folder, code)


def make_toolkit(folder: Path, nvcc: str) -> Path:
    """A CUDA toolkit, as far as its parts are looked for."""
    script(folder / "bin" / "nvcc", nvcc)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("")
    return folder


def blocked(folder: Path, module: str) -> str:
    """A path entry that makes ``module`` look as if it were not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f'raise ModuleNotFoundError("No module named {module!r}", name="{module}")\n'
    (folder / f"{module}.py").write_text(text)
    return str(folder)


def at_startup(folder: Path, code: str) -> str:
    """A path entry that runs ``code`` at the start of every Python."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


def script(path: Path, text: str) -> Path:
    """A program that a shell runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def build_record(package: Path) -> dict[str, object]:
    values: dict[str, object] = {}
    exec((package / "_build.py").read_text(), values)
    return values
