"""Sections that go wrong, in the place of those of benchmarks.gpu: what test_gpu_benchmark.py runs as its processes."""

from __future__ import annotations

import os
import sys
import time

from benchmarks import _gpu_sections, gpu


def _fine():
    return [{"check": "fine", "ok": True, "detail": ""}]


def _raise(text):
    raise RuntimeError(text)


def _cases(section):
    def cases(device, small):
        yield "first", _fine
        if section == "parity":
            yield "raises", lambda: _raise("a case that raises")
        elif section == "determinism":
            yield "dies", lambda: os._exit(11)
        elif section == "compile":
            yield "loses the device", lambda: _raise("CUDA error: an illegal memory access was encountered")
        elif section == "networks":
            yield "hangs", lambda: time.sleep(60)
        yield "last", _fine

    return cases


_gpu_sections._FOUND.update({section: _cases(section) for section in _gpu_sections.SECTIONS})
sys.exit(gpu.main())
