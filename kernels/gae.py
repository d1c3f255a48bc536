"""Generalised advantage estimation and discounted returns over packed sequences.

The plain path cuts every sequence into blocks, runs all blocks at once, and then carries from
block to block (by the same recurrence over blocks): 64 log_64(length) steps instead of one per
token. Every step is a rounded multiplication and a rounded addition, so a sequence's result does
not depend on the others.
"""

import torch
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.packed import check_packed, expand, lengths
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
    path = choose(rewards.device)
    if path is Path.REFERENCE:
        return reference.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    dtype = accumulation_dtype(rewards)
    if path is Path.TRITON and dtype == torch.float32:
        from rlhfuse.kernels import triton_gae  # triton is optional

        advantages, returns, _ = triton_gae.scan(
            rewards, values, bootstrap, cu_seqlens, gamma=gamma, decay=gamma * lam
        )
        return Gae(advantages, returns)
    rewards, values = rewards.to(dtype), values.to(dtype)
    deltas = rewards + next_values(values, cu_seqlens, bootstrap) * gamma - values
    advantages = _blocked_reverse_scan(deltas, cu_seqlens, gamma * lam)
    return Gae(advantages, advantages + values)


def gae_padded(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Gae:
    """GAE of padded rows [B, L]: tokens outside `mask` are skipped, wherever they lie.

    The token after a kept one is the next kept one (a tool's output inside a response takes no
    part); results outside the mask are 0.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if rewards.dim() != 2 or rewards.shape != values.shape or rewards.shape != mask.shape:
        raise ValueError(
            f"rewards, values and mask must all be [B, L], not {tuple(rewards.shape)}, "
            f"{tuple(values.shape)} and {tuple(mask.shape)}"
        )
    kept = mask.bool()
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed = gae(rewards[kept], values[kept], cu_seqlens, gamma=gamma, lam=lam)
    dtype = packed.advantages.dtype
    advantages, returns = torch.zeros(2, *rewards.shape, dtype=dtype, device=rewards.device)
    advantages[kept], returns[kept] = packed.advantages, packed.returns
    return Gae(advantages, returns)


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} inside each packed sequence, [T].

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_packed(cu_seqlens, rewards.numel())
    path = choose(rewards.device)
    if path is Path.REFERENCE:
        return reference.discounted_returns(rewards, cu_seqlens, gamma)
    dtype = accumulation_dtype(rewards)
    if path is Path.TRITON and dtype == torch.float32:
        from rlhfuse.kernels import triton_gae  # triton is optional

        returns, _, _ = triton_gae.scan(rewards, None, None, cu_seqlens, gamma=gamma, decay=gamma)
        return returns
    return _blocked_reverse_scan(rewards.to(dtype), cu_seqlens, gamma)


def _blocked_reverse_scan(values: Tensor, cu_seqlens: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay y_{t+1} inside each sequence, [T]."""
    num_tokens = values.numel()
    if num_tokens == 0:
        return torch.zeros_like(values)
    counts = lengths(cu_seqlens)
    blocks = (counts + _BLOCK - 1).div(_BLOCK, rounding_mode="floor")
    cu_blocks = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
    num_blocks = int(cu_blocks[-1])
    cells = None
    if num_blocks * _BLOCK == num_tokens:
        padded = values.view(num_blocks, _BLOCK)
    else:
        shift = cu_blocks[:-1] * _BLOCK - cu_seqlens[:-1]
        cells = expand(shift, cu_seqlens, num_tokens)
        cells += torch.arange(num_tokens, device=values.device)
        padded = values.new_zeros(num_blocks * _BLOCK).scatter_(0, cells, values)
        padded = padded.view(num_blocks, _BLOCK)
    # Columns are blocks: one step of all scans is one pass over contiguous memory.
    grid = padded.t().clone(memory_format=torch.contiguous_format)
    step = torch.empty_like(grid[0])
    for t in range(_BLOCK - 2, -1, -1):
        torch.mul(grid[t + 1], decay, out=step)
        grid[t].add_(step)
    if int(counts.max()) > _BLOCK:
        # What follows a block in its sequence is the same recurrence over block heads.
        heads = _blocked_reverse_scan(grid[0].clone(), cu_blocks, decay**_BLOCK)
        carries = next_values(heads, cu_blocks)
        powers = [decay ** (_BLOCK - t) for t in range(_BLOCK)]
        grid.add_(values.new_tensor(powers)[:, None] * carries)
    scanned = grid.t().contiguous().view(-1)
    return scanned if cells is None else scanned.index_select(0, cells)
