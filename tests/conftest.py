"""Shared fixtures."""

from __future__ import annotations

import pytest
import serving
import torch

from dla_fast._timm import import_timm


@pytest.fixture(scope="session")
def timm():
    return import_timm()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small maps gain nothing from more, and on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _small_device():
    """Tiles are chosen for a device of few processors where programs run one after the other: fewer, larger ones."""
    if serving.INTERPRETED:
        from dla_fast.kernels import config

        config.PROGRAMS = 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
