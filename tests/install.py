"""The way of a stranger, from bare environments and with the real packages: run by name, or by ``make test-install``.

Every environment, and the copy of the tree beside it, is made anew under ``--folder``. The first step that goes wrong
ends the run with exit status 1 and its output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from building import TINY_SOURCE, copy_tree

ROOT = Path(__file__).resolve().parents[1]
SHADOW = "and these sources hide the dla_fast in "


class Failure(Exception):
    """A step that went wrong, with what there was to see."""


def call(command: list[str], cwd: Path, status: int = 0, **env: str) -> str:
    """Output and errors of a command that has to end with ``status``."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("DLA_FAST_") and k not in ("PYTHONPATH", "CUDA_PATH")
    }
    done = subprocess.run(
        command, cwd=cwd, env={**kept, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != status:
        raise Failure(f"{' '.join(command)}\nended with {done.returncode}, not {status}:\n{done.stdout[-6000:]}")
    return done.stdout


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failure(what)


class Stranger:
    """An environment with nothing in it, a copy of the tree, and an empty folder to be in."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.tree = copy_tree(folder / "dla_fast")
        for name in ("tests", "benchmarks"):
            shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__", "out"))
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.python = str(folder / "venv" / "bin" / "python")
        call([sys.executable, "-m", "venv", str(folder / "venv")], folder)

    def pip(self, *arguments: str, **env: str) -> str:
        return call([self.python, "-m", "pip", "install", "--quiet", *arguments], self.tree, **env)

    def torch(self) -> str:
        return call([self.python, "-c", "import torch; print(torch.__version__)"], self.elsewhere).split()[-1]

    def doctor(self, cwd: Path, **env: str) -> dict[str, object]:
        """The extension, as doctor sees it."""
        said = call([self.python, "-m", "dla_fast", "doctor", "--json"], cwd, **env)
        return json.loads(said[said.index("{\n") :])["extension"]


def plain(folder: Path, torch: str) -> list[tuple[str, Callable[[], str]]]:
    """torch first, then the package with its extras, which must not bring another torch."""
    here = Stranger(folder / "plain")
    before = ""

    def bare() -> str:
        nonlocal before
        here.pip(f"torch=={torch}", "setuptools", "wheel", "ninja")
        before = here.torch()
        return f"torch {before}"

    def install() -> str:
        here.pip("--no-build-isolation", ".[demo,test]")
        expect(here.torch() == before, f"torch was {before} and is {here.torch()}")
        return f"still torch {before}"

    def doctor() -> str:
        found = here.doctor(here.elsewhere)
        expect(found["loaded"] is True, f"the extension is not loaded: {found['reason']}")
        return f"loaded, built with {found['compiler']}"

    def demo() -> str:
        program = str(Path(here.python).with_name("dla_fast"))
        arguments = ["demo", "--device", "cpu", "--batch", "2", "--size", "64", "--runs", "1"]
        return call([program, *arguments], here.elsewhere).strip().splitlines()[-1]

    def hidden() -> str:
        found = here.doctor(here.tree)
        expect(SHADOW in str(found["reason"]), f"the reason in an unbuilt checkout: {found['reason']}")
        return str(found["reason"])

    def tests() -> str:
        said = call([here.python, "-m", "pytest", "-q"], here.tree, status=4)
        expect(SHADOW in said, said)
        return said.strip().splitlines()[0]

    return [
        (f"an environment with torch {torch}, setuptools, wheel and ninja", bare),
        ('pip install --no-build-isolation ".[demo,test]"', install),
        ("doctor in another folder", doctor),
        ("dla_fast demo in another folder", demo),
        ("doctor in the unbuilt checkout", hidden),
        ("pytest in the unbuilt checkout", tests),
    ]


def oldest(folder: Path, torch: str) -> list[tuple[str, Callable[[], str]]]:
    """The oldest setuptools that is allowed, on a source that compiles in a second."""
    here = Stranger(folder / "oldest")
    shutil.rmtree(here.tree / "csrc")
    (here.tree / "csrc").mkdir()
    (here.tree / "csrc" / "bindings.cpp").write_text(TINY_SOURCE)

    def install() -> str:
        here.pip(f"torch=={torch}", "wheel", "ninja", "numpy")
        # Newer releases of torch ask for a newer one, for reasons of their own.
        here.pip("--no-deps", "setuptools==64.0.3")
        here.pip("--no-deps", "--no-build-isolation", ".", DLA_FAST_BUILD_EXT="1")
        code = "import setuptools; from dla_fast._extension import STATUS; print(setuptools.__version__, STATUS)"
        said = call([here.python, "-c", code], here.elsewhere)
        expect(said.startswith("64.0.3 ExtensionStatus(loaded=True"), said)
        return "loaded"

    return [("setuptools 64.0.3 builds it", install)]


# Answers what torch asks for first, and compiles nothing.
NVCC = """#!/bin/sh
[ "$*" = --version ] && exec echo "Cuda compilation tools, release {cuda}, V{cuda}.1"
echo "nvcc fatal   : this one compiles nothing" >&2
exit 1
"""


def cuda(folder: Path, torch: str) -> list[tuple[str, Callable[[], str]]]:
    """A CUDA build of torch and an nvcc that fails: the CPU kernels have to be there all the same."""
    here = Stranger(folder / "cuda")

    def install() -> str:
        here.pip(f"torch=={torch}", "setuptools", "wheel", "ninja", "numpy")
        version = call([here.python, "-c", "import torch; print(torch.version.cuda)"], here.elsewhere).split()[-1]
        expect(version != "None", f"torch {here.torch()} is not a CUDA build")
        home = folder / "cuda" / "toolkit"
        for part in ("bin/nvcc", "include/cuda_runtime.h"):
            (home / part).parent.mkdir(parents=True)
            (home / part).write_text(NVCC.format(cuda=version))
            (home / part).chmod(0o755)
        here.pip("--no-build-isolation", ".", CUDA_HOME=str(home))
        found = here.doctor(here.elsewhere)
        expect(found["loaded"] is True, f"the extension is not loaded: {found['reason']}")
        reason = str(found["cuda reason"])
        expect("compilation failed: " in reason and "Error compiling" not in reason, reason)
        return f"loaded for torch {found['built for torch']}; {reason}"

    return [(f"torch {torch} with an nvcc that fails", install)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "test-install")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--torch-cuda", default="2.11.0", help="a release that is a CUDA build where pip gets it from")
    parser.add_argument("--only", nargs="+", choices=("plain", "oldest", "cuda"), default=["plain", "oldest"])
    args = parser.parse_args()
    ways = {"plain": (plain, args.torch), "oldest": (oldest, args.torch), "cuda": (cuda, args.torch_cuda)}
    passed = 0
    for name in args.only:
        make, torch = ways[name]
        for title, step in make(args.folder.resolve(), torch):
            print(f"{title} ...", flush=True)
            start = time.monotonic()
            try:
                said = step()
            except Failure as error:
                print(f"  failed: {error}\ntest-install: {title}: failed after {passed} steps", flush=True)
                return 1
            passed += 1
            print(f"  {time.monotonic() - start:.0f} s: {said}", flush=True)
        # Gigabytes each; a run that fails leaves them to be looked at.
        shutil.rmtree(args.folder / name)
    if "cuda" not in args.only:
        print(
            "skipped: a CUDA build of torch with an nvcc that fails (gigabytes): make test-install CUDA=1", flush=True
        )
    print(f"test-install: {passed} steps passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
