"""Which implementation runs: an explicit choice, by device and by `RLHFUSE_KERNELS`.

``auto`` (the default): Triton on a GPU where it is installed; on a CPU what numba compiles, for
rows of logits narrower than float64 with at least `COMPILED_VOCAB` columns; else plain torch.
``triton``: Triton or an error; on a CPU it needs Triton's interpreter (TRITON_INTERPRET=1).
``reference``: the definitions of `reference.py`, on any device.
"""

import importlib.util
import os
from enum import StrEnum

import torch

COMPILED_VOCAB = 1024  # smaller ones do not repay the half second that numba takes to import


class Path(StrEnum):
    """An implementation."""

    REFERENCE = "reference"
    COMPILED = "compiled"
    TORCH = "torch"
    TRITON = "triton"


def choose(device: torch.device) -> Path:
    """The implementation for tensors on `device`, by the environment as it is now.

    Raises:
        ValueError: RLHFUSE_KERNELS is none of the three, or asks for a Triton that cannot run.
    """
    asked = os.environ.get("RLHFUSE_KERNELS", "auto")
    if asked == "auto":
        if device.type == "cpu":
            return Path.COMPILED
        return Path.TRITON if device.type == "cuda" and has_triton() else Path.TORCH
    if asked == "reference":
        return Path.REFERENCE
    if asked != "triton":
        raise ValueError(f"RLHFUSE_KERNELS={asked!r} is unknown: use reference, triton or auto")
    if not has_triton():
        raise ValueError("RLHFUSE_KERNELS=triton, but triton is not installed: pip install triton")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "RLHFUSE_KERNELS=triton on a CPU runs in Triton's interpreter only: set "
            "TRITON_INTERPRET=1 as well, or leave RLHFUSE_KERNELS at auto"
        )
    return Path.TRITON


def describe(device: torch.device) -> str:
    """What runs on `device`, in words. Raises ValueError as `choose` does."""
    path = choose(device)
    if path is not Path.COMPILED:
        return f"{path.value} on {device.type}"
    return (
        f"compiled by numba on {device.type} (log-probabilities from {COMPILED_VOCAB} logits a row "
        "on, GAE, whitening), plain torch for the rest"
    )


def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None
