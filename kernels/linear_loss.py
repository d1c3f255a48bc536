"""A loss on token log-probabilities fused with the LM head: three matrix products, not four.

Where a token's loss is known as soon as its log-probability is (PPO with token-level ratios),
the gradient of its logits can be formed in the forward pass, chunk by chunk: logits, gradient by
hidden, gradient by weight. Nothing of size [T, V] exists, and nothing is computed twice. The
method is that of the fused linear cross-entropy losses (Liger-Kernel, arXiv 2410.10989), with
the policy's coefficient in place of cross-entropy's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.head_chunks import (
    add_weight_gradient_,
    chunk_room,
    chunks,
    head_logits,
    weight_room,
)
from rlhfuse.kernels.kept import KeptRows, check_kept, fold_kept, kept_gradient
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.logprob import check_rows, split_temperature
from rlhfuse.kernels.precision import autocast_inputs, without_autocast
from rlhfuse.kernels.reference import (
    IGNORE_INDEX,
    KeptTokens,
    TokenLogprob,
    accumulation_dtype,
)
from rlhfuse.kernels.rows import Formed, Temperatures, fold_rows, row_gradient

# The loss of a range of tokens (a sum, weighted by factors known beforehand) from their
# log-probabilities and entropies, and from their log-probabilities among what the sampler kept (the
# same as the first where nothing is said of that).
TokenLoss = Callable[[slice, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LinearLoss:
    """The scalar loss with its gradient; logprob, entropy and replayed [T] without. `replayed`:
    log-probabilities among what the sampler kept, or `logprob`."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    replayed: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    kept: KeptTokens | None = None,
) -> LinearLoss:
    """`token_loss` of `linear_logprob`, with gradients formed in the forward pass.

    Costs a gradient of the weight (where it is trained) and of the hidden states from here to the
    backward pass. Without gradients to compute, or where RLHFUSE_KERNELS=reference, it is
    `linear_logprob` and the loss.

    Args:
        hidden: [T, H]. weight: [V, H]. labels: [T] or `ignore_index`. temperature: a number, or
            one per token.
        token_loss: called per chunk, under autograd, with the range of tokens and their
            log-probabilities, entropies (zeros unless `entropy`) and replayed log-probabilities.
        kept: what the sampler kept at each position, for the latter; one more sum over few logits.

    Raises:
        ValueError: shapes that do not fit together, or a label that `kept` does not have.
    """
    check_rows(hidden, labels, temperature)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    needed = hidden.requires_grad or weight.requires_grad
    needed = needed or (bias is not None and bias.requires_grad)
    formed = needed and torch.is_grad_enabled()
    marked = torch.where(labels == ignore_index, -1, labels.long())
    if kept is not None:
        check_kept(kept, marked)
    if not formed or choose(hidden.device) is Path.REFERENCE:

        def head(only: KeptTokens | None, entropy: bool) -> TokenLogprob:
            return linear_logprob(
                hidden, weight, labels, bias=bias, temperature=temperature, entropy=entropy,
                ignore_index=ignore_index, kept=only,
            )  # fmt: skip

        out = head(None, entropy)
        replayed = out.logprob if kept is None else head(kept, False).logprob
        spread = torch.zeros_like(out.logprob) if out.entropy is None else out.entropy
        total = out.logprob.new_zeros(())
        for rows in chunks(labels.numel(), weight.shape[0]):
            total = total + token_loss(rows, out.logprob[rows], spread[rows], replayed[rows])
        seen = (out.logprob.detach(), spread.detach() if entropy else None, replayed.detach())
        return LinearLoss(total, *seen)
    ids, cu = (None, None) if kept is None else (kept.ids, kept.cu)
    loss, logprob, spread, replayed = _LinearLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        marked,
        *split_temperature(temperature, hidden),
        entropy,
        token_loss,
        ids,
        cu,
    )
    return LinearLoss(loss, logprob, spread if entropy else None, replayed)


def _loss_slopes(
    token_loss: TokenLoss, rows: slice, *folded: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The loss of a chunk and its derivatives by log-probability, entropy and, where it is given
    too, replayed log-probability."""
    with torch.enable_grad():
        leaves = tuple(part.detach().requires_grad_() for part in folded)
        replayed = leaves[2] if len(leaves) > 2 else leaves[0]
        loss = token_loss(rows, leaves[0], leaves[1], replayed)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), slopes[0], slopes[1], slopes[2] if len(slopes) > 2 else None


def _form(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    given: Temperatures,
    entropy: bool,
    token_loss: TokenLoss,
    with_weight: bool,
    kept: KeptTokens | None,
) -> Formed:
    dtype = accumulation_dtype(hidden)
    wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    out = torch.empty(3, hidden.shape[0], dtype=dtype, device=hidden.device)
    by_hidden = torch.empty_like(hidden, dtype=dtype)
    by_weight = weight_room(wide, hidden.shape[0]) if with_weight else None
    by_bias = None if bias is None else torch.zeros_like(wide[:, 0])
    total = out.new_zeros(())
    room = chunk_room(out, hidden.shape[0], weight.shape[0])
    for rows in chunks(hidden.shape[0], weight.shape[0]):
        own = hidden[rows].to(dtype)
        by_logits = head_logits(own, wide, wide_bias, room[: rows.stop - rows.start])
        loss, *folded = _form_rows(by_logits, labels[rows], rows, given, entropy, token_loss, kept)
        head_logits(by_logits, wide.T, None, by_hidden[rows])
        if by_weight is not None:
            add_weight_gradient_(by_weight, by_logits, own, rows)
        if by_bias is not None:
            by_bias += by_logits.sum(0)
        out[:, rows] = torch.stack(folded)
        total += loss
    replayed = None if kept is None else out[2]
    return Formed(total, out[0], out[1], by_hidden, by_weight, by_bias, replayed)


def _form_rows(
    logits: Tensor,
    labels: Tensor,
    rows: slice,
    given: Temperatures,
    entropy: bool,
    token_loss: TokenLoss,
    kept: KeptTokens | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of a chunk, and its log-probabilities, entropies and replayed log-probabilities;
    the logits [R, V] become their gradient."""
    fold = fold_rows(logits, labels, rows, given, entropy=entropy)
    if kept is None:
        loss, by_logprob, by_entropy, _ = _loss_slopes(token_loss, rows, fold.logprob, fold.entropy)
        above = (by_logprob, by_entropy if entropy else None, rows, given)
        row_gradient(logits, labels, fold, *above, logits)
        return loss, fold.logprob, fold.entropy, fold.logprob
    held = KeptRows.of(kept.ids, kept.cu, rows)
    among = fold_kept(logits, labels, held, rows, given)
    loss, by_logprob, by_entropy, by_replayed = _loss_slopes(
        token_loss, rows, fold.logprob, fold.entropy, among.logprob
    )
    assert by_replayed is not None
    found = kept_gradient(logits, labels, held, among, by_replayed, None, rows, given)
    # Only a CPU is asked: others wait.
    on_cpu = logits.device.type == "cpu"
    if on_cpu and not bool(by_logprob.any()) and not bool(by_entropy.any()):
        logits.zero_()
    else:
        above = (by_logprob, by_entropy if entropy else None, rows, given)
        row_gradient(logits, labels, fold, *above, logits)
    logits[held.owners, held.ids] += found
    return loss, fold.logprob, fold.entropy, among.logprob


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        entropy: bool,
        token_loss: TokenLoss,
        ids: Tensor | None,
        cu: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        narrow, with_weight = accumulation_dtype(hidden) == torch.float32, ctx.needs_input_grad[1]
        kept = None if ids is None or cu is None else KeptTokens(ids, cu)
        with without_autocast(hidden):
            if narrow and choose(hidden.device) is Path.TRITON:
                from rlhfuse.kernels import triton_loss  # triton is optional

                formed = triton_loss.form(
                    hidden, weight, bias, labels, temperature, temperatures, entropy,
                    partial(_loss_slopes, token_loss), with_weight, kept,
                )  # fmt: skip
            else:
                given = Temperatures(temperature, temperatures)
                formed = _form(
                    hidden, weight, bias, labels, given, entropy, token_loss, with_weight, kept
                )
        ctx.gradients = (
            formed.by_hidden.to(hidden.dtype),
            None if formed.by_weight is None else formed.by_weight.to(weight.dtype),
            None if formed.by_bias is None or bias is None else formed.by_bias.to(bias.dtype),
        )
        logprob, spread = formed.logprob.clone(), formed.entropy.clone()
        replayed = logprob if formed.replayed is None else formed.replayed
        replayed = replayed.clone()
        ctx.mark_non_differentiable(logprob, spread, replayed)
        return formed.loss, logprob, spread, replayed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        found = ctx.gradients
        # Only a CPU is asked: others wait. A factor of 1 would cost a pass over the weight.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            found = [None if part is None else part * grad.to(part.dtype) for part in found]
        return (*found, *(None,) * 7)
