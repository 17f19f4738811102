"""``python -m benchmarks.aot``: the Triton kernels that ship, compiled ahead of time, with no GPU.

Every specialisation that ``dla_fast.kernels`` lists is compiled for sm_90, and one of each kernel and dtype for the
other targets: registers, shared memory, spills and occupancy are printed, and the exit status is 1 where one spills,
takes more shared memory than its target has, or multiplies half-precision matrices without matrix instructions (on
sm_90 without warpgroup ones although its tile allows them). Results are kept by content in benchmarks/out/aot.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / "out" / "aot"
HALVES = ("fp16", "bf16")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as its vendor calls it.
        backend: "cuda" or "hip".
        arch: as Triton takes it.
        warp: threads of a warp.
        shared: bytes of shared memory a block may have.
        matrix: what a matrix instruction is called in its assembly.
    """

    name: str
    backend: str
    arch: Any
    warp: int
    shared: int
    matrix: str


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, r"\bmma\.sync"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, r"\bw?g?mma\."),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, r"\b(tcgen05\.mma|mma\.sync)"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"\bv_mfma"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """What came out of one compilation. ``registers`` and ``spills`` are a thread's, ``shared`` a block's bytes."""

    registers: int
    shared: int
    spills: int
    matrix: bool
    warpgroup: bool


def modules() -> list[str]:
    """The kernel files that list specialisations."""
    import dla_fast.kernels

    found = []
    for info in pkgutil.iter_modules(dla_fast.kernels.__path__, "dla_fast.kernels."):
        if hasattr(importlib.import_module(info.name), "specialisations"):
            found.append(info.name)
    return found


@cache
def shipped(module: str) -> list[Any]:
    """The specialisations of one file."""
    return list(importlib.import_module(module).specialisations())


def content(s: Any, target: Target) -> str:
    """A hash of everything that the outcome depends on."""
    import triton

    what = (s.kernel.cache_key, s.signature, s.constexprs, s.attrs, s.num_warps, s.num_stages, triton.__version__)
    return hashlib.sha256(repr((what, asdict(target))).encode()).hexdigest()


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd(assembly: str) -> tuple[int, int]:
    """Registers and spills of AMD assembly, from its metadata."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")


def compile_for(s: Any, target: Target) -> Compiled:
    """Compile one specialisation.

    Raises:
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = triton.compile(
        ASTSource(s.kernel, s.signature, s.constexprs, s.attrs),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": s.num_warps, "num_stages": s.num_stages},
    )
    if target.backend == "cuda":
        text = made.asm["ptx"]
        registers, spills = _nvidia(made.asm["cubin"])
    else:
        text = made.asm["amdgcn"]
        registers, spills = _amd(text)
    matrix = re.search(target.matrix, text) is not None
    return Compiled(registers, made.metadata.shared, spills, matrix, "wgmma" in text)


def complaint(s: Any, target: Target, outcome: Compiled) -> str | None:
    """Why an outcome is not good enough, or None."""
    if outcome.spills:
        return f"spills {outcome.spills} bytes"
    if outcome.shared > target.shared:
        return f"takes {outcome.shared} bytes of shared memory, there are {target.shared}"
    if s.gemm and s.dtype in HALVES:
        if not outcome.matrix:
            return "multiplies without a matrix instruction"
        block_m = int(str(s.config).split("x")[0])
        if target.name == "sm_90" and block_m >= 64 and s.num_warps >= 4 and not outcome.warpgroup:
            return "its tile allows warpgroup matrix instructions, and there are none"
    return None


def occupancy(s: Any, target: Target, outcome: Compiled) -> float:
    """Share of an NVIDIA multiprocessor's 2048 threads that registers and shared memory let be resident."""
    threads = s.num_warps * target.warp
    registers = -(-max(outcome.registers, 1) // 8) * 8 * threads
    blocks = min(65536 // registers, 2048 // threads, target.shared // max(outcome.shared, 1))
    return blocks * threads / 2048


def work(names: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """(file, number, target) of all there is to compile."""
    for module in modules():
        for name in names:
            seen = set()
            for i, s in enumerate(shipped(module)):
                first = (s.kernel.fn.__name__, s.dtype) not in seen
                seen.add((s.kernel.fn.__name__, s.dtype))
                if (name == "sm_90" or first) and not (name == "gfx942" and s.dtype == "fp64"):
                    yield module, i, name


def one(module: str, index: int, name: str) -> dict[str, Any]:
    """Compile, or take what was kept: the outcome, or the compiler's error in ``error``."""
    s, target = shipped(module)[index], TARGETS[name]
    kept = CACHE / f"{content(s, target)}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    try:
        record: dict[str, Any] = asdict(compile_for(s, target))
    except Exception as error:  # reported with all the others
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(record))
    partial.replace(kept)
    return record


def main(argv: list[str] | None = None) -> int:
    """Compile everything and print what came out; 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every kernel, not only the widest of each")
    args = parser.parse_args(argv)
    try:
        import triton
    except ImportError:
        print("aot: triton is not installed; nothing was compiled", file=sys.stderr)
        return 1
    from tqdm import tqdm

    tasks = list(work(args.targets))
    results: dict[tuple[str, int, str], dict[str, Any]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(one, *task): task for task in tasks}
        try:
            for future in tqdm(as_completed(futures), total=len(tasks), unit="kernel", disable=not sys.stderr.isatty()):
                results[futures[future]] = future.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print(f"aot: interrupted; {len(results)} of {len(tasks)} are kept", file=sys.stderr)
            return 130
    failures, widest = [], {}
    for task in tasks:
        module, index, name = task
        s, record, target = shipped(module)[index], results[task], TARGETS[name]
        if "error" in record:
            failures.append(f"{name} {s.name}: {record['error']}")
            continue
        outcome = Compiled(**record)
        found = complaint(s, target, outcome)
        if found is not None:
            failures.append(f"{name} {s.name}: {found}")
        key = task if args.all else (name, module, s.kernel.fn.__name__, s.dtype)
        if key not in widest or outcome.registers > widest[key][1].registers:
            widest[key] = (s, outcome, target)
    print(
        f"triton {triton.__version__}: {len(tasks)} compilations" + ("" if args.all else ", the widest of each kernel")
    )
    print(f"{'target':8}{'registers':>10}{'shared':>9}{'spills':>8}{'resident':>10}  kernel")
    for s, outcome, target in widest.values():
        resident = f"{occupancy(s, target, outcome):.0%}" if target.backend == "cuda" else "-"
        print(f"{target.name:8}{outcome.registers:10}{outcome.shared:9}{outcome.spills:8}{resident:>10}  {s.name}")
    for line in failures:
        print(f"FAIL {line}")
    print(f"aot: {len(failures)} of {len(tasks)} miss a gate")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
