"""Compile the CUDA kernels for every architecture with no GPU, and look at what came out.

``python -m benchmarks.gates.cuda_check``

Prints the registers, shared memory, stack and spills of every kernel. Exits 1 where a kernel spills or has a stack
frame, where one that is vectorised has no 128-bit load or store in its machine code, where the matrix kernel has no
matrix instruction, and where something does not compile, warnings included. The operators that bind the kernels are
compiled against the installed torch's headers. Without nvcc it says so and exits 0. What was compiled is kept in
benchmarks/out/cuda by content.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90", "100")
# Kernels, by name, whose template arguments say that they take 16 bytes at once, with what their code must hold.
_LOADS_AND_STORES = ("tail_kernel", "apply_kernel", "upsample_kernel", "upsample_backward_taps_kernel")
_LOADS = ("moments_kernel", "reduce_kernel", "upsample_backward_kernel", "upsample_rows_backward_kernel")
_MATRIX = "aggregate_inference_kernel"
_STORES = ("upsample_rows_kernel",)
_BYTES = {"double": 8, "float": 4, "__half": 2, "__nv_bfloat16": 2}


@dataclass
class Kernel:
    """A compiled kernel: what ptxas says of it, which of the instructions looked for it holds, and its faults."""

    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    instructions: list[str] = field(default_factory=list)


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit, None where there is no nvcc."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # The one on the path may be a script that calls another.
    run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(found[1]).resolve() if found else Path(nvcc).resolve().parents[2]


def disassembler(cuda: Path) -> str | None:
    """cuobjdump: the toolkit's, or the one that Triton brings."""
    for folder in (cuda / "bin", *_triton_folders()):
        if (folder / "cuobjdump").exists():
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def _triton_folders() -> list[Path]:
    spec = importlib.util.find_spec("triton")
    return [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    short = [re.sub(r"dla_fast::cuda::|\(anonymous namespace\)::|^void ", "", line) for line in done.stdout.split("\n")]
    # Without the parameters.
    return [re.sub(r">\(.*\)$", ">", name) for name in short[: len(names)]]


def resources(log: str) -> dict[str, Kernel]:
    """The kernels in the output of ptxas -v, by their mangled names."""
    found: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in log.splitlines():
        if name := re.search(r"(?:Compiling entry function|Function properties for) '?([\w$]+)", line):
            current = found.setdefault(name[1], Kernel(name[1]))
        elif current is not None:
            if stack := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
                current.stack, current.spills = int(stack[1]), int(stack[2]) + int(stack[3])
            if registers := re.search(r"Used (\d+) registers", line):
                current.registers = int(registers[1])
                shared = re.search(r"(\d+) bytes smem", line)
                current.shared = int(shared[1]) if shared else 0
    return found


def instructions(sass: str) -> dict[str, set[str]]:
    """Which of the instructions that kernels are held to stand in a disassembly, by kernel."""
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in sass.splitlines():
        if name := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault(name[1], set())
        elif re.search(r"\bLDG\.E[\w.]*\.128", line):
            current.add("load")
        elif re.search(r"\bSTG\.E[\w.]*\.128", line):
            current.add("store")
        elif re.search(r"\bHMMA\.", line):
            current.add("mma")
    return found


def expected(name: str) -> set[str]:
    """The instructions that a kernel of this demangled name must hold."""
    base, _, rest = name.partition("<")
    arguments = [part.strip() for part in rest.rstrip(">").split(",")]
    wanted = {"mma"} if base == _MATRIX else set()
    if base == _MATRIX:
        wide = arguments[2] == "true"
    elif base in (*_LOADS_AND_STORES, *_LOADS, *_STORES) and len(arguments) > 1:
        wide = _BYTES[arguments[0]] * int(re.sub(r"\(int\)", "", arguments[1])) == 16
    else:
        wide = False
    if wide and base in (*_LOADS_AND_STORES, *_LOADS, _MATRIX):
        wanted.add("load")
    if wide and base in (*_LOADS_AND_STORES, *_STORES):
        wanted.add("store")
    return wanted


def faults(kernel: Kernel, *, disassembled: bool) -> list[str]:
    """What keeps a kernel from shipping."""
    found = []
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes")
    if kernel.stack:
        found.append(f"has a stack frame of {kernel.stack} bytes")
    if disassembled:
        names = {"load": "128-bit load", "store": "128-bit store", "mma": "matrix instruction"}
        found += [f"has no {names[w]}" for w in sorted(expected(kernel.name) - set(kernel.instructions))]
    return found


def _digest(cuda: Path, source: Path, architecture: str) -> str:
    digest = hashlib.sha256(f"{architecture} {_run(str(cuda / 'bin' / 'nvcc'), '--version')}".encode())
    for path in [Path(__file__), source, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def compile_kernels(cuda: Path, source: Path, architecture: str, out: Path) -> list[Kernel]:
    """The kernels of a source for an architecture, from what was kept where nothing changed."""
    kept = out / f"{source.stem}-{architecture}-{_digest(cuda, source, architecture)}.json"
    if kept.exists():
        return [Kernel(**entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
    cubin = kept.with_suffix(".cubin")
    # As torch's build helper calls it, with the oldest standard that any torch it serves picks.
    no_operators = [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
    log = _run(
        str(cuda / "bin" / "nvcc"), "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-O3",
        "--expt-relaxed-constexpr", "--Werror", "all-warnings", *no_operators, "-Xptxas", "-v",
        str(source), "-o", str(cubin),
    )  # fmt: skip
    found = resources(log)
    tool = disassembler(cuda)
    if tool is not None:
        for name, held in instructions(_run(tool, "-sass", str(cubin))).items():
            if name in found:
                found[name].instructions = sorted(held)
    for kernel, name in zip(found.values(), _demangled(list(found)), strict=True):
        kernel.name = name
    cubin.unlink()
    for old in out.glob(f"{source.stem}-{architecture}-*.json"):
        old.unlink()
    kept.write_text(json.dumps([asdict(kernel) for kernel in found.values()]), encoding="utf-8")
    return list(found.values())


def check_bindings(cuda: Path) -> None:
    """Compile the operators against the installed torch's headers, for nothing but the errors."""
    from torch.utils.cpp_extension import include_paths

    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    folders = [flag for path in (*include_paths(), str(cuda / "include")) for flag in ("-isystem", path)]
    # A CPU build of torch has the headers, but not the one that its CUDA build generates.
    defines = ["-DDLA_FAST_WITH_CUDA=1", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    _run(
        *compiler,
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        *defines,
        *folders,
        str(SOURCES / "ops.cpp"),
    )


def main(argv: list[str] | None = None) -> int:
    """Compile, print the table and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.cuda_check", description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="NN", help="as in sm_NN")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "cuda", help="where results are kept")
    parser.add_argument("--all", action="store_true", help="a line for every kernel, not one for each name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations side by side")
    args = parser.parse_args(argv)
    cuda = toolkit()
    if cuda is None:
        print("cuda-check: skipped: nvcc was not found (set CUDA_HOME)")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failed: list[str] = []
    table: dict[tuple[str, str], list[Kernel]] = {}
    work = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in args.architectures]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(compile_kernels, cuda, *one, args.out): one for one in work}
        bindings = pool.submit(check_bindings, cuda)
        done = concurrent.futures.as_completed([*jobs, bindings])
        for job in tqdm(done, total=len(jobs) + 1, desc="compiling", disable=None, leave=False):
            try:
                result = job.result()
            except RuntimeError as error:
                failed.append(str(error))
                continue
            if job is not bindings:
                source, arch = jobs[job]
                for kernel in result or []:
                    table.setdefault((kernel.name if args.all else kernel.name.split("<")[0], arch), []).append(kernel)
    disassembled = disassembler(cuda) is not None
    width = max((len(name) for name, _ in table), default=6)
    print(f"{'kernel':<{width}}  arch     of  registers  shared memory  spilled")
    for (name, arch), kernels in sorted(table.items(), key=lambda item: (item[0][0], int(item[0][1]))):
        registers = f"{min(k.registers for k in kernels)}-{max(k.registers for k in kernels)}"
        shared, spilled = max(k.shared for k in kernels), sum(k.spills for k in kernels)
        print(f"{name:<{width}}  sm_{arch:<4}  {len(kernels):3d}  {registers:>9}  {shared:>11} B  {spilled:>5} B")
        failed += [f"{k.name} for sm_{arch} {fault}" for k in kernels for fault in faults(k, disassembled=disassembled)]
    if not disassembled:
        print("machine code not looked at: cuobjdump was not found (it comes with the CUDA toolkit, and with Triton)")
    for line in failed:
        print(f"FAILED {line}")
    count = sum(map(len, table.values()))
    print(f"cuda-check: {count} kernels, {len(failed)} faults, {time.perf_counter() - start:.0f} s")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
