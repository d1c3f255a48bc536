"""Generalised advantage estimation and discounted returns over packed sequences.

The plain path cuts every sequence into blocks, runs all blocks at once, and then carries from
block to block: about 2 sqrt(length) steps instead of one per token. Every step is a rounded
multiplication and a rounded addition, so a sequence's result does not depend on the others.
"""

import torch
from torch import Tensor

from rlhfuse.kernels.packed import check_packed, lengths
from rlhfuse.kernels.reference import Gae, accumulation_dtype, next_values

_BLOCK = 64


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Gae:
    """Advantages and returns of packed sequences (arXiv 1506.02438, eq. 16).

    Args:
        rewards, values: [T]. cu_seqlens: int [N + 1].
        bootstrap: [N], the value after a sequence's last token; None means 0 (it ended).

    Raises:
        ValueError: shapes that do not fit together.
    """
    if rewards.shape != values.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards and values must both be [T], not {tuple(rewards.shape)} and "
            f"{tuple(values.shape)}"
        )
    check_packed(cu_seqlens, rewards.numel())
    dtype = accumulation_dtype(rewards)
    rewards, values = rewards.to(dtype), values.to(dtype)
    deltas = rewards + next_values(values, cu_seqlens, bootstrap) * gamma - values
    advantages = _blocked_reverse_scan(deltas, cu_seqlens, gamma * lam)
    return Gae(advantages, advantages + values)


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} inside each packed sequence, [T].

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_packed(cu_seqlens, rewards.numel())
    return _blocked_reverse_scan(rewards.to(accumulation_dtype(rewards)), cu_seqlens, gamma)


def _blocked_reverse_scan(values: Tensor, cu_seqlens: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay y_{t+1} inside each sequence, [T]."""
    num_tokens = values.numel()
    if num_tokens == 0:
        return torch.zeros_like(values)
    counts = lengths(cu_seqlens)
    # Block-major order, block index within the sequence first, longest sequences first: the
    # blocks that take their carry at one time, and the blocks that they take it from, are then
    # two contiguous ranges.
    blocks = (counts + _BLOCK - 1).div(_BLOCK, rounding_mode="floor")
    ordered = torch.argsort(blocks, descending=True, stable=True)
    rank = torch.empty_like(ordered)
    rank[ordered] = torch.arange(ordered.numel(), device=values.device)
    depth = int(blocks.max())
    # widths[b]: how many sequences have a block b; firsts[b]: where those blocks start.
    widths = (blocks[None, :] > torch.arange(depth, device=values.device)[:, None]).sum(1)
    firsts = widths.cumsum(0) - widths

    # Cell of token t in the [_BLOCK, num_blocks] grid: its place in its block is the row.
    sequence = torch.repeat_interleave(
        torch.arange(counts.numel(), device=values.device), counts, output_size=num_tokens
    )
    place = torch.arange(num_tokens, device=values.device) - cu_seqlens[:-1].long()[sequence]
    block, row = place.div(_BLOCK, rounding_mode="floor"), place.remainder(_BLOCK)
    num_blocks = int(blocks.sum())
    cell = row * num_blocks + firsts[block] + rank[sequence]

    grid = values.new_zeros(_BLOCK * num_blocks)
    grid[cell] = values
    grid = grid.view(_BLOCK, num_blocks)
    step = grid.new_empty(num_blocks)
    for t in range(_BLOCK - 2, -1, -1):
        torch.mul(grid[t + 1], decay, out=step)
        grid[t] += step
    _carry(grid, widths.tolist(), decay)
    return grid.view(-1)[cell]


def _carry(grid: Tensor, widths: list[int], decay: float) -> None:
    """Add to every block what comes after it in its sequence; `grid` is [_BLOCK, num_blocks]."""
    powers = torch.tensor(
        [decay ** (_BLOCK - t) for t in range(_BLOCK)], dtype=torch.float64, device=grid.device
    ).to(grid.dtype)
    carries = grid.new_zeros(grid.shape[1])  # the value right after each block
    first = grid.shape[1]
    heads, whole = grid[0].clone(), powers[0]
    for earlier, later in zip(reversed(widths[:-1]), reversed(widths[1:]), strict=True):
        first -= later
        into = slice(first - earlier, first - earlier + later)
        after = slice(first, first + later)
        carries[into] = heads[after] + carries[after] * whole
    grid += powers[:, None] * carries[None, :]
