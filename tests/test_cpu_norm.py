"""What the CPU's norm passes do of their own: sums about the mean of a part, large outputs on huge pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from serving import backends

from dla_fast import functional, use_backend
from dla_fast.proof import parity

pytestmark = pytest.mark.skipif("cpu" not in backends("batch_norm_act"), reason="needs the CPU kernels")


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_variance_with_an_uncommon_beginning(layout):
    """A first row far from the rest, about whose mean the CPU takes its sums: the variance to 2e-6 all the same."""
    z = torch.randn(1, 16, 64, 64)
    z[:, :, 0] += 1000.0
    z = z.to(memory_format=parity.LAYOUTS[layout])
    var = torch.ones(16)
    with use_backend("cpu"):
        functional.batch_norm_act(z, None, None, torch.zeros(16), var, training=True, momentum=1.0)
    expected = z.double().var(dim=(0, 2, 3), unbiased=True)
    torch.testing.assert_close(var.double(), expected, rtol=2e-6, atol=0.0)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def kernel_flags(address: int) -> list[str]:
    """What the kernel knows about the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="needs huge pages")
def test_large_outputs_ask_for_huge_pages():
    # A mapping of its own: the allocator may hand out memory that an earlier output had asked huge pages for.
    x = torch.frombuffer(mmap.mmap(-1, 4 * 64 * 512 * 512), dtype=torch.float32).view(1, 64, 512, 512)
    with use_backend("cpu"), torch.no_grad():
        y = functional.batch_norm_act(x, None, None, torch.zeros(64), torch.ones(64), training=False)
    middle = y.data_ptr() + y.numel() * y.itemsize // 2
    assert "hg" in kernel_flags(middle)
    assert "hg" not in kernel_flags(x.data_ptr() + x.numel() * x.itemsize // 2)
