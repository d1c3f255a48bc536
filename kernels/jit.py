"""What compiled code on a CPU needs: numba's compiler, and tensors as arrays."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy.typing as npt
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(*freedoms: str) -> Callable[[Function], Function]:
    """Numba's njit, cached on disk, compiled at the first call, with these freedoms of rounding.

    The cache notices changes of a function's own file only: what one calls stands beside it.
    """

    def compile_(function: Function) -> Function:
        jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=set(freedoms))
        return cast(Function, jit(function))

    return compile_


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """Its memory where it lies end to end, else a copy of it."""
    return tensor.detach().contiguous().numpy()
