"""Tile configurations that were measured, by what decides a kernel's speed.

``python -m dla_fast tune`` measures and writes ``tables/sm_<architecture>.json``, which is read when the architecture
is first asked for.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program and how it is run.

    Attributes:
        block_m: pixels of a tile.
        block_n: output channels of a tile.
        block_k: input channels of a step; 0 where nothing is multiplied.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        max_registers: registers of a thread that the compiler may use on NVIDIA's GPUs; 0 leaves it the choice.
        resident: programs that a multiprocessor holds at a time, of kernels that walk tiles.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int = 0
    resident: int = 1

    def options(self) -> dict[str, int]:
        """As Triton's compiler takes them."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @property
    def carries_moments(self) -> bool:
        """Whether a forward product has registers left for moments that go from tile to tile.

        A thread has 255: besides its part of the product it keeps three values for each of its channels, of which a
        warp's layout gives it a quarter.
        """
        warps = min(self.num_warps, max(1, self.block_m // 16))
        product = self.block_m * self.block_n // (32 * self.num_warps)
        return self.block_m >= 16 and product + 3 * self.block_n * warps // (4 * self.num_warps) <= 160

    def __str__(self) -> str:
        tile = "x".join(str(b) for b in (self.block_m, self.block_n, self.block_k) if b)
        return f"{tile}w{self.num_warps}s{self.num_stages}"


# (architecture, kernel, dtype, bucket of M, K, N) -> configuration.
Key = tuple[int, str, str, int, int, int]
TABLE: dict[Key, TileConfig] = {}


def bucket(m: int) -> int:
    """Pixels as the table keeps them: the power of two not below."""
    return 1 << max(0, m - 1).bit_length()


def key(arch: int, kernel: str, dtype: torch.dtype, m: int, k: int, n: int) -> Key:
    """The table's key of a problem."""
    return arch, kernel, str(dtype).removeprefix("torch."), bucket(m), k, n


def table_path(arch: int) -> Path:
    """Where the table of an architecture lies."""
    return Path(__file__).parent / "tables" / f"sm_{arch}.json"


def read_table(path: Path, arch: int) -> dict[Key, TileConfig]:
    """The entries of a table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return {
            (arch, e["kernel"], e["dtype"], int(e["m"]), int(e["k"]), int(e["n"])): TileConfig(**e["config"])
            for e in entries
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"no table of tile configurations: {type(error).__name__}: {error}") from error


_read: set[int] = set()


def measured(kernel: str, m: int, k: int, n: int, dtype: torch.dtype, arch: int) -> TileConfig | None:
    """What was measured for a problem, None where nothing was; reads the architecture's table the first time."""
    if arch not in _read:
        _read.add(arch)
        path = table_path(arch)
        if path.exists():
            try:
                # What was installed by hand goes before the file.
                TABLE.update({key: value for key, value in read_table(path, arch).items() if key not in TABLE})
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: {error}; the heuristic chooses", RuntimeWarning, stacklevel=2)
    return TABLE.get(key(arch, kernel, dtype, m, k, n))
