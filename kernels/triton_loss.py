"""linear_loss on a GPU: three matrix products, their sums in float32.

Logits of a chunk of tokens come from the device's own matrix product, in float32; Triton folds
them, and turns them slab by slab into their gradient; two products add that up. With H / 8 * 3
tokens in a chunk the room for logits is 3/8 of a float32 gradient of the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhfuse.kernels import triton_logprob
from rlhfuse.kernels.precision import add_product_, product
from rlhfuse.kernels.rows import Formed

# (rows, log-probabilities, entropies) -> loss, and its derivatives by both.
Slopes = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]
_SLABS = 8


def form(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    slopes: Slopes,
    with_weight: bool,
) -> Formed:
    """The loss of all tokens with its gradients; labels of -1 are ignored."""
    (num_tokens, size), vocab = hidden.shape, weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    step = max(128, 3 * size // 8 // 128 * 128)
    width = -(-vocab // (_SLABS * 128)) * 128
    out = torch.empty(2, num_tokens, dtype=torch.float32, device=hidden.device)
    by_hidden = torch.empty_like(hidden)
    by_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
    by_bias = None if bias is None else out.new_zeros(vocab)
    total = out.new_zeros(())
    height = min(step, num_tokens)
    logit_room, slab_room = out.new_empty(height * vocab), hidden.new_empty(height * width)
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        own, count = hidden[rows], rows.stop - start
        logits = product(own, weight.t(), logit_room[: count * vocab].view(count, vocab))
        if bias is not None:
            logits += bias
        own_labels, saved = labels[rows], out.new_empty(2, count)
        per_row = None if temperatures is None else temperatures[rows]
        folded = out[0, rows], out[1, rows]
        triton_logprob.forward(logits, own_labels, temperature, per_row, entropy, *folded, saved)
        loss, by_logprob, by_entropy, _ = slopes(rows, *folded)
        total += loss
        gathered = torch.zeros_like(own, dtype=torch.float32)
        for first in range(0, vocab, width):
            part = slice(first, min(first + width, vocab))
            slab = slab_room[: count * (part.stop - first)].view(count, -1)
            triton_logprob.backward(
                logits[:, part],
                _labels_inside(own_labels, part),
                temperature,
                per_row,
                folded[1],
                saved,
                by_logprob,
                by_entropy if entropy else None,
                slab,
            )
            add_product_(gathered, slab, weight[part])
            if by_weight is not None:
                add_product_(by_weight[part], slab.t(), own)
            if by_bias is not None:
                by_bias[part] += slab.sum(0, dtype=torch.float32)
        by_hidden[rows] = gathered
    return Formed(total, out[0], out[1], by_hidden, by_weight, by_bias)


def _labels_inside(labels: Tensor, part: slice) -> Tensor:
    """Labels counted from the start of a slab; one past its end where they lie in another."""
    here = (labels >= part.start) & (labels < part.stop)
    elsewhere = torch.where(labels < 0, -1, part.stop - part.start)
    return torch.where(here, labels - part.start, elsewhere)
