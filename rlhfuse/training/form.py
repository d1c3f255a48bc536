"""What a message looks like, which both of its ends know."""

import math
from dataclasses import dataclass

import torch

from rlhfuse.training.links import Message


@dataclass(frozen=True, slots=True)
class Form:
    """What a message looks like; `shape` None where only its sender knows."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    advice: str = ""
    """What to do where a message has another shape."""

    def check(self, message: Message, tensor: torch.Tensor) -> None:
        """ValueError where `tensor` has another shape or type than announced."""
        if self.shape is not None and tensor.shape != self.shape:
            raise ValueError(
                f"{message} has shape {tuple(tensor.shape)}, announced was {tuple(self.shape)}"
                + (f"; {self.advice}" if self.advice else "")
            )
        if tensor.dtype != self.dtype:
            raise ValueError(f"{message} is of {tensor.dtype}, announced was {self.dtype}")

    @property
    def size(self) -> int:
        """Bytes; the shape must be known."""
        assert self.shape is not None, "the shape is not known"
        return math.prod(self.shape) * self.dtype.itemsize
