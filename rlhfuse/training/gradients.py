"""Sums of gradients over micro-batches, in float32 at least: in the order in which they arise, or
such that no order shows."""

import math
from collections.abc import Iterable

import torch
from torch import nn

# Units of sums that no order shows in: small beside the float32 rounding of what counts.
_UNITS = 2.0**48
_PIECE = 1024
_LEAST = 1e-30  # of a sum of squares: below it, float32 may have lost some


class GradientSums:
    """The gradient sums of some parameters.

    float32 parameters sum in ``.grad``, as autograd does. Narrower ones would lose small
    contributions there: each of their gradients is moved to a float32 sum as soon as it is made.

    With `any_order`, what a backward pass makes is rounded to a multiple of 2^-48 and summed in
    float64. Such sums are exact up to 32 (beyond: float64 rounding), and so the same bits in every
    order and however they are divided over ranks (reproducible summation by pre-rounding: Demmel
    and Nguyen, ARITH 2013). `settle` turns them into gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, any_order: bool = False) -> None:
        self._parameters = tuple(parameters)
        self._any_order = any_order
        self._wide: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self._parameters:
            if any_order or _is_narrow(parameter):
                parameter.register_post_accumulate_grad_hook(self._move)

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """One more contribution, made outside autograd; to be called where no graph is made. The
        sum may keep `gradient` itself."""
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient
        if self._any_order or _is_narrow(parameter):
            self._move(parameter)

    def of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The sum so far; None where nothing has been added."""
        wide = self._wide.get(parameter)
        return parameter.grad if wide is None else wide

    def fill(self) -> None:
        """With `any_order`: nothing more comes, and what got nothing has a sum of zeros."""
        for parameter in self._parameters if self._any_order else ():
            if parameter not in self._wide:
                self._wide[parameter] = torch.zeros_like(parameter, dtype=torch.float64)

    @torch.no_grad()
    def settle(self, factor: float) -> None:
        """With `any_order`: the sums, times `factor`, are gradients in float32 from here on."""
        assert self._any_order
        for parameter, total in self._wide.items():
            self._wide[parameter] = total.mul_(factor / _UNITS).float()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Nothing more comes: the sums go to ``.grad``, in the dtypes of the parameters, where an
        optimizer of torch looks for them."""
        while self._wide:
            parameter, total = self._wide.popitem()
            parameter.grad = total.to(parameter.dtype)

    def clear(self) -> None:
        """Forget all sums."""
        self._wide.clear()
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def _move(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # a split backward pass: its product comes later
            return
        if self._any_order:
            gradient = gradient.double().mul_(_UNITS).round_()
        total = self._wide.get(parameter)
        if total is not None:
            total += gradient  # of half precision: widened as it is read, without a copy
        else:
            self._wide[parameter] = gradient if self._any_order else gradient.float()


def square_sum(gradient: torch.Tensor) -> float:
    """Sum of squares, to some 1e-7 of it: of pieces in float32 (which a CPU does several times
    faster), of their sums in float64. Where float32 cannot hold a piece's sum, all in float64."""
    flat = gradient.reshape(-1)
    whole = flat.numel() // _PIECE * _PIECE
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _PIECE), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    total = float(norms.double().square().sum() + rest.square())
    if math.isfinite(total) and total > _LEAST:
        return total
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64).square())


def _is_narrow(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
