"""linear_logprob where every rank of a group holds a part of the vocabulary.

Each rank folds its own part; what crosses ranks forward is, per token, the largest logit (one
all-reduce), and the sum of exponentials, the label's logit and the first moment (another); and
backward the hidden states' gradient, [T, H]. Parts lie in rank order and may differ in size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhfuse.kernels.head_chunks import (
    add_weight_gradient_,
    chunk_room,
    chunks,
    head_logits,
    weight_room,
)
from rlhfuse.kernels.precision import without_autocast
from rlhfuse.kernels.reference import accumulation_dtype
from rlhfuse.kernels.rows import FLOOR, Temperatures, slopes

_EVERYTHING = slice(None)


class VocabParallelLogprob(torch.autograd.Function):
    """(hidden, weight part, bias part, labels, temperature, temperatures, group) -> logprob [T]
    and entropy [T], the same on every rank.

    The gradient by hidden is the whole one (summed over the ranks); those by weight and bias
    are of this rank's part. Labels are in the whole vocabulary; a negative one is ignored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        dtype, given = accumulation_dtype(hidden), Temperatures(temperature, temperatures)
        own = own_labels(labels, weight.shape[0], group)
        wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # Largest logit, sum of exponentials, label's logit, first moment.
        parts = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
        room = chunk_room(parts, hidden.shape[0], weight.shape[0])
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            logits = head_logits(
                hidden[rows].to(dtype), wide, wide_bias, room[: rows.stop - rows.start]
            )
            parts[:, rows] = _fold_part_(logits, own[rows], rows, given)
        top = parts[0].clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        moved = given.divide_(parts[0] - top, _EVERYTHING).clamp_(min=FLOOR)
        factor = moved.exp()
        chosen = given.divide_(torch.where(own >= 0, parts[2] - top, 0.0), _EVERYTHING)
        sums = torch.stack([parts[1] * factor, chosen, factor * (parts[3] + parts[1] * moved)])
        dist.all_reduce(sums, group=group)
        total, chosen, moment = sums.unbind()
        keep = labels >= 0
        logprob = torch.where(keep, chosen - total.log(), 0.0)
        entropy = torch.where(keep, total.log() - moment / total, 0.0)
        ctx.temperature, ctx.group = temperature, group
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, top, total, entropy)
        return logprob, entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels, temperatures, top, total, entropy = ctx.saved_tensors
        dtype, given = total.dtype, Temperatures(ctx.temperature, temperatures)
        own = own_labels(labels, weight.shape[0], ctx.group)
        wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        by_hidden = torch.empty_like(hidden, dtype=dtype)
        by_weight = weight_room(wide, hidden.shape[0])
        by_bias = None if bias is None else torch.zeros_like(wide[:, 0])
        room, log_total = chunk_room(by_hidden, hidden.shape[0], weight.shape[0]), total.log()
        with without_autocast(hidden):
            for rows in chunks(hidden.shape[0], weight.shape[0]):
                logits = head_logits(
                    hidden[rows].to(dtype), wide, wide_bias, room[: rows.stop - rows.start]
                )
                log_probs = given.divide_(logits.sub_(top[rows, None]), rows)
                log_probs.sub_(log_total[rows, None]).clamp_(min=FLOOR)
                by_logprob = slopes(labels[rows], grad_logprob[rows], rows, given, dtype)
                by_entropy = slopes(labels[rows], grad_entropy[rows], rows, given, dtype)
                weights = log_probs.exp()
                level = by_logprob + by_entropy * entropy[rows]
                by_logits = log_probs.mul_(-by_entropy[:, None]).sub_(level[:, None]).mul_(weights)
                by_logits.masked_fill_((labels[rows] < 0)[:, None], 0.0)
                mine = own[rows] >= 0
                by_logits.scatter_add_(
                    1, own[rows].clamp_min(0)[:, None], torch.where(mine, by_logprob, 0.0)[:, None]
                )
                head_logits(by_logits, wide.T, None, by_hidden[rows])
                add_weight_gradient_(by_weight, by_logits, hidden[rows].to(dtype), rows)
                if by_bias is not None:
                    by_bias += by_logits.sum(0)
        dist.all_reduce(by_hidden, group=ctx.group)
        return (
            by_hidden.to(hidden.dtype),
            by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
            *(None,) * 4,
        )


def own_labels(labels: Tensor, part: int, group: dist.ProcessGroup) -> Tensor:
    """Labels [T] counted from the start of this rank's part, -1 where another rank owns them."""
    sizes = labels.new_zeros(group.size())
    sizes[group.rank()] = part
    dist.all_reduce(sizes, group=group)
    first = int(sizes[: group.rank()].sum())
    here = (labels >= first) & (labels < first + part)
    return torch.where(here, labels - first, -1)


def _fold_part_(logits: Tensor, own: Tensor, rows: slice, temperatures: Temperatures) -> Tensor:
    """[4, R]: largest logit, sum of shifted exponentials, label's logit (0: not here), moment."""
    top = logits.amax(1)
    chosen = logits.gather(1, own.clamp_min(0)[:, None]).squeeze(1)
    # A part that is -inf as a whole must add 0, not NaN.
    anchor = torch.where(torch.isneginf(top), 0.0, top)
    shifted = temperatures.divide_(logits.sub_(anchor[:, None]), rows).clamp_(min=FLOOR)
    weights = shifted.exp()
    total = weights.sum(-1)
    moment = weights.mul_(shifted).sum(-1)
    return torch.stack([top, total, torch.where(own >= 0, chosen, 0.0), moment])
