"""Build of the C++ extension ``dla_fast._C``, and which torch that asks for; the rest is in pyproject.toml.

``DLA_FAST_BUILD_EXT`` and ``DLA_FAST_BUILD_CUDA`` take 0, 1 or auto. With auto (the default) whatever cannot be had is
left out and its reason kept in ``dla_fast/_build.py``; with 1 it is an error that says why. ``DLA_FAST_VERBOSE=1``
shows the compilers' command lines.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext
from setuptools.command.build_py import build_py as setuptools_build_py

ROOT = Path(__file__).resolve().parent
SETUPTOOLS = int(setuptools.__version__.split(".")[0])
if SETUPTOOLS < 64:
    sys.exit(
        f"dla_fast needs setuptools >= 64 to build, this is setuptools {setuptools.__version__}: "
        'pip install -U "setuptools>=64"'
    )
# Since setuptools 77 an SPDX expression has a field of its own; the file LICENSE goes along without being named.
LICENSE = {"license_expression" if SETUPTOOLS >= 77 else "license": "BSD-3-Clause"}
OLDEST_TORCH = (2, 11)
NEEDS_TORCH = (
    'dla_fast needs torch to build: pip install "torch>=2.11" "setuptools>=64" wheel ninja '
    "and then pip install --no-build-isolation . "
    "(or set DLA_FAST_BUILD_EXT=0 to install without the C++ extension)"
)
# Commands that need no compiler and so no torch: an sdist and the metadata come from anywhere.
WITHOUT_TORCH = {"egg_info", "sdist", "clean", "--version", "--name", "--help", "--help-commands"}


def setting(name: str) -> str:
    """``0``, ``1`` or ``auto`` from the environment."""
    value = os.environ.get(name, "").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        sys.exit(f"{name}={os.environ[name]}: expected 0, 1 or auto")
    return value


BUILD_EXT = setting("DLA_FAST_BUILD_EXT")
BUILD_CUDA = setting("DLA_FAST_BUILD_CUDA")
if BUILD_EXT == "0" and BUILD_CUDA == "1":
    sys.exit("DLA_FAST_BUILD_CUDA=1 needs the C++ extension, and DLA_FAST_BUILD_EXT=0 switches it off")

VERBOSE = os.environ.get("DLA_FAST_VERBOSE", "0") not in ("", "0")
SANITIZE = os.environ.get("DLA_FAST_SANITIZE", "")
if SANITIZE not in ("", "address", "undefined"):
    sys.exit(f"DLA_FAST_SANITIZE={SANITIZE}: expected address or undefined")


def import_torch() -> None:
    """Import torch, or stop with one line that says what to do."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        sys.exit(NEEDS_TORCH)
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        sys.exit(f'dla_fast needs torch >= 2.11, this is torch {torch.__version__}: pip install -U "torch>=2.11"')


class Plan:
    """What will be built, and why the rest will not."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.cuda_reason: str | None = None
        self.compiler: str | None = None
        self.extensions: list[Extension] = []

    def refuse(self, reason: str) -> None:
        if BUILD_EXT == "1":
            sys.exit(f"DLA_FAST_BUILD_EXT=1, but the C++ extension cannot be built: {reason}")
        self.reason = reason

    def refuse_cuda(self, reason: str) -> None:
        if BUILD_CUDA == "1":
            sys.exit(f"DLA_FAST_BUILD_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        self.cuda_reason = reason


def find_compiler() -> tuple[str | None, str]:
    """The version line of the C++ compiler, or None with the reason."""
    given = os.environ.get("CXX")
    names = [given] if given else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if not command or shutil.which(command[0]) is None:
            continue
        try:
            run = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            return None, f"the C++ compiler {name!r} does not run: {error.strerror}"
        if run.returncode == 0:
            # torch and setuptools look for a compiler each in their own way; this makes them agree.
            os.environ["CXX"] = name
            return f"{name}: {(run.stdout.splitlines() or ['of an unknown version'])[0]}", ""
        return None, f"the C++ compiler {name!r} does not run: {run.stderr.strip() or f'exit status {run.returncode}'}"
    return None, f"no C++ compiler was found ({', '.join(names)})"


def toolkit_lacks(home: str) -> str | None:
    """The part that a CUDA toolkit lacks: what torch takes for one is any folder that holds an nvcc, or none."""
    if not os.path.exists(os.path.join(home, "bin", "nvcc")):
        return "bin/nvcc"
    # Conda puts the headers into a folder for each platform, and its nvcc knows.
    places = ("include", "targets/*/include")
    if not any(glob.glob(os.path.join(glob.escape(home), place, "cuda_runtime.h")) for place in places):
        return "include/cuda_runtime.h"
    return None


def find_toolkit() -> None:
    """Set CUDA_HOME to where the nvcc on PATH says it is: torch looks beside it, and it may be a script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return
    with contextlib.suppress(OSError):
        command = [nvcc, "-dryrun", "-x", "cu", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
        if top is not None and toolkit_lacks(top[1]) is None:
            os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def cuda_missing(sources: list[str]) -> str | None:
    """Why the CUDA sources cannot be compiled; None when they can be tried."""
    import torch

    given = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    if given is None:
        find_toolkit()
    from torch.utils.cpp_extension import CUDA_HOME

    if not sources:
        return "there are no CUDA sources in csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not CUDA_HOME:
        return "nvcc was not found (set CUDA_HOME)"
    lacking = toolkit_lacks(CUDA_HOME)
    if lacking is not None:
        return f"{given}={CUDA_HOME} has no {lacking}" if given else f"{CUDA_HOME} has no {lacking} (set CUDA_HOME)"
    return None


def compile_flags() -> list[str]:
    """Flags of the C++ sources; the language standard is the one torch's own build helper picks."""
    from torch.utils.cpp_extension import include_paths

    flags = ["-fvisibility=hidden", "-Wall", "-Wextra"]
    # at::parallel_for is a template in torch's headers: without -fopenmp it runs serially in this library.
    flags += ["-fopenmp"] if sys.platform != "darwin" else []
    if SANITIZE:
        # The arithmetic is that of the build that ships, contraction included: its accuracy is tested here too.
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=fast", f"-fsanitize={SANITIZE}"]
    else:
        flags += ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    if os.environ.get("DLA_FAST_WERROR", "0") not in ("", "0"):
        flags.append("-Werror")
    # As system headers torch's warnings stay torch's; gcc and clang then ignore the same directories given with -I.
    for path in include_paths():
        flags += ["-isystem", path]
    return flags


def make_extension(cpu: list[str], cuda: list[str]) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cxx = compile_flags()
    # Not linked with -fopenmp: the symbols come from the OpenMP library that torch brings and has loaded. A second one
    # beside it would keep a thread pool of its own, and the two would fight for the cores.
    link = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
    common = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sorted(glob.glob("csrc/**/*.h", root_dir=ROOT, recursive=True)),
        "extra_link_args": link,
    }
    if not cuda:
        return CppExtension("dla_fast._C", cpu, extra_compile_args={"cxx": cxx}, **common)
    nvcc = ["-O3", "--expt-relaxed-constexpr", "-Xcudafe", "--diag_suppress=20012"]
    if os.environ.get("DLA_FAST_WERROR", "0") not in ("", "0"):
        nvcc += ["--Werror", "all-warnings"]
    common["define_macros"] = [("DLA_FAST_WITH_CUDA", "1")]
    # In this order an nvcc that fails does so before minutes have gone into the rest.
    return CUDAExtension("dla_fast._C", cuda + cpu, extra_compile_args={"cxx": cxx, "nvcc": nvcc}, **common)


def default_architectures() -> None:
    import torch

    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    newest = "9.0;10.0+PTX" if version >= (12, 8) else "9.0+PTX"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;8.6;8.9;{newest}")


def cuda_architectures() -> tuple[str, ...]:
    """What TORCH_CUDA_ARCH_LIST asks for, one by one."""
    return tuple(re.split(r"[ ;,]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip(" ;,")))


def make_plan() -> Plan:
    plan = Plan()
    if BUILD_EXT == "0":
        plan.reason = plan.cuda_reason = "it was switched off with DLA_FAST_BUILD_EXT=0"
        return plan
    if not set(sys.argv[1:]).isdisjoint(WITHOUT_TORCH) or len(sys.argv) < 2:
        plan.reason = "nothing was built"
        return plan
    import_torch()
    cpu = sorted(glob.glob("csrc/*.cpp", root_dir=ROOT) + glob.glob("csrc/cpu/**/*.cpp", root_dir=ROOT, recursive=True))
    cuda = sorted(glob.glob("csrc/cuda/*.cu", root_dir=ROOT))
    plan.compiler, why = find_compiler()
    if not cpu:
        plan.refuse("there are no sources in csrc")
    elif plan.compiler is None:
        plan.refuse(why)
    if BUILD_CUDA == "0":
        plan.cuda_reason = "it was switched off with DLA_FAST_BUILD_CUDA=0"
    elif plan.reason is not None:
        plan.refuse_cuda(plan.reason)
    elif (missing := cuda_missing(cuda)) is not None:
        plan.refuse_cuda(missing)
    if plan.reason is None:
        if plan.cuda_reason is None:
            default_architectures()
            plan.extensions.append(make_extension(cpu, [*cuda, *sorted(glob.glob("csrc/cuda/*.cpp", root_dir=ROOT))]))
        # Second in line: what to fall back on when the CUDA sources do not compile.
        plan.extensions.append(make_extension(cpu, []))
    return plan


PLAN = make_plan()


def requirements() -> list[str]:
    """An extension fits the torch that it was built for and no other, so the package then asks for exactly that one.

    Otherwise pip is free to replace it for another package's sake, and the extension would be of no use from then on.
    The version is that of the distribution, local part included, which is what pip compares.
    """
    needs = "torch>=2.11"
    if PLAN.extensions:
        import torch

        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version("torch")
            # One that pip did not install, found on PYTHONPATH, is not for pip to ask for.
            if installed.split("+")[0] == torch.__version__.split("+")[0]:
                needs = f"torch=={installed}"
    return [needs, "tqdm"]


def write_build_info(path: Path, *, with_cpu: bool, with_cuda: bool) -> None:
    """Record in ``_build.py`` what this build is, for ``dla_fast._extension`` and ``doctor``."""
    torch = sys.modules.get("torch")
    values = {
        "TORCH_VERSION": str(torch.__version__) if torch else None,
        "CUDA_VERSION": torch.version.cuda if torch else None,
        "COMPILER": PLAN.compiler,
        "WITH_CPU": with_cpu,
        "WITH_CUDA": with_cuda,
        "REASON": None if with_cpu else f"the C++ extension was not built: {PLAN.reason}",
        "CUDA_ARCHITECTURES": cuda_architectures() if with_cuda else (),
        "CUDA_REASON": None if with_cuda else f"the CUDA kernels were not built: {PLAN.cuda_reason}",
        "SANITIZE": SANITIZE or None,
    }
    lines = ['"""What this build of dla_fast contains; written by setup.py."""', ""]
    lines += [f"{name} = {value!r}" for name, value in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class BuildPy(setuptools_build_py):
    """Leave out the record of another build, and write this one's even where there is nothing to compile."""

    def find_package_modules(self, package, package_dir):  # type: ignore[no-untyped-def]
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] != ("dla_fast", "_build")]

    def run(self) -> None:
        super().run()
        if not PLAN.extensions:
            base = ROOT if self.editable_mode else Path(self.build_lib)
            write_build_info(base / "dla_fast" / "_build.py", with_cpu=False, with_cuda=False)
            print(f"dla_fast: C++ extension not built: {PLAN.reason}", flush=True)


class Watch:
    """What compilers say goes on to standard output, and is kept to find out what went wrong.

    Unless everything is to be seen, a file's name stands for the command that compiles it. Compilers are processes of
    their own that ninja starts, so file descriptors are watched, not Python's streams.
    """

    # ninja puts its count in front, setuptools nothing.
    COMMAND = re.compile(r"(\[\d+/\d+\] )?.* -c '?(?:\S*/)?(csrc/\S+?\.(?:cpp|cu))'? -o ")
    # Of gcc, clang, nvcc and its tools, and the linker.
    ERROR = re.compile(r"(?:^|[\s:)])(?:fatal error|error|fatal)\b[^:]{0,12}:|(?:^|/)ld(?:\.\w+)?: (?!warning)")
    COLOUR = re.compile(r"\x1b\[[0-9;]*[mK]")

    def __enter__(self) -> Watch:
        self.lines: list[str] = []
        sys.stdout.flush()
        sys.stderr.flush()
        self.saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        self.source, sink = os.pipe()
        for descriptor in self.saved:
            os.dup2(sink, descriptor)
        os.close(sink)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in self.saved.items():
            os.dup2(saved, descriptor)
        # A compiler cache that stays in the background holds the pipe open; it has nothing more to say.
        self.reader.join(timeout=5)
        if not self.reader.is_alive():
            for saved in self.saved.values():
                os.close(saved)

    def read(self) -> None:
        with open(self.source, encoding="utf-8", errors="replace") as source:
            for line in source:
                shown = line if VERBOSE else self.shorten(line)
                self.lines.append(self.COLOUR.sub("", line).rstrip())
                # Reading goes on where nobody listens: compilers would wait for it.
                with contextlib.suppress(OSError):
                    os.write(self.saved[1], shown.encode("utf-8", "replace"))

    def shorten(self, line: str) -> str:
        if self.lines and self.lines[-1].startswith("FAILED: "):
            return ""
        command = self.COMMAND.match(line)
        return f"{command[1] or ''}{command[2]}\n" if command else line

    def first_error(self) -> str | None:
        """The first line of the first error."""
        # What ninja lets a command say follows its name and itself.
        failed = next((index + 2 for index, line in enumerate(self.lines) if line.startswith("FAILED: ")), 0)
        said = [line.strip() for line in self.lines[failed:] if line.strip() and not self.COMMAND.match(line)]
        error = next((line for line in said if self.ERROR.search(line)), None)
        if error is None and failed and said and not said[0].startswith(("[", "FAILED: ", "ninja: ")):
            error = said[0]
        return None if error is None else error.replace(f"{ROOT}{os.sep}", "")[:400]


def message(error: Exception) -> str:
    """The first line of an exception; torch leaves it to others to fill in a message's values."""
    text = str(error)
    if len(error.args) > 1 and isinstance(error.args[0], str):
        with contextlib.suppress(TypeError, ValueError):
            text = error.args[0] % error.args[1:]
    return (text.strip() or type(error).__name__).splitlines()[0]


def build_ext_class() -> type:
    """The build command on top of torch's, or setuptools' own where nothing is compiled."""
    if not PLAN.extensions:
        base: type = setuptools_build_ext
    else:
        from torch.utils.cpp_extension import BuildExtension

        base = BuildExtension

    class BuildExt(base):  # type: ignore[misc, valid-type]
        def run(self) -> None:
            self.with_cpu = self.with_cuda = False
            super().run()
            target = ROOT if self.inplace else Path(self.build_lib)
            write_build_info(target / "dla_fast" / "_build.py", with_cpu=self.with_cpu, with_cuda=self.with_cuda)
            what = "CPU and CUDA" if self.with_cuda else "CPU"
            if self.with_cpu:
                print(f"dla_fast: C++ extension built ({what}; {PLAN.compiler})", flush=True)
            else:
                print(f"dla_fast: C++ extension not built: {PLAN.reason}", flush=True)

        def build_extensions(self) -> None:
            """Try the plan's extensions in turn: with CUDA, for the CPU alone, none."""
            # One object takes the place of each in turn: setuptools has prepared the one that it was given, no other.
            (extension,) = self.extensions
            for planned in PLAN.extensions:
                vars(extension).update(vars(planned))
                cuda = any(source.endswith(".cu") for source in extension.sources)
                self.announce(extension.sources, cuda)
                # The library of an earlier build, perhaps of another plan, must not pass for this one's.
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.get_ext_fullpath(extension.name))
                watch = Watch()
                try:
                    with watch:
                        super().build_extensions()
                    # A compiler can do nothing and say that all went well.
                    if not os.path.exists(self.get_ext_fullpath(extension.name)):
                        raise RuntimeError("the compiler left no library behind")
                # torch reports a failed ninja run as RuntimeError, setuptools as its own CompileError or LinkError.
                except Exception as error:
                    why = f"compilation failed: {watch.first_error() or message(error)}"
                    asked_for = "DLA_FAST_BUILD_CUDA" if cuda else "DLA_FAST_BUILD_EXT"
                    if (BUILD_CUDA if cuda else BUILD_EXT) == "1":
                        sys.exit(f"{asked_for}=1, but {why}; see the compiler's output above")
                    print(f"dla_fast: {why}; going on without it, see the compiler's output above", flush=True)
                    if cuda:
                        PLAN.cuda_reason = why
                    else:
                        PLAN.reason = why
                    continue
                self.with_cpu, self.with_cuda = True, cuda
                return
            self.extensions[:] = []

        def announce(self, sources: list[str], cuda: bool) -> None:
            """Say what will take its time."""
            files = f"{len(sources)} file{'s' if len(sources) > 1 else ''}"
            what = f"the C++ extension: {files}, one to three minutes on two cores from scratch"
            if cuda:
                architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
                what += f", and minutes more for each of the GPU architectures {architectures} (TORCH_CUDA_ARCH_LIST)"
            print(
                f"dla_fast: compiling {what}{'' if VERBOSE else '; DLA_FAST_VERBOSE=1 shows the commands'}", flush=True
            )

    return BuildExt


def put_ninja_on_path() -> None:
    """A pip started by its path leaves the environment's ninja off PATH, and torch would compile file by file."""
    try:
        import ninja
    except ModuleNotFoundError:
        return
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), ninja.BIN_DIR])


put_ninja_on_path()
setup(
    **LICENSE,
    install_requires=requirements(),
    ext_modules=PLAN.extensions[:1],
    cmdclass={"build_ext": build_ext_class(), "build_py": BuildPy},
)
