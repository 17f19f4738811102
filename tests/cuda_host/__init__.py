"""The CUDA kernels compiled for the host: a library that registers torch.ops.dla_fast_cuda for CPU tensors."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCES = [ROOT / "csrc/cuda/ops.cpp", *sorted(HERE.glob("*.cpp"))]
SANITIZE = os.environ.get("DLA_FAST_SANITIZE", "")


def _flags() -> list[str]:
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}"]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"]
    for path in include_paths():
        flags += ["-isystem", path]
    return flags


def build() -> Path:
    """Compile what has changed, one process at a time, and link.

    Returns:
        The shared library.

    Raises:
        RuntimeError: it does not compile; the compiler's output is in the message.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    inputs = [*ROOT.glob("csrc/cuda/*"), *HERE.glob("*.*")]
    digest = hashlib.sha256(f"{compiler} {_flags()} {torch.__version__}".encode())
    for path in sorted(inputs):
        if path.is_file() and path.suffix in (".h", ".cu", ".cpp", ".py"):
            digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"cuda_host_{digest.hexdigest()[:16]}.so"
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library

        def run(*command: str) -> None:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-6000:]}")

        def compile_one(source: Path) -> str:
            to = str(folder / f"{source.stem}.o")
            run(*compiler, *_flags(), "-c", str(source), "-o", to)
            return to

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        part = library.with_suffix(".part")
        link = [f"-L{folder}" for folder in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
        link += [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        run(*compiler, "-shared", *objects, *link, "-o", str(part))
        part.rename(library)
        for old in folder.glob("*.so"):
            if old != library:
                old.unlink()
    return library
