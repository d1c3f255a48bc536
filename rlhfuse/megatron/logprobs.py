"""Log-probabilities of chosen tokens where the vocabulary is cut over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

from rlhfuse.kernels.logprob import token_logprob


def vocab_parallel_logprob(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(logits / temperature)[label], float32, shaped as `labels`.

    With one tensor-parallel rank it is the kernel that all of rlhfuse scores with.

    Args:
        logits: [..., V / tp], this rank's part of the vocabulary (parts in rank order).
        labels: [...], in the whole vocabulary.
        tp_group: None or of size 1 where the vocabulary is whole.
    """
    rows, chosen = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if tp_group is None or tp_group.size() == 1:
        whole = token_logprob(rows, chosen, temperature=temperature).logprob
        return whole.reshape(labels.shape)
    found: torch.Tensor = _VocabParallel.apply(  # type: ignore[no-untyped-call]
        rows, chosen, tp_group, temperature
    )
    return found.reshape(labels.shape)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        labels: torch.Tensor,
        group: dist.ProcessGroup,
        temperature: float,
    ) -> torch.Tensor:
        first = group.rank() * rows.shape[-1]
        here = (labels >= first) & (labels < first + rows.shape[-1])
        index = (labels - first).clamp(0, rows.shape[-1] - 1)
        shifted = rows.float()
        top = shifted.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        # After the maximum and in float32: half-precision logits over a temperature would round.
        shifted = (shifted - top[:, None]).div_(temperature)
        chosen = shifted.gather(-1, index[:, None])[:, 0].masked_fill(~here, 0.0)
        shifted.exp_()
        sums = torch.stack([shifted.sum(-1), chosen])
        dist.all_reduce(sums, group=group)
        total, chosen = sums.unbind()
        shifted.div_(total[:, None])
        ctx.save_for_backward(shifted, here, index)
        ctx.dtype, ctx.temperature = rows.dtype, temperature
        return chosen - total.log()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, here, index = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        by_row = probabilities * -gradient[:, None]
        mine = (gradient * here).to(by_row.dtype)
        by_row.scatter_add_(-1, index[:, None], mine[:, None])
        return by_row.to(ctx.dtype), None, None, None
