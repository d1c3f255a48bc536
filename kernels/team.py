# mypy: disable-error-code="misc, untyped-decorator, no-untyped-call"
"""Compiled code on torch's own threads.

After each of its loops torch's OpenMP threads wait for the next one by spinning, some
milliseconds long, and anybody else's threads would contend with them for the cores. So work is
handed to those same threads, by the entry that OpenMP libraries have for code compiled by GCC
(`GOMP_parallel`), from the one that torch has loaded. Where there is none (a torch without
OpenMP), the caller does all of it.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic

ROWS, STEP, FIRST_FREE = 1, 2, 3
"""Places in a job: its rows, how many of them are taken at a time, and what it may hold itself.
Place 0 counts what has been taken."""

Body = Callable[[Any], None]


def _pointer_to(kind: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(kind)(numba.types.int64), make


@intrinsic
def _floats_at(typing_context: Any, address: Any) -> Any:
    return _pointer_to(numba.types.float32)


@intrinsic
def _integers_at(typing_context: Any, address: Any) -> Any:
    return _pointer_to(numba.types.int64)


@intrinsic
def _take(typing_context: Any, job: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = context.get_constant(numba.types.int64, 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return numba.types.int64(numba.types.CPointer(numba.types.int64)), make


# In compiled code: the numbers at an address, as a pointer for `carray`; arrays of such; and what
# adds 1 to place 0 of a job, whoever else does so now, and returns what was there.
floats_at: Any = _floats_at
integers_at: Any = _integers_at
carray: Any = numba.carray  # type: ignore[attr-defined]
take: Any = _take


def entry(body: Body) -> Any:
    """Compile (or load from the cache on disk) what threads run: a function of a job, a pointer to
    int64, that takes steps of its rows until none are left."""
    signature = numba.types.void(numba.types.CPointer(numba.types.int64))
    return numba.cfunc(signature, cache=True, error_model="numpy")(body)


def run(entry: Any, num_rows: int, num_pieces: int, numbers: tuple[int, ...]) -> None:
    """All rows of a job, in about as many pieces, on up to as many threads as torch uses.

    Args:
        numbers: what the job holds from `FIRST_FREE` on. Who owns the memory that it points to
            must keep it until then.
    """
    step = max(1, -(-num_rows // max(1, num_pieces)))
    job = np.array([0, num_rows, step, *numbers], dtype=np.int64)
    threads = min(torch.get_num_threads(), -(-num_rows // step))
    fork = _fork() if threads > 1 else None
    if fork is None:
        entry.ctypes(job.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        fork(entry.address, job.ctypes.data, threads, 0)


@functools.cache
def _fork() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel(function, argument, threads, flags)``: the function on each of them."""
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if found is None or not torch.backends.openmp.is_available():
        return None
    found.restype = None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return found  # type: ignore[no-any-return]
