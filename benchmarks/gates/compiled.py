"""One kernel compiled for one GPU without that GPU, and what its binary says about it."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HALF = ("f16", "bf16")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what a processor of it has (CUDA programming guide; CDNA 3 ISA).

    Attributes:
        name: as printed.
        backend: Triton's.
        arch: Triton's.
        number: the architecture as the package's tile configurations know it.
        warp: threads of a warp.
        shared_block: bytes of shared memory that a block may have.
        shared: bytes of shared memory of a processor.
        reserved: bytes of shared memory that each block costs beside its own.
        registers: 32-bit registers of a processor.
        granule: registers that are given to a warp at a time.
        warps: warps that fit on a processor.
    """

    name: str
    backend: str
    arch: int | str
    number: int
    warp: int
    shared_block: int
    shared: int
    reserved: int
    registers: int
    granule: int
    warps: int

    def gpu(self) -> GPUTarget:
        """The target as Triton names it."""
        return GPUTarget(self.backend, self.arch, self.warp)

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of a processor's warps that can be resident, for blocks of so many registers a thread and bytes."""
        per_warp = math.ceil(max(registers, 1) * self.warp / self.granule) * self.granule
        blocks = min(32, self.warps // warps, self.registers // (per_warp * warps))
        blocks = min(blocks, self.shared // (shared + self.reserved)) if shared + self.reserved else blocks
        return blocks * warps / self.warps


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 80, 32, 163 * 1024, 164 * 1024, 1024, 65536, 256, 64),
        Target("sm_90", "cuda", 90, 90, 32, 227 * 1024, 228 * 1024, 1024, 65536, 256, 64),
        Target("sm_100", "cuda", 100, 100, 32, 227 * 1024, 228 * 1024, 1024, 65536, 256, 64),
        # Four SIMDs with 512 registers a lane each; a wave takes eight at a time.
        Target("gfx942", "hip", "gfx942", 94, 64, 64 * 1024, 64 * 1024, 0, 4 * 512 * 64, 8 * 64, 32),
    )
}
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma|v_smfmac)")
_SHAPE = re.compile(r"tensor<([0-9x]+)x(\w+?)(?:, #(\w+))?>")


@dataclass
class Result:
    """What a compilation gave.

    Attributes:
        name: the specialisation's.
        kernel: the function's name.
        dtype: the specialisation's.
        gemm: whether it says that it multiplies matrices.
        target: a key of :data:`TARGETS`.
        warps: warps of a block.
        registers: 32-bit registers of a thread.
        shared: bytes of shared memory of a block.
        spilled: bytes of local memory of a thread; on gfx942 registers spilled, times four.
        occupancy: resident warps over those that fit.
        matrix: kinds of matrix instructions in the code.
        dots: half-precision products left to the last pass that knows of them: (M, layout) each.
        seconds: how long it took.
        error: why there is no binary, else empty.
    """

    name: str
    kernel: str
    dtype: str
    gemm: bool
    target: str
    warps: int
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    occupancy: float = 0.0
    matrix: list[str] = field(default_factory=list)
    dots: list[tuple[int, str]] = field(default_factory=list)
    half_products: int = 0
    seconds: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def faults(self) -> list[str]:
        """What must not ship, in words."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        limit = TARGETS[self.target].shared_block
        if self.spilled:
            found.append(f"spills {self.spilled} bytes a thread")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, a block may have {limit}")
        if self.occupancy <= 0:
            found.append(f"no block fits: {self.registers} registers a thread, {self.warps} warps")
        half = self.half_products > 0 or (self.gemm and self.dtype in ("fp16", "bf16"))
        if half and not self.matrix:
            found.append("a half-precision product without a matrix instruction")
        elif any(layout.startswith("blocked") for _, layout in self.dots):
            found.append("one of its half-precision products has no matrix instruction")
        if self.target == "sm_90" and self.warps >= 4 and any(m >= 64 for m, _ in self.dots):
            found.append("a half-precision product whose tile allows wgmma goes without it")
        return found


def _products(text: str) -> list[tuple[int, str]]:
    """(M, layout of the result) of each half-precision ``tt.dot`` in Triton's intermediate code."""
    found = []
    for line in text.splitlines():
        if " tt.dot " not in line:
            continue
        types = _SHAPE.findall(line.split(" : ", 1)[-1])
        if len(types) >= 3 and types[0][1] in HALF and types[1][1] in HALF:
            found.append((int(types[2][0].split("x")[-2]), types[2][2]))
    return found


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, as the toolkit's own reader reports them."""
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(reader), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _hip_resources(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes spilled) of a thread, from the metadata at the end of the assembly."""
    found = {
        key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return found["vgpr_count"], max(spilled, found["private_segment_fixed_size"])


def source(s: Any) -> ASTSource:
    """A specialisation (see :class:`dla_fast.kernels.launch.Specialisation`) as Triton compiles it."""
    return ASTSource(s.kernel, s.signature, s.constexprs, s.attrs)


def blank(s: Any, target: Target) -> Result:
    """A result without figures."""
    return Result(s.name, s.kernel.fn.__name__, s.dtype, s.gemm, target.name, s.options["num_warps"])


def compile_one(s: Any, target: Target) -> Result:
    """Compile a specialisation and read its binary; an error is kept in the result."""
    result, start = blank(s, target), time.perf_counter()
    try:
        # AMD's compiler has no such option.
        options = {k: v for k, v in s.options.items() if k != "maxnreg" or target.backend == "cuda"}
        made = triton.compile(source(s), target=target.gpu(), options=options)
        if target.backend == "cuda":
            code = made.asm["ptx"]
            result.registers, result.spilled = cuda_resources(made.asm["cubin"])
        else:
            code = made.asm["amdgcn"]
            result.registers, result.spilled = _hip_resources(code)
        result.shared = int(made.metadata.shared)
        result.occupancy = target.occupancy(result.registers, result.shared, s.options["num_warps"])
        result.matrix = sorted(set(_MATRIX.findall(code)))
        result.half_products = len(_products(made.asm["ttir"]))
        result.dots = _products(made.asm["ttgir"])
    except Exception as error:
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result.seconds = time.perf_counter() - start
    return result
