"""Shared fixtures."""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import warnings

import pytest
import torch

with warnings.catch_warnings():
    # Why there is no extension ends the session below, in one line.
    warnings.simplefilter("ignore", RuntimeWarning)
    from dla_fast import _extension

import serving

from dla_fast._timm import import_timm
from dla_fast.ops.precision import fp32_precision

# Where kernels are interpreted only every so many combinations run, coprime to the numbers of dtypes and layouts.
THINNED = {
    "test_parity_of_one_to_eight_inputs": 17,
    "test_inference": 17,
    "test_parity_of_norm_variants": 17,
    "test_parity": 11,
    "test_nan_goes_through": 11,
    "test_gradcheck": 5,
    "test_opcheck": 11,
    "test_stride_and_dilation": 7,
    "test_any_input_is_the_residual": 7,
    "test_gradients_that_are_wanted_alone": 5,
    "test_gradcheck_of_every_geometry": 11,
    "test_the_node": 5,
    "test_any_input_is_normalised_on_load": 7,
    "test_every_activation": 7,
    "test_few_pixels_and_whole_tiles": 5,
    "test_beside_a_residual_of_the_node": 5,
    "test_of_a_node": 7,
    "test_of_a_norm": 5,
    "test_of_upsampling": 5,
}


# The same for every test, where a sanitizer makes each slow.
EVERY = int(os.environ.get("DLA_FAST_TEST_EVERY", "1"))

# What is about kernels, their operators and the choice among them; the reference has none of these.
KERNELS = ("test_backend", "test_cpu_*", "test_cuda_host", "test_ops", "test_threads", "test_triton")
collect_ignore_glob = [f"{name}.py" for name in KERNELS] if serving.DISABLED else []


def pytest_configure(config):
    """Without the extension most tests would run on the reference, or not at all, and pass."""
    needed = {"cpu", "cuda"}.intersection(serving.NAMES)
    if needed and not _extension.STATUS.loaded and not serving.DISABLED:
        raise pytest.UsageError(
            f"{_extension.STATUS.reason}\n(DLA_FAST_DISABLE=1 tests the reference alone, without the C++ extension)"
        )


def pytest_collection_modifyitems(config, items):
    # What takes minutes comes first, so that no process ends alone with it; and of two processes, which begin with a
    # half of the list each, at the head of both.
    slow = [item for item in items if item.path.name == "test_triton.py"]
    others = [item for item in items if item.path.name != "test_triton.py"]
    rest = len(items) // 2 - len(slow[::2])
    items[:] = [*slow[::2], *others[: max(rest, 0)], *slow[1::2], *others[max(rest, 0) :]]
    if not serving.INTERPRETED and EVERY == 1:
        return
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    dropped = []
    for item in items:
        name = item.originalname
        seen[item.path.name, name] += 1
        if (seen[item.path.name, name] - 1) % (THINNED.get(name, 1) if serving.INTERPRETED else EVERY):
            dropped.append(item)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def timm():
    return import_timm()


@pytest.fixture(scope="session")
def maker():
    """What makes data in the layouts of the published sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.path.join(os.path.dirname(__file__), os.pardir, "examples"))
        yield importlib.import_module("made_data")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small maps gain nothing from more, and on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _small_device():
    """Tiles are chosen for a device of few processors where programs run one after the other: fewer, larger ones."""
    if serving.INTERPRETED:
        from dla_fast.kernels import config

        config.PROGRAMS, config.PROCESSORS = 16, 2


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    with pytest.MonkeyPatch.context() as patches:
        if serving.INTERPRETED:
            from benchmarks.gates import quick_interpreter

            quick_interpreter.install(patches.setattr)
        yield


@pytest.fixture(autouse=True, scope="session")
def _exact_products():
    """The interpreter follows float32's switch, which is on by default; on the CPU float32 is multiplied as such."""
    with fp32_precision("ieee") if serving.INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every uninitialised tensor is full of NaN, so that reading one shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
