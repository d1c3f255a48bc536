"""Random number streams: what a task draws does not depend on what ran before it.

Modules draw from torch's default generators, so the order of tasks, which is the schedule's, would
show in their dropout masks. A task with a stream of its own starts those generators from a key of
its own, and leaves them as they were; to compute it again draws the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from rlhfuse.kernels.keyed import key_of


def draws(module: nn.Module) -> bool:
    """Whether a forward pass may draw random numbers: some part of `module` is in training and has
    dropout (a module of torch's, or a rate of its own, as Hugging Face's attention has)."""
    return any(part.training and _rate(part) > 0 for part in module.modules())


@contextmanager
def stream(device: torch.device, *key: object) -> Iterator[None]:
    """Within, torch's default generators of the CPU and of `device` start from `key`."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = key_of(*key) & (2**63 - 1)
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _rate(part: nn.Module) -> float:
    if isinstance(part, _DropoutNd):
        return part.p
    rates = (value for name, value in vars(part).items() if "drop" in name)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)
