"""``python -m dla_fast doctor``: what is here, what is built, and which backend serves which op."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from dla_fast import _extension, backend
from dla_fast._version import __version__
from dla_fast.proof import machine

# Every variable that the package or its build reads, with what it does.
VARIABLES = {
    "DLA_FAST_BACKEND": "backend of every call",
    "DLA_FAST_DISABLE": "1 runs everything on the reference",
    "DLA_FAST_CPU_ISA": "at most this instruction set in the CPU kernels; amx_emulated is for tests",
    "DLA_FAST_BUILD_EXT": "0, 1 or auto, at build",
    "DLA_FAST_BUILD_CUDA": "0, 1 or auto, at build",
    "DLA_FAST_SANITIZE": "sanitizer, at build",
    "DLA_FAST_WERROR": "warnings are errors, at build",
    "DLA_FAST_VERBOSE": "1 shows the compilers' commands, at build",
    "CXX": "compiler, at build",
    "CUDA_HOME": "CUDA toolkit, at build",
    "MAX_JOBS": "parallel compilations, at build",
    "TORCH_CUDA_ARCH_LIST": "GPU architectures, at build",
    "OMP_NUM_THREADS": "CPU threads",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU",
    "CUDA_VISIBLE_DEVICES": "GPUs that are seen",
}


_BUILD_CUDA = (
    "with nvcc, a CUDA build of torch and the compiler they need: "
    "DLA_FAST_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of the report")


def _attempt(ask: Callable[[], Any]) -> Any:
    """The answer, or the error as text: whatever is broken here is what the doctor was called for."""
    try:
        return ask()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> list[dict[str, Any]]:
    """The GPUs torch sees; a build without CUDA is not asked, so that nothing is initialised in vain."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return devices


def _why_no_devices() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _table(devices: list[str]) -> list[dict[str, Any]]:
    """One entry per op and device: the backend that serves it, and every other with its reason."""
    table = []
    for op in backend.OPS:
        for device in devices:
            entry: dict[str, Any] = {"op": op, "device": device, "serves": None, "backends": {}}
            try:
                for candidate in backend.explain(op, device):
                    entry["backends"][candidate.backend] = candidate.reason
                    if candidate.chosen:
                        entry["serves"] = candidate.backend
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            table.append(entry)
    return table


def collect() -> dict[str, Any]:
    """Everything the doctor knows, ready for JSON."""
    status = _extension.STATUS
    devices = _attempt(_cuda_devices)
    kinds = ["cpu", "cuda"] if isinstance(devices, list) and devices else ["cpu"]
    return {
        "versions": {
            "dla_fast": __version__,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "cuda of torch": torch.version.cuda,
            "triton": _attempt(lambda: _version("triton")),
            "timm": _attempt(lambda: _version("timm")),
            "platform": platform.platform(),
        },
        "cpu": {
            "name": _attempt(machine.cpu_name),
            "cores": os.cpu_count(),
            "instruction set": _attempt(machine.instruction_set),
            "threads": torch.get_num_threads(),
        },
        "cuda": {"devices": devices, "reason": _attempt(_why_no_devices)},
        "extension": {
            "loaded": status.loaded,
            "reason": status.reason,
            "built for torch": status.built_torch,
            "compiler": status.compiler,
            "cuda kernels": status.has_cuda,
            "cuda reason": status.cuda_reason,
            "cuda architectures": list(status.cuda_architectures),
        },
        "backend": {"selected": _attempt(backend.selected), "table": _table(kinds)},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "location": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    }


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in rows)
    shown = {name: "-" if value is None else value for name, value in rows.items()}
    return [title, *(f"  {name:<{width}}  {value}" for name, value in shown.items()), ""]


def _serving(entry: dict[str, Any], unloaded: str | None) -> list[str]:
    """One op of the table as text; ``unloaded`` is why the extension is not loaded, which is said once elsewhere."""
    head = f"  {entry['op']} on {entry['device']}:"
    if "error" in entry:
        return [f"{head} {entry['error']}"]
    serves = entry["serves"]
    forced = entry["backends"].get(serves)
    lines = [f"{head} {serves}" if forced is None else f"{head} none, calls raise; {serves} is forced: {forced}"]
    for name, reason in entry["backends"].items():
        if name not in (serves, "reference"):
            short = "the C++ extension is not loaded, see above" if unloaded and reason == unloaded else reason
            lines.append(f"    not {name:<9}  {short or 'it could, another is selected'}")
    return lines


def _report(facts: dict[str, Any]) -> str:
    lines = _section("versions", {**facts["versions"], "installed in": facts["location"]})
    lines += _section("cpu", facts["cpu"])
    devices = facts["cuda"]["devices"]
    if isinstance(devices, list) and devices:
        rows = {f"cuda:{d['index']}": f"{d['name']}, {d['capability']}, {d['memory_gib']} GiB" for d in devices}
    else:
        rows = {"cuda": devices or f"none: {facts['cuda']['reason']}"}
    lines += _section("devices", rows)
    built = facts["extension"]
    rows = {"C++ extension": "loaded" if built["loaded"] else f"no: {built['reason']}"}
    if built["compiler"]:
        rows["built with"] = f"{built['compiler']}, for torch {built['built for torch']}"
    missing = built["cuda reason"] or "they are part of the C++ extension"
    missing = missing.removeprefix("the CUDA kernels were not built: ")
    if built["cuda kernels"]:
        rows["CUDA kernels"] = f"for compute capability {', '.join(built['cuda architectures'])}"
    else:
        rows["CUDA kernels"] = f"no: {missing}"
        rows["to build them"] = f"{_BUILD_CUDA}; what stands in the way is then an error"
    lines += _section("built", rows)
    if facts["environment"]:
        rows = {name: f"{value!r:<12} {VARIABLES[name]}" for name, value in facts["environment"].items()}
        lines += _section("environment", rows)
    lines.append(f"backends (selected: {facts['backend']['selected']})")
    for entry in facts["backend"]["table"]:
        lines += _serving(entry, built["reason"])
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the report; always 0, since a machine without kernels still runs on the reference."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _report(facts))
    return 0
