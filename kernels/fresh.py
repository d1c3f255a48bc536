"""Fresh memory for what is large: in large pages, on a CPU.

The operating system clears fresh memory a page at a time where it is first touched. In pages of
4 KB that takes as long as some ten passes over the same memory, and threads that touch it together
wait for one another. numpy asks Linux for pages of 2 MB (madvise) from 4 MB on; torch does not.
Where there are none to be had it is memory like any other.
"""

import math

import numpy as np
import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes from which numpy asks
_PAGE = 1 << 21


def fresh(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape)``: with anything in it (NaN in torch's deterministic mode)."""
    dtype = like.dtype if dtype is None else dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    memory = np.empty(size + _PAGE, np.uint8)  # what is not touched is not there
    start = -memory.ctypes.data % _PAGE
    found = torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled() and dtype.is_floating_point:
        found.fill_(torch.nan)
    return found
