"""Sums of gradients over micro-batches, in float32 at least, in the order in which they arise."""

from collections.abc import Iterable

import torch
from torch import nn


class GradientSums:
    """The gradient sums of some parameters.

    float32 parameters sum in ``.grad``, as autograd does. Narrower ones would lose small
    contributions there: each of their gradients is moved to a float32 sum as soon as it is made.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._wide: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self._parameters:
            if _is_narrow(parameter):
                parameter.register_post_accumulate_grad_hook(self._move)

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """One more contribution, made outside autograd. The sum may keep `gradient` itself."""
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient
        if _is_narrow(parameter):
            self._move(parameter)

    def of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The sum so far; None where nothing has been added."""
        return self._wide.get(parameter) if _is_narrow(parameter) else parameter.grad

    def clear(self) -> None:
        """Forget all sums."""
        self._wide.clear()
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def _move(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # a split backward pass: its product comes later
            return
        if parameter in self._wide:
            self._wide[parameter] += parameter.grad
        else:
            self._wide[parameter] = parameter.grad.float()
        parameter.grad = None


def _is_narrow(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
