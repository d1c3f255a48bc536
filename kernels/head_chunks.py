"""An LM head on chunks of tokens: logits and the weight's gradient in rooms that are used again.

A token's logits do not depend on the other tokens: chunks have fixed sizes, and no matrix product
has fewer than `MIN_ROWS` rows.
"""

import torch
from torch import Tensor

from rlhfuse.kernels.fresh import fresh

# Matrix products with fewer rows take other code paths on a CPU and differ in the last bits, so
# a token's result would depend on how many others are computed with it.
MIN_ROWS = 16
_MAX_ROWS = 1024
_CHUNK_BYTES = 32 << 20


def chunk_rows(vocab: int) -> int:
    """Rows of a chunk: a function of the vocabulary alone."""
    rows = _CHUNK_BYTES // (4 * max(vocab, 1))
    return min(_MAX_ROWS, max(MIN_ROWS, rows - rows % MIN_ROWS))


def chunks(num_rows: int, vocab: int) -> list[slice]:
    """The ranges of rows that are computed together."""
    step = chunk_rows(vocab)
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``hidden @ weight.T + bias`` for one chunk, in `out` [R, V], with at least `MIN_ROWS` rows
    inside."""
    num_rows = hidden.shape[0]
    hidden = hidden.contiguous()  # the strides choose the code path, too
    if num_rows < MIN_ROWS:
        padded = hidden.new_zeros(MIN_ROWS, hidden.shape[1])
        padded[:num_rows] = hidden
        out.copy_((padded @ weight.T)[:num_rows])
    else:
        torch.mm(hidden, weight.T, out=out)
    return out if bias is None else out.add_(bias)


def weight_room(weight: Tensor, num_rows: int) -> Tensor:
    """Where `add_weight_gradient_` adds up: anything, or 0 where there is nothing to add."""
    room = fresh(*weight.shape, like=weight)
    return room if num_rows else room.zero_()


def add_weight_gradient_(into: Tensor, by_logits: Tensor, hidden: Tensor, rows: slice) -> None:
    """into += by_logits.T @ hidden; what the first chunk finds there is not even read."""
    if rows.start:
        into.addmm_(by_logits.T, hidden)
    else:
        torch.mm(by_logits.T, hidden, out=into)


def chunk_room(like: Tensor, num_rows: int, vocab: int) -> Tensor:
    """Room for the logits of one chunk, to be used again for the next."""
    return fresh(min(num_rows, chunk_rows(vocab)), vocab, like=like)
