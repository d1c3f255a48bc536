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


def may_draw(module: nn.Module) -> list[nn.Module]:
    """The parts of `module` whose forward pass may draw random numbers in training: dropout (a
    module of torch's, or a rate of its own, as Hugging Face's attention has)."""
    return [part for part in module.modules() if _rates(part)]


def draws(part: nn.Module) -> bool:
    """Whether one of `may_draw` does so now: it is in training, and its rate is not zero."""
    return part.training and any(rate > 0 for rate in _rates(part))


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


def _rates(part: nn.Module) -> list[float]:
    if isinstance(part, _DropoutNd):
        return [part.p]
    named = (value for name, value in vars(part).items() if "drop" in name)
    return [rate for rate in named if isinstance(rate, float)]
