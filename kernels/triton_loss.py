"""linear_loss on a GPU: three matrix products, their sums in float32.

Logits of a chunk of tokens come from the device's own matrix product, in float32; Triton folds
them, and turns them slab by slab into their gradient; two products add that up. With H / 8 * 3
tokens in a chunk the room for logits is 3/8 of a float32 gradient of the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels import triton_kept, triton_logprob
from rlhfuse.kernels.precision import add_product_, product
from rlhfuse.kernels.reference import KeptTokens
from rlhfuse.kernels.rows import Formed

# (rows, log-probabilities, entropies, perhaps log-probabilities among what was kept) -> loss, and
# its derivatives by each.
Slopes = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
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
    kept: KeptTokens | None = None,
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
    replayed = None if kept is None else torch.empty_like(out[0])
    by_kept = out.new_empty(0 if kept is None else kept.ids.numel())
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
        among = (
            None
            if kept is None
            else _Among.of(logits, rows, own_labels, kept, by_kept, temperature, per_row)
        )
        seen = () if among is None else (among.folded[0],)
        loss, by_logprob, by_entropy, by_replayed = slopes(rows, *folded, *seen)
        total += loss
        if among is not None:
            assert replayed is not None
            replayed[rows] = among.folded[0]
            among.slope(by_replayed)
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
            if among is not None:
                triton_kept.add(among.by_kept, among.ids, among.cu, slab, first)
            add_product_(gathered, slab, weight[part])
            if by_weight is not None:
                add_product_(by_weight[part], slab.t(), own)
            if by_bias is not None:
                by_bias[part] += slab.sum(0, dtype=torch.float32)
        by_hidden[rows] = gathered
    return Formed(total, out[0], out[1], by_hidden, by_weight, by_bias, replayed)


@dataclass(frozen=True, slots=True)
class _Among:
    """A chunk's logits among what the sampler kept: `ids` of all, `cu` [R + 1] of these rows, and
    the gradient by each [K], of which these rows' are written."""

    source: triton_kept.Source
    labels: Tensor
    ids: Tensor
    cu: Tensor
    folded: Tensor
    by_kept: Tensor

    @classmethod
    def of(
        cls,
        logits: Tensor,
        rows: slice,
        labels: Tensor,
        kept: KeptTokens,
        by_kept: Tensor,
        temperature: float,
        per_row: Tensor | None,
    ) -> "_Among":
        source = triton_kept.Source(logits, None, None, temperature, per_row)
        cu = kept.cu[rows.start : rows.stop + 1]
        folded = triton_kept.fold(source, labels, kept.ids, cu)
        return cls(source, labels, kept.ids, cu, folded, by_kept)

    def slope(self, by_replayed: Tensor | None) -> None:
        assert by_replayed is not None, "a loss of what was kept has a slope"
        above = (self.folded, by_replayed, None, self.by_kept)
        triton_kept.slopes(self.source, self.labels, self.ids, self.cu, *above)


def _labels_inside(labels: Tensor, part: slice) -> Tensor:
    """Labels counted from the start of a slab; one past its end where they lie in another."""
    here = (labels >= part.start) & (labels < part.stop)
    elsewhere = torch.where(labels < 0, -1, part.stop - part.start)
    return torch.where(here, labels - part.start, elsewhere)
