"""Rows of logits on any device: the plain-torch core of the log-probability functions.

One exponential per logit and pass: a row's sum of exponentials is taken without looking for its
maximum first, and only rows whose sum leaves a safe range are done again with their maximum taken
off. Exponentials are powers of two (half the price of `exp` in torch on a CPU), of the logit times
a rounded factor; a label's own steps take the same factor, in float64, so that its rounding is no
more than that of the temperature. Every step is per row, so a row's result does not depend on the
other rows. Sums are pairwise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels.dispatch import COMPILED_VOCAB, Path, choose
from rlhfuse.kernels.reference import accumulation_dtype

# Below this a log-probability adds exactly 0 to every sum (float32 and float64 alike), and -inf
# becomes a number: 0 * -inf would be NaN.
FLOOR = -1.0e4

# Sums of exponentials of logits as they are that can be trusted. Below, terms vanish that count;
# above, the rounding of a logit's product with its factor would be felt.
_LOWEST, _HIGHEST = math.exp(-31.0), math.exp(31.0)
_LN_2 = math.log(2.0)
_FAR = -1.0e30  # finite, and beyond every logit

_CACHED_ELEMENTS = 1 << 19  # 2 MB of float32: what is worked on at a time stays in cache

# Where torch cuts an elementwise loop among threads, and (a multiple of) what one step of its
# vectorised loops takes: what is left over is computed otherwise, and may differ in the last bit.
_GRAIN, _STEP = 32_768, 64


@dataclass(frozen=True, slots=True)
class Temperatures:
    """A number, or one per token of the whole batch (then the number is not used)."""

    number: float
    per_token: Tensor | None

    def divide_(self, block: Tensor, rows: slice) -> Tensor:
        """Divide the block of these rows, [R] or [R, V], in place."""
        if self.per_token is not None:
            own = self.per_token[rows].to(block.dtype)
            return block.div_(own if block.dim() == 1 else own[:, None])
        return block if self.number == 1.0 else block.div_(self.number)

    def factors(self, like: Tensor, rows: slice) -> Tensor:
        """What makes a logit a power of two: log2(e) / temperature of these rows, [R]."""
        if self.per_token is None:
            return torch.full_like(like, 1.0 / (_LN_2 * self.number))
        return (1.0 / (_LN_2 * self.per_token[rows].double())).to(like.dtype)


@dataclass(frozen=True, slots=True)
class RowFold:
    """Of each row, [R] each: log-probability of its label, entropy (0 where not asked for), and
    ``total = sum exp((logit - shift) / temperature)``, from which gradients are formed."""

    logprob: Tensor
    entropy: Tensor
    shift: Tensor
    total: Tensor

    def rows(self, block: slice) -> "RowFold":
        """Some of the rows."""
        return RowFold(
            self.logprob[block], self.entropy[block], self.shift[block], self.total[block]
        )


@dataclass(frozen=True, slots=True)
class Formed:
    """A loss formed with its gradients: logprob, entropy and, where some tokens were kept, replayed
    log-probabilities [T], and gradients not narrower than float32 (that by hidden may be in
    hidden's own type; none by a weight that is not trained)."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    by_hidden: Tensor
    by_weight: Tensor | None
    by_bias: Tensor | None
    replayed: Tensor | None = None


class Rooms:
    """Blocks of rows that fit into the cache, and rooms for one of them, made when first needed
    and then kept: fresh memory costs as much as a pass over it."""

    def __init__(self, logits: Tensor) -> None:
        num_rows, vocab = logits.shape
        step = max(1, _CACHED_ELEMENTS // max(vocab, 1))
        self.blocks = [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]
        self.dtype = accumulation_dtype(logits)
        self._vocab, self._device = vocab, logits.device
        self._size = even_size(min(step, num_rows) * vocab) + _STEP * torch.get_num_threads()
        self._made: dict[int, Tensor] = {}

    def take(self, which: int, num_rows: int) -> Tensor:
        """[num_rows, V] of room number `which`, with anything in it."""
        if which not in self._made:
            self._made[which] = torch.empty(self._size, dtype=self.dtype, device=self._device)
        return self._made[which][: num_rows * self._vocab].view(num_rows, self._vocab)

    def widen(self, logits: Tensor) -> Tensor:
        """The logits of a block in the type in which they are added up."""
        return logits if logits.dtype == self.dtype else self.take(2, len(logits)).copy_(logits)

    def powers(self, logits: Tensor, factors: Tensor, shift: Tensor | None) -> Tensor:
        """2 ** ((logit - shift) * factor) of a block, in room 0."""
        out = self.take(0, len(logits))
        if shift is None:
            torch.mul(logits, factors[:, None], out=out)
        else:
            torch.sub(logits, shift[:, None], out=out).mul_(factors[:, None])
        size, even = out.numel(), even_size(out.numel())
        whole = self._made[0]
        if even > size:
            whole[size:even].zero_()
        whole[:even].exp2_()
        return out


def even_size(size: int) -> int:
    """The next size that torch cuts among its threads into whole steps of its loops."""
    parts, threads = 0, torch.get_num_threads()
    least = size
    while parts != (now := max(1, min(threads, -(-least // _GRAIN)))):
        parts = now
        least = -(-size // (_STEP * parts)) * _STEP * parts
    return least


def compiles(logits: Tensor) -> bool:
    """Whether these rows are compiled code's: on a CPU, unless float64 or of a small vocabulary
    (a function of those alone, so that a row's bits do not depend on how many there are)."""
    narrow, wide = logits.dtype != torch.float64, logits.shape[1] >= COMPILED_VOCAB
    return narrow and wide and choose(logits.device) is Path.COMPILED


def fold_rows(
    logits: Tensor, labels: Tensor, rows: slice, temperatures: Temperatures, *, entropy: bool
) -> RowFold:
    """Fold [R, V] logits of any layout and float type, which are left alone.

    Args:
        labels: [R] int64; a negative one marks a row to ignore (logprob and entropy 0).
        rows: where they lie in the batch.
    """
    dtype, num_rows = accumulation_dtype(logits), len(logits)
    numbers = torch.zeros(4, num_rows, dtype=dtype, device=logits.device)
    own, mean, shift, total = numbers.unbind()
    if logits.shape[1] == 0:
        return RowFold(own, mean, shift, total)
    factors = temperatures.factors(total, rows)
    if compiles(logits):
        from rlhfuse.kernels import compiled_rows  # numba takes half a second to import

        compiled_rows.fold(logits, labels, factors, numbers, entropy=entropy)
        return RowFold(own, mean, shift, total)
    rooms, index = Rooms(logits), labels.clamp_min(0)[:, None]
    for block in rooms.blocks:
        part = rooms.widen(logits[block])
        weights = _sums_of_powers(part, factors[block], rooms, shift[block], total[block])
        own[block] = weights.gather(1, index[block]).squeeze(1)
        if entropy:
            centre = _centres(shift[block], total[block], factors[block])
            distance = _distances(part, centre, rooms).mul_(weights)
            mean[block] = _sum_rows(distance)
    log_total, keep = total.double().log(), labels >= 0
    chosen = logits.gather(1, index).squeeze(1).double().sub_(shift).mul_(factors).mul_(_LN_2)
    # A likely label's exponential is rounded as in the sum: never above it, and the only one of
    # its row has log-probability 0.
    chosen = torch.where(own > 0.5 * total, own.double().log(), chosen).sub_(log_total)
    spread = mean
    if entropy:
        centre, slope = _centres(shift, total, factors), factors.double() * _LN_2
        spread = log_total - slope * (centre.double() - shift + mean.double() / total)
        spread = spread.clamp_(min=0.0)
    logprob = torch.where(keep, chosen, 0.0).to(dtype)
    return RowFold(logprob, torch.where(keep, spread, 0.0).to(dtype), shift, total)


def _sums_of_powers(
    logits: Tensor, factors: Tensor, rooms: Rooms, shift: Tensor, total: Tensor
) -> Tensor:
    """The powers [R, V]; writes each row's sum to `total`, and to `shift` (of zeros) the row's
    maximum where the sum is not safe without."""
    safe = torch.zeros_like(total, dtype=torch.bool)
    if logits.device.type == "cpu":  # another device would be waited for
        powers = rooms.powers(logits, factors, None)
        total.copy_(_sum_rows(powers))
        least, greatest = total.aminmax()
        if least > _LOWEST and greatest < _HIGHEST:
            return powers
        safe = (total > _LOWEST) & (total < _HIGHEST)
    shift.copy_(torch.where(safe, 0.0, logits.amax(1)))
    powers = rooms.powers(logits, factors, shift)
    total.copy_(_sum_rows(powers))
    return powers


def _centres(shift: Tensor, total: Tensor, factors: Tensor) -> Tensor:
    """The logit whose probability would be 1 in each row, rounded; [R]."""
    return (shift + total.double().log() / (factors.double() * _LN_2)).to(shift.dtype)


def _distances(logits: Tensor, centre: Tensor, rooms: Rooms) -> Tensor:
    """What logits lack to their row's centre, in room 1, finite: 0 * -inf would be NaN."""
    out = rooms.take(1, len(logits))
    return torch.sub(logits, centre[:, None], out=out).clamp_(min=_FAR)


def _sum_rows(block: Tensor) -> Tensor:
    """Sums of the rows, [R]. torch adds a lone long row up in other parts, by threads."""
    return block.sum(-1) if len(block) > 1 else block.expand(2, -1).sum(-1)[:1]


def row_gradient(
    logits: Tensor,
    labels: Tensor,
    fold: RowFold,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    rows: slice,
    temperatures: Temperatures,
    out: Tensor,
) -> Tensor:
    """Gradient by the logits, written to `out` [R, V], which may be `logits`.

    grad_logprob (onehot - p) - grad_entropy p (log p + entropy), over the temperature; ignored
    rows become 0.

    Args:
        labels, fold, grad_*: of these rows, [R]. rows: where they lie in the batch.
    """
    factors, dtype = temperatures.factors(fold.total, rows), fold.total.dtype
    by_logprob = slopes(labels, grad_logprob, rows, temperatures, dtype)
    by_entropy = None
    if grad_entropy is not None:
        by_entropy = slopes(labels, grad_entropy, rows, temperatures, dtype)
    if compiles(logits):
        from rlhfuse.kernels import compiled_rows  # numba takes half a second to import

        found = (fold.entropy, fold.shift, fold.total)
        compiled_rows.gradient(logits, labels, factors, *found, by_logprob, by_entropy, out)
        return out
    rooms, keep, index = Rooms(logits), labels >= 0, labels.clamp_min(0)[:, None]
    level, bend, centre = -by_logprob / fold.total, None, fold.shift
    if by_entropy is not None:
        by_entropy = by_entropy.double()
        centre, slope = _centres(fold.shift, fold.total, factors), factors.double() * _LN_2
        rest = slope * (centre.double() - fold.shift) - fold.total.double().log() + fold.entropy
        level = ((-by_logprob - by_entropy * rest) / fold.total).to(dtype)
        bend = (-by_entropy * slope / fold.total).to(dtype)
    # Only a CPU is asked: others wait.
    on_cpu = logits.device.type == "cpu"
    shift = None if on_cpu and not bool(fold.shift.any()) else fold.shift
    own = torch.empty_like(by_logprob)
    for block in rooms.blocks:
        part, heights = rooms.widen(logits[block]), level[block, None]
        if bend is not None:
            heights = _distances(part, centre[block], rooms).mul_(bend[block, None]).add_(heights)
        powers = rooms.powers(part, factors[block], None if shift is None else shift[block])
        picked = powers.gather(1, index[block])
        picked *= heights if bend is None else heights.gather(1, index[block])
        own[block] = picked.squeeze(1)
        torch.mul(powers, heights, out=out[block])
    # A label's own is rounded once, and takes the place of what the others get.
    own = torch.where(keep, own + by_logprob, 0.0)
    out.scatter_(1, index, own[:, None].to(out.dtype))
    # A row to ignore may hold NaN, which 0 * does not clear.
    return out if on_cpu and bool(keep.all()) else out.masked_fill_(~keep[:, None], 0.0)


def slopes(
    labels: Tensor, grad: Tensor, rows: slice, temperatures: Temperatures, dtype: torch.dtype
) -> Tensor:
    """What comes from above, over the temperature, and 0 for rows to ignore; [R]."""
    return temperatures.divide_(torch.where(labels >= 0, grad, 0.0).to(dtype, copy=True), rows)
