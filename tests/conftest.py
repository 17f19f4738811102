"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

from dla_fast._timm import import_timm


@pytest.fixture(scope="session")
def timm():
    return import_timm()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
