# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: where the programs of one launch meet, so that a reduction needs no second launch.

One int32 in memory counts arrivals. Program 0 adds what is missing to 2^31 and the others add 1, so
the sign turns with the last arrival and the rest is 0 again: nothing is reset, and the next launch,
of however many programs, finds a counter as good as new (cooperative groups' grids meet so, too).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_PER_MULTIPROCESSOR = 4


@triton.jit
def _arrive(counter_ptr):
    """(the counter before, and after) this program's arrival; what it stored is seen by whoever
    sees the arrival."""
    others = 1 - tl.num_programs(0)
    share = tl.where(tl.program_id(0) == 0, others ^ -2147483648, 1)
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, share, sem="acq_rel", scope="gpu")
    return before, before + share


@triton.jit
def is_last(counter_ptr):
    """Whether all other programs have been here: true in one of them. None waits."""
    before, after = _arrive(counter_ptr)
    tl.debug_barrier()
    return (before ^ after) < 0


@triton.jit
def meet(counter_ptr):
    """Wait for all programs, which must run side by side: a cooperative launch."""
    before, now = _arrive(counter_ptr)
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


def counter(device: torch.device) -> Tensor:
    """The counter of the current stream, whose launches use it one after the other.

    What is captured into a graph may be replayed on any stream: there each launch gets its own,
    which the graph clears.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    return _counter(device if device.index is not None else stream.device, stream.cuda_stream)


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def side_by_side(device: torch.device) -> int:
    """How many programs of a launch with `options` certainly run at the same time; one in Triton's
    interpreter, which runs them one after the other."""
    if device.type != "cuda":
        return 1
    multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return multiprocessors * (1 if torch.version.hip else _PER_MULTIPROCESSOR)


def options() -> dict[str, int]:
    """How kernels whose programs meet are launched: 4 programs of 128 threads with 128 registers
    each are what a multiprocessor has room for. A launch that did not fit would be refused."""
    limit = {} if torch.version.hip else {"maxnreg": 128}
    return {"num_warps": 4, "launch_cooperative_grid": True, **limit}
