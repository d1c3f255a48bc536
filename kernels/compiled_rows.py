"""Rows of float32 logits on a CPU, compiled (numba): log-probability, entropy, gradient.

Two sweeps over a row forward (its maximum; then exponentials, their sum and first moment), one
backward, each of what the cache holds; nothing of a row's size is written forward. Exponentials
are powers of two: the polynomial below has a relative error of 2e-9 before rounding. Sums run
over blocks of a row in float32 and over its blocks in float64. A row is one thread's from
beginning to end, and all run the same code, so its bits depend neither on the other rows nor on
the number of threads.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhfuse.kernels import team
from rlhfuse.kernels.jit import array, compiled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_BLOCK = 2048  # logits of a block: 8 KB
_PIECE = 1 << 16  # elements that a thread takes at a time, some 30 microseconds
_ROOM = 1 << 21  # elements that are widened, or laid end to end, at a time

_LN_2 = math.log(2.0)
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)
_LOWEST = np.float32(-127.0)  # 2 ** _LOWEST and below are 0 here
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: what is added to it loses its fraction
_TO_EXPONENT = np.int32(127 - 0x4B400000)  # from the bits of that sum to a float's exponent
_MANTISSA_BITS, _SIGN_SHIFT = np.int32(23), np.int32(31)
_ALL_BUT_SIGN, _LEAST = np.int32(0x7FFFFFFF), np.int32(-0x80000000)

# 2**x - 1 on [-1/2, 1/2]: least squares of the relative error at Chebyshev nodes, degrees 1 to 6.
_C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(c)
    for c in (
        0.6931472055771,
        0.24022648462281254,
        0.05550329035153745,
        0.0096183732513512,
        0.0013399848290651904,
        0.00015370704816756835,
    )
)


@compiled("reassoc", "nsz")
def _plus(total: np.float32, more: np.float32) -> np.float32:
    """A sum whose order the compiler may choose: it adds up in vectors."""
    return total + more


@compiled("contract")
def _power(exponent: np.float32) -> np.float32:
    """2 ** exponent for exponents up to 127: 0 for `_LOWEST` (and NaN for NaN)."""
    rounded = exponent + _ROUNDER
    bits = np.float32(rounded).view(np.int32)
    rest = exponent - (rounded - _ROUNDER)
    tail = _C3 + rest * (_C4 + rest * (_C5 + rest * _C6))
    power = _ONE + rest * (_C1 + rest * (_C2 + rest * tail))
    scale = np.int32(np.int32(bits + _TO_EXPONENT) << _MANTISSA_BITS).view(np.float32)
    return np.float32(power * scale)


@compiled("contract")
def _exponent(logit: np.float32, top: np.float32, factor: np.float32) -> np.float32:
    exponent = (logit - top) * factor
    return _LOWEST if exponent < _LOWEST else exponent


@compiled()
def _greatest(row: Floats) -> np.float32:
    """The largest number, as integers: comparisons of those may go in any order."""
    keys = row.view(np.int32)
    top = _LEAST
    for index in range(keys.shape[0]):
        key = keys[index]
        top = max(top, np.int32(key ^ ((key >> _SIGN_SHIFT) & _ALL_BUT_SIGN)))
    return np.float32(np.int32(top ^ ((top >> _SIGN_SHIFT) & _ALL_BUT_SIGN)).view(np.float32))


@compiled("contract")
def _powers(block: Floats, top: np.float32, factor: np.float32, powers: Floats) -> None:
    for index in range(block.shape[0]):
        powers[index] = _power(_exponent(block[index], top, factor))


@compiled()
def _sum(powers: Floats) -> np.float32:
    total = _ZERO
    for index in range(powers.shape[0]):
        total = _plus(total, powers[index])
    return total


@compiled("contract")
def _moment(block: Floats, top: np.float32, factor: np.float32, powers: Floats) -> np.float32:
    total = _ZERO
    for index in range(powers.shape[0]):
        total = _plus(total, powers[index] * _exponent(block[index], top, factor))
    return total


@compiled("contract")
def _fold_rows(
    logits: Floats, labels: Ints, factors: Floats, entropy: bool, found: Floats,
    begin: int, first: int, last: int,
) -> None:  # fmt: skip
    """Rows first to last of the block of logits that begins at row `begin` of all others."""
    room = np.empty(_BLOCK, np.float32)
    for number in range(first, last):
        row, at = logits[number], begin + number
        label, factor = labels[at], factors[at]
        found[:, at] = 0.0
        if label < 0:
            continue
        top, total, moment = _greatest(row), 0.0, 0.0
        for start in range(0, row.shape[0], _BLOCK):
            block = row[start : start + _BLOCK]
            powers = room[: block.shape[0]]
            _powers(block, top, factor, powers)
            total += np.float64(_sum(powers))
            if entropy:
                moment += np.float64(_moment(block, top, factor, powers))
        # In float64, also the label's own: one rounding in all.
        log_total = np.log(total)
        own = (np.float64(row[label]) - np.float64(top)) * np.float64(factor)
        found[0, at] = own * _LN_2 - log_total
        if entropy:
            found[1, at] = log_total - _LN_2 * moment / total
        found[2, at], found[3, at] = top, total


def _fold_job(job: Any) -> None:
    """Rows, step, vocabulary, first row, all rows, with entropies; then where the arrays are."""
    held = team.carray(job, 12)
    num_rows, step, vocab, begin, total = held[1], held[2], held[3], held[4], held[5]
    logits = team.carray(team.floats_at(held[7]), (num_rows, vocab))
    labels = team.carray(team.integers_at(held[8]), total)
    factors = team.carray(team.floats_at(held[9]), total)
    found = team.carray(team.floats_at(held[10]), (4, total))
    first = team.take(job) * step
    while first < num_rows:
        last = min(first + step, num_rows)
        _fold_rows(logits, labels, factors, held[6] != 0, found, begin, first, last)
        first = team.take(job) * step


@compiled("contract")
def _scale_block(
    block: Floats, top: np.float32, factor: np.float32, level: np.float32, room: Floats
) -> None:
    for index in range(block.shape[0]):
        room[index] = level * _power(_exponent(block[index], top, factor))


@compiled("contract")
def _bend_block(
    block: Floats, top: np.float32, factor: np.float32, level: np.float32, bend: np.float32,
    room: Floats,
) -> None:  # fmt: skip
    for index in range(block.shape[0]):
        exponent = _exponent(block[index], top, factor)
        room[index] = _power(exponent) * (level + bend * exponent)


@compiled("contract")
def _gradient_rows(
    logits: Floats, labels: Ints, numbers: Floats, bent: bool, out: Floats,
    begin: int, first: int, last: int,
) -> None:  # fmt: skip
    """As `_fold_rows`; numbers, of all rows: factor, entropy, shift, total, slope by the
    log-probability, slope by the entropy."""
    room = np.empty(_BLOCK, np.float32)  # `out` may be `logits`
    for number in range(first, last):
        row, into, at = logits[number], out[number], begin + number
        label, factor, top = labels[at], numbers[0, at], numbers[2, at]
        if label < 0:
            into[:] = 0.0
            continue
        total, by_logprob = np.float64(numbers[3, at]), np.float64(numbers[4, at])
        by_entropy = np.float64(numbers[5, at]) / total
        level = by_entropy * (np.log(total) - np.float64(numbers[1, at])) - by_logprob / total
        bend = -by_entropy * _LN_2
        exponent = _exponent(row[label], top, factor)
        own = by_logprob + np.float64(_power(exponent)) * (level + bend * np.float64(exponent))
        for start in range(0, row.shape[0], _BLOCK):
            block = row[start : start + _BLOCK]
            if bent:
                _bend_block(block, top, factor, np.float32(level), np.float32(bend), room)
            else:
                _scale_block(block, top, factor, np.float32(level), room)
            into[start : start + _BLOCK] = room[: block.shape[0]]
        into[label] = own


def _gradient_job(job: Any) -> None:
    """Rows, step, vocabulary, first row, all rows, bent; then where the arrays are."""
    held = team.carray(job, 12)
    num_rows, step, vocab, begin, total = held[1], held[2], held[3], held[4], held[5]
    logits = team.carray(team.floats_at(held[7]), (num_rows, vocab))
    labels = team.carray(team.integers_at(held[8]), total)
    numbers = team.carray(team.floats_at(held[9]), (6, total))
    out = team.carray(team.floats_at(held[10]), (num_rows, vocab))
    first = team.take(job) * step
    while first < num_rows:
        last = min(first + step, num_rows)
        _gradient_rows(logits, labels, numbers, held[6] != 0, out, begin, first, last)
        first = team.take(job) * step


@functools.cache
def _entries() -> tuple[Any, Any]:
    """Compiled, or loaded from the cache on disk."""
    return team.entry(_fold_job), team.entry(_gradient_job)


def fold(
    logits: Tensor, labels: Tensor, factors: Tensor, numbers: Tensor, *, entropy: bool
) -> None:
    """Write to `numbers` [4, R] what `rows.RowFold` holds of logits [R, V], float32 or narrower.

    Args:
        labels: int64 [R]; a negative one marks a row to ignore. factors: float32 [R], what makes a
            logit a power of two.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    _check_labels(labels, logits.shape[1])
    own, scales, found = array(labels.long()), array(factors.float()), array(numbers)
    for begin, block in _blocks(logits):
        _share(_entries()[0], begin, block, entropy, (own, scales, found))


def gradient(
    logits: Tensor, labels: Tensor, factors: Tensor, entropy: Tensor, shift: Tensor,
    total: Tensor, by_logprob: Tensor, by_entropy: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Write the gradient by the logits to `out` [R, V], which may be `logits`.

    Args:
        entropy, shift, total: from `fold`. by_logprob, by_entropy: float32 [R], what comes from
            above, over the temperature.
    """
    bends = by_logprob if by_entropy is None else by_entropy
    bent, own = by_entropy is not None, array(labels.long())
    numbers = torch.stack([factors, entropy, shift, total, by_logprob, bends])
    if by_entropy is None:
        numbers[5] = 0.0
    given = array(numbers)
    straight = out.dtype == torch.float32 and out.is_contiguous()
    for begin, block in _blocks(logits):
        rows = out[begin : begin + len(block)]
        room = array(rows) if straight else np.empty_like(block)
        _share(_entries()[1], begin, block, bent, (own, given, room))
        if not straight:
            rows.copy_(torch.from_numpy(room))


def warm_up() -> None:
    """Compile all of this, or load it from the cache on disk."""
    numbers, ones = torch.zeros(4, 2), torch.ones(2)
    labels, logits = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
    fold(logits, labels, ones, numbers, entropy=True)
    gradient(logits, labels, ones, numbers[1], numbers[2], numbers[3], ones, ones, logits)


def _check_labels(labels: Tensor, vocab: int) -> None:
    greatest = int(labels.max()) if labels.numel() else -1
    if greatest >= vocab:
        raise ValueError(f"label {greatest} is outside the vocabulary of {vocab} tokens")


def _blocks(logits: Tensor) -> Iterator[tuple[int, Floats]]:
    """First row and rows, in float32 end to end: all, or where that takes a copy some at a time."""
    num_rows, vocab = logits.shape
    straight = logits.dtype == torch.float32 and logits.is_contiguous()
    step = max(1, num_rows if straight else _ROOM // vocab)
    for begin in range(0, num_rows, step):
        yield begin, array(logits[begin : begin + step].float())


def _share(
    entry: Any, begin: int, block: Floats, more: bool, arrays: tuple[npt.NDArray[Any], ...]
) -> None:
    """Run all rows of a block, the first of which is row `begin` of the labels."""
    num_rows, vocab = block.shape
    places = (part.ctypes.data for part in (block, *arrays))
    numbers = (vocab, begin, arrays[0].shape[0], int(more), *places)
    team.run(entry, num_rows, num_rows * vocab // _PIECE, numbers)
