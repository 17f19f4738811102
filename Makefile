# make demo and make test need Python >= 3.10 and a C++ compiler; they make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
MAX_JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))' 2>/dev/null || echo 1)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
TASKS_ARGS ?=

PY := $(VENV)/bin/python
PACKAGE := setup.py pyproject.toml dla_fast/_version.py
SOURCES := $(shell find csrc tests/cuda_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

export MAX_JOBS
# make V=1 shows the compilers' command lines.
ifeq ($(V),1)
export DLA_FAST_VERBOSE := 1
endif
# torch's build helper looks for ninja on PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test tasks test-torch test-install asan aot traffic gates gates-newest cuda-host cuda-check rehearse bench readme docs lint format clean distclean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: install ## swap and freeze timm's DLA-34 on real photographs, and compare
	$(PY) -m dla_fast demo $(DEMO_ARGS)

test: install ## run the tests
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

tasks: install ## train, evaluate and use a small network on each of the paper's four tasks, on made data
	$(PY) -m benchmarks.gates.tasks $(TASKS_ARGS)

# Another torch, in an environment and a copy of the tree of its own, since an extension fits one torch alone. The pins
# hold but for what that torch chooses itself. CUDA is built where that torch and nvcc allow it, for one architecture;
# DLA_FAST_BUILD_CUDA=1 makes it an error where they do not. Not in .ci/run, which it would make too long.
TORCH ?= 2.11.0
OTHER := $(VENV)-torch-$(TORCH)
OTHER_TREE := build/torch-$(TORCH)
OTHER_PY := $(abspath $(OTHER))/bin/python
test-torch: $(OTHER)/.requirements ## run the tests with another torch: make test-torch TORCH=2.11.0
	mkdir -p $(OTHER_TREE)
	cd $(OTHER_TREE) && rm -rf csrc dla_fast tests benchmarks examples
	cp -rp CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md benchmarks \
	  csrc dla_fast docs examples pyproject.toml requirements.txt setup.py tests $(OTHER_TREE)
	rm -rf $(OTHER_TREE)/dla_fast/_C*.so $(OTHER_TREE)/dla_fast/_build.py $(OTHER_TREE)/benchmarks/out
	cd $(OTHER_TREE) && DLA_FAST_BUILD_EXT=0 DLA_FAST_BUILD_CUDA=0 $(OTHER_PY) -m pip install --quiet \
	  --disable-pip-version-check --no-deps --no-build-isolation -e .
	cd $(OTHER_TREE) && export PATH="$(dir $(OTHER_PY)):$$PATH" DLA_FAST_BUILD_EXT=1 && \
	  TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0a}" $(OTHER_PY) setup.py --quiet build_ext --inplace
	cd $(OTHER_TREE) && $(OTHER_PY) -m dla_fast doctor
	cd $(OTHER_TREE) && $(OTHER_PY) -m pytest -n 2 $(PYTEST_ARGS)

$(OTHER)/.requirements: requirements.txt
	test -x $(OTHER_PY) || $(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|torchvision|triton|setuptools)==' requirements.txt > $(OTHER)/constraints.txt
	$(OTHER_PY) -m pip install --quiet --disable-pip-version-check -c $(OTHER)/constraints.txt torch==$(TORCH) \
	  torchvision 'triton; sys_platform == "linux"' setuptools wheel ninja timm tqdm matplotlib scikit-learn \
	  scikit-image tensorboard torchmetrics safetensors hypothesis pytest pytest-benchmark pytest-xdist
	@touch $@

# Bare environments with packages as pip finds them, and the whole build in them: minutes, so not in .ci/run either. The
# last of the ways needs a CUDA build of torch, which is gigabytes, and runs on request.
TORCH_CUDA ?= 2.11.0
test-install: ## install from bare environments as a stranger does (TORCH=2.13.0; CUDA=1 with a CUDA build of torch)
	$(PYTHON) tests/install.py --torch-cuda $(TORCH_CUDA) $(if $(filter file,$(origin TORCH)),,--torch $(TORCH)) \
	  --only plain oldest $(if $(filter 1,$(CUDA)),cuda)

# Every fifth combination of a test's parameters, of which none divides by five: each value of each still comes up.
# A copy of the tree, so that the sanitized library never stands in for the real one.
ASAN := build/asan
asan: install ## run the kernels' tests under AddressSanitizer
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r csrc dla_fast tests setup.py pyproject.toml README.md LICENSE $(ASAN)
	rm -f $(ASAN)/dla_fast/_C*.so
	cd $(ASAN) && DLA_FAST_SANITIZE=address DLA_FAST_BUILD_EXT=1 $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(ASAN) && DLA_FAST_TEST_EVERY=7 DLA_FAST_SANITIZE=address LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(abspath $(PY)) -m pytest -q -n 2 -p no:cacheprovider \
	  tests/test_aggregate.py tests/test_batch_norm_act.py tests/test_merge.py tests/test_conv_norm_act.py \
	  tests/test_strides.py tests/test_cpu_convolution.py tests/test_cpu_few_pixels.py tests/test_cpu_finish.py \
	  tests/test_cpu_bf16.py tests/test_cpu_bf16_backward.py tests/test_cpu_bf16x3.py tests/test_cpu_bf16x3_convolution.py \
	  tests/test_upsample.py \
	  tests/test_cpu_norm.py tests/test_cpu_prologue.py tests/test_cuda_host.py -k "not compile and not vmap"

# Ten minutes at most on two cores: no case starts after the eighth, and what was left out is told.
bench: install ## run the benchmarks; writes benchmarks/out/bench.json and bench.html
	$(PY) -m dla_fast bench all --models dla34 dla34up --batch 8 --rounds 9 --seconds 2 --minutes 8 \
	  --json benchmarks/out/bench.json --html benchmarks/out/bench.html $(BENCH_ARGS)

readme: install ## write the README's figures and docs/benchmarks.md from benchmarks/results
	$(PY) -m benchmarks.readme

docs: install ## write the API reference to build/docs, from the docstrings
	$(PY) -m pdoc --docformat google -o build/docs dla_fast dla_fast.backend dla_fast.swap
	@echo "build/docs/index.html"

aot: install ## compile the Triton kernels that ship ahead of time, with no GPU
	$(PY) -m benchmarks.gates.aot

traffic: install ## count the bytes that the Triton kernels move, with no GPU
	$(PY) -m benchmarks.gates.traffic --passes

gates: traffic aot cuda-check ## what the GPU kernels are held to where there is no GPU

rehearse: install ## rehearse the run on a GPU, with none: its kernels compiled, its blocks on the CPU, its timetable
	$(PY) -m benchmarks.gpu --rehearse

cuda-host: install ## run the CUDA kernels on the host, thread by thread, against the reference
	$(PY) -m pytest -n 2 tests/test_cuda_host*.py $(PYTEST_ARGS)

cuda-check: install ## compile the CUDA kernels for every architecture and look at the machine code (needs nvcc)
	$(PY) -m benchmarks.gates.cuda_check

# A second environment: kernels must compile with the newest Triton too. Not in .ci/run, which it would make too long.
NEWEST_TRITON ?= 3.9.0
NEWEST := $(VENV)-triton-$(NEWEST_TRITON)
gates-newest: ## the same with the newest Triton, in an environment of its own
	$(PYTHON) -m venv $(NEWEST)
	grep -E '^(--|torch==|numpy==|tqdm==|setuptools==)' requirements.txt > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r $(NEWEST)/requirements.txt triton==$(NEWEST_TRITON)
	$(NEWEST)/bin/python -m benchmarks.gates.traffic --passes
	$(NEWEST)/bin/python -m benchmarks.gates.aot

install: $(VENV)/.built ## make .venv from requirements.txt and build the package in place

lint: install ## ruff, mypy and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(if $(SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES))

format: install ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(SOURCES),$(VENV)/bin/clang-format -i $(SOURCES))

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info dla_fast/_build.py dla_fast/_C*.so $(VENV)/.installed $(VENV)/.built
	find dla_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and the tools' caches too
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "dla_fast needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.txt | $(PY)
	@echo "installing the pinned requirements into $(VENV); the first time this takes a few minutes"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The package is registered without the extension, which is then built in place: pip would compile it in a temporary
# directory and so from scratch every time, while ninja rebuilds only what changed.
$(VENV)/.installed: $(VENV)/.requirements $(PACKAGE)
	DLA_FAST_BUILD_EXT=0 DLA_FAST_BUILD_CUDA=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(filter csrc/%,$(SOURCES))
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@
