"""Fixtures of the kernels' tests."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Deterministic mode: torch fills every fresh tensor with NaN, so that unwritten results are
    seen, and refuses whatever does not give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
