"""GAE, discounted returns and moments on a CPU, compiled (numba): one pass over the tokens each.

All is added up in float64, a sequence by itself, so that its bits do not depend on the others.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhfuse.kernels.jit import array, compiled

Numbers = npt.NDArray[Any]  # float32 or float64
_CANCELLED = 2.0**-20
_FLAT = torch.contiguous_format
Bounds = npt.NDArray[np.int64]


@compiled("contract")
def _scan(
    rewards: Numbers, values: Numbers, bootstrap: Numbers, bounds: Bounds, gamma: float,
    decay: float, advantages: Numbers, returns: Numbers,
) -> None:  # fmt: skip
    for number in range(bounds.shape[0] - 1):
        advantage, after = 0.0, np.float64(bootstrap[number])
        for token in range(bounds[number + 1] - 1, bounds[number] - 1, -1):
            value = np.float64(values[token])
            delta = np.float64(rewards[token]) + gamma * after - value
            advantage = delta + decay * advantage
            advantages[token], returns[token] = advantage, advantage + value
            after = value


@compiled("contract")
def _discount(rewards: Numbers, bounds: Bounds, gamma: float, returns: Numbers) -> None:
    for number in range(bounds.shape[0] - 1):
        total = 0.0
        for token in range(bounds[number + 1] - 1, bounds[number] - 1, -1):
            total = np.float64(rewards[token]) + gamma * total
            returns[token] = total


@compiled("contract", "reassoc", "nsz")
def _power_sums(values: Numbers, bounds: Bounds, shift: float, sums: Numbers) -> None:
    for number in range(bounds.shape[0] - 1):
        total = squares = 0.0
        own = values[bounds[number] : bounds[number + 1]]
        for index in range(own.shape[0]):
            value = np.float64(own[index]) - shift
            total += value
            squares += value * value
        sums[0, number], sums[1, number] = total, squares


@compiled()
def _ordered_sum(terms: Numbers) -> float:
    """The same bits for every order of the terms, which are sorted in place."""
    terms.sort()
    total = 0.0
    for index in range(terms.shape[0]):
        total += terms[index]
    return total


@compiled()
def _moments(values: Numbers, bounds: Bounds) -> tuple[float, float]:
    sums = np.empty((2, bounds.shape[0] - 1))
    _power_sums(values, bounds, 0.0, sums)
    total, squares = _ordered_sum(sums[0]), _ordered_sum(sums[1])
    mean = total / values.shape[0]
    deviation = squares - total * mean
    if not deviation > squares * _CANCELLED:
        _power_sums(values, bounds, mean, sums)
        deviation = _ordered_sum(sums[1])
    return mean, deviation


@compiled()
def _scale(values: Numbers, mean: float, scale: float, added: float, white: Numbers) -> None:
    for index in range(values.shape[0]):
        white[index] = (np.float64(values[index]) - mean) * scale + added


@compiled()
def _whiten(values: Numbers, bounds: Bounds, eps: float, shift_mean: bool, white: Numbers) -> bool:
    """False, and nothing done, where the bounds are not those of the values."""
    count = values.shape[0]
    fits = bounds[0] == 0 and bounds[-1] == count
    for number in range(bounds.shape[0] - 1):
        fits = fits and bounds[number] <= bounds[number + 1]
    if fits:
        mean, deviation = _moments(values, bounds)
        scale = 1.0 / np.sqrt(deviation / max(count - 1, 1) + eps)
        _scale(values, mean, scale, 0.0 if shift_mean else mean, white)
    return bool(fits)


def gae(
    rewards: Tensor, values: Tensor, bootstrap: Tensor | None, cu_seqlens: Tensor, *,
    gamma: float, decay: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns [T] of packed sequences, all of one type (float32 or float64)."""
    advantages, returns = (torch.empty_like(values, memory_format=_FLAT) for _ in range(2))
    final = values.new_zeros(cu_seqlens.numel() - 1) if bootstrap is None else bootstrap
    given = (array(rewards), array(values), array(final.to(values.dtype)))
    _scan(*given, array(cu_seqlens.long()), gamma, decay, array(advantages), array(returns))
    return advantages, returns


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """Discounted returns [T] of packed sequences."""
    returns = torch.empty_like(rewards, memory_format=_FLAT)
    _discount(array(rewards), array(cu_seqlens.long()), gamma, array(returns))
    return returns


def moments(values: Tensor, cu_seqlens: Tensor) -> tuple[float, float]:
    """Mean and sum of squared deviations of packed sequences; not of none.

    Sums of values and squares inside each sequence, added up in the order of their size. Where
    subtracting the mean's square would cancel more than 20 of float64's 53 bits, a second pass
    sums the squares about the mean.
    """
    return _moments(array(values), array(cu_seqlens.long()))


def whiten(values: Tensor, mean: float, scale: float, added: float) -> Tensor:
    """(values - mean) * scale + added, rounded once."""
    white = torch.empty_like(values, memory_format=_FLAT)
    _scale(array(values).reshape(-1), mean, scale, added, array(white).reshape(-1))
    return white


def whiten_batch(
    values: Tensor, cu_seqlens: Tensor, *, shift_mean: bool, eps: float
) -> Tensor | None:
    """Whitened by their own moments; None where `cu_seqlens` is not theirs."""
    white = torch.empty_like(values, memory_format=_FLAT)
    bounds = array(cu_seqlens.long())
    return white if _whiten(array(values), bounds, eps, shift_mean, white.numpy()) else None


def warm_up() -> None:
    """Compile all of this, or load it from the cache on disk."""
    ones, bounds = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)
    gae(ones, ones, None, bounds, gamma=1.0, decay=1.0)
    discounted_returns(ones, bounds, 1.0)
    moments(ones, bounds)
    whiten(ones, 0.0, 1.0, 0.0)
    whiten_batch(ones, bounds, shift_mean=True, eps=0.0)
