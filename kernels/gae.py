"""Generalised advantage estimation and discounted returns over packed sequences.

Triton on a GPU, compiled by numba on a CPU. The plain path, for what has neither, cuts every
sequence into blocks, runs all blocks at once, and then carries from block to block (by the same
recurrence over blocks): 64 log_64(length) steps instead of one per token. On each of them a
sequence's result does not depend on the others.
"""

import torch
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.packed import check_packed, expand, lengths
from rlhfuse.kernels.reference import (
    Gae,
    Shaping,
    accumulation_dtype,
    next_values,
    shaped_rewards,
)
from rlhfuse.kernels.whiten import whiten_batch

_BLOCK = 64


def gae(
    rewards: Tensor | Shaping,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Gae:
    """Advantages and returns of packed sequences (arXiv 1506.02438, eq. 16).

    Args:
        rewards: [T], or what they are made of. values: [T]. cu_seqlens: int [N + 1].
        bootstrap: [N], the value after a sequence's last token; None means 0 (it ended).

    Raises:
        ValueError: shapes that do not fit together.
    """
    return _estimate(rewards, values, cu_seqlens, bootstrap, gamma, lam, whitened=False)


def whitened_gae(
    rewards: Tensor | Shaping,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Gae:
    """`gae` with advantages whitened over the whole batch; returns come from unwhitened ones.

    Triton: two launches, the first of which also leaves the statistics, and no wait for the
    device. Elsewhere: `gae` and `whiten_batch`.
    """
    return _estimate(rewards, values, cu_seqlens, bootstrap, gamma, lam, whitened=True)


def _estimate(
    rewards: Tensor | Shaping,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    *,
    whitened: bool,
) -> Gae:
    _check_inputs(rewards, values, cu_seqlens, bootstrap)
    # An operator's own price, a tenth of a millisecond, is more than that of a small batch.
    run = gae_op if torch.compiler.is_compiling() else _gae
    if isinstance(rewards, Shaping):
        shaping = rewards
        given = (shaping.logprobs, shaping.ref_logprobs, shaping.scores)
        made_of = (*given, shaping.coefficient, shaping.estimator)
        return Gae(*run(*made_of, values, cu_seqlens, bootstrap, gamma, lam, whitened))
    plain = (rewards, None, None, 0.0, "k1")
    advantages, returns, _ = run(*plain, values, cu_seqlens, bootstrap, gamma, lam, whitened)
    return Gae(advantages, returns, rewards)


def _check_inputs(
    rewards: Tensor | Shaping, values: Tensor, cu_seqlens: Tensor, bootstrap: Tensor | None
) -> None:
    num_sequences = cu_seqlens.numel() - 1
    given = rewards.logprobs if isinstance(rewards, Shaping) else rewards
    if given.shape != values.shape or values.dim() != 1:
        raise ValueError(
            f"rewards and values must both be [T], not {tuple(given.shape)} and "
            f"{tuple(values.shape)}"
        )
    if isinstance(rewards, Shaping) and (
        rewards.ref_logprobs.shape != values.shape or rewards.scores.shape != (num_sequences,)
    ):
        raise ValueError(
            f"ref_logprobs must be {tuple(values.shape)} and scores ({num_sequences},), not "
            f"{tuple(rewards.ref_logprobs.shape)} and {tuple(rewards.scores.shape)}"
        )
    if bootstrap is not None and bootstrap.shape != (num_sequences,):
        raise ValueError(
            f"bootstrap must be one per sequence ({num_sequences},), not {tuple(bootstrap.shape)}"
        )


def _by_triton(values: Tensor) -> bool:
    return accumulation_dtype(values) == torch.float32 and choose(values.device) is Path.TRITON


@torch.no_grad()
def _gae(
    rewards: Tensor,
    ref_logprobs: Tensor | None,
    scores: Tensor | None,
    coefficient: float,
    estimator: str,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns and (where they are made here, else nothing) rewards [T]. With scores,
    `rewards` are the log-probabilities that make them up (`Shaping`)."""
    check_packed(cu_seqlens, rewards.numel())
    shaping = None
    if scores is not None and ref_logprobs is not None:
        shaping = Shaping(scores, rewards, ref_logprobs, coefficient, estimator)
    if _by_triton(rewards):
        from rlhfuse.kernels import triton_gae, triton_whiten  # triton is optional

        given = rewards if shaping is None else shaping
        found = triton_gae.scan(
            given, values, bootstrap, cu_seqlens, gamma=gamma, decay=gamma * lam
        )
        advantages, moments = found.advantages, found.moments
        white = triton_whiten.whiten(advantages, moments)[0] if whitened else advantages
        return white, found.returns, rewards.new_empty(0) if shaping is None else found.rewards
    made = rewards.new_empty(0, dtype=accumulation_dtype(rewards))
    if shaping is not None:
        rewards = made = shaped_rewards(shaping, cu_seqlens)
    advantages, returns = _advantages(rewards, values, cu_seqlens, bootstrap, gamma, lam)
    return whiten_batch(advantages, cu_seqlens) if whitened else advantages, returns, made


def _advantages(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    if choose(rewards.device) is Path.REFERENCE:
        plain = reference.gae(
            rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap
        )
        return plain.advantages, plain.returns
    dtype = accumulation_dtype(rewards)
    rewards, values = rewards.to(dtype), values.to(dtype)
    if choose(rewards.device) is Path.COMPILED:
        from rlhfuse.kernels import compiled_scans  # numba is slow to import

        return compiled_scans.gae(
            rewards, values, bootstrap, cu_seqlens, gamma=gamma, decay=gamma * lam
        )
    deltas = rewards + next_values(values, cu_seqlens, bootstrap) * gamma - values
    advantages = blocked_reverse_scan(deltas, cu_seqlens, gamma * lam)
    return advantages, advantages + values


gae_op = torch.library.custom_op("rlhfuse::gae", _gae, mutates_args=())


@gae_op.register_fake
def _(
    rewards: Tensor,
    ref_logprobs: Tensor | None,
    scores: Tensor | None,
    coefficient: float,
    estimator: str,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = rewards.new_empty(3, rewards.numel(), dtype=accumulation_dtype(rewards))
    advantages, returns, made = (part.clone() for part in out)
    return advantages, returns, made[:0].clone() if scores is None else made


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, *, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} inside each packed sequence, [T].

    Raises:
        ValueError: shapes that do not fit together.
    """
    run = returns_op if torch.compiler.is_compiling() else _returns
    returns: Tensor = run(rewards, cu_seqlens, gamma)
    return returns


@torch.no_grad()
def _returns(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    check_packed(cu_seqlens, rewards.numel())
    if choose(rewards.device) is Path.REFERENCE:
        return reference.discounted_returns(rewards, cu_seqlens, gamma)
    if _by_triton(rewards):
        from rlhfuse.kernels import triton_gae  # triton is optional

        return triton_gae.scan(rewards, None, None, cu_seqlens, gamma=gamma, decay=gamma).advantages
    rewards = rewards.to(accumulation_dtype(rewards))
    if choose(rewards.device) is Path.COMPILED:
        from rlhfuse.kernels import compiled_scans  # numba is slow to import

        return compiled_scans.discounted_returns(rewards, cu_seqlens, gamma)
    return blocked_reverse_scan(rewards, cu_seqlens, gamma)


returns_op = torch.library.custom_op("rlhfuse::discounted_returns", _returns, mutates_args=())


@returns_op.register_fake
def _(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    return torch.empty_like(rewards, dtype=accumulation_dtype(rewards))


def blocked_reverse_scan(values: Tensor, cu_seqlens: Tensor, decay: float) -> Tensor:
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
        heads = blocked_reverse_scan(grid[0].clone(), cu_blocks, decay**_BLOCK)
        carries = next_values(heads, cu_blocks)
        powers = [decay ** (_BLOCK - t) for t in range(_BLOCK)]
        grid.add_(values.new_tensor(powers)[:, None] * carries)
    scanned = grid.t().contiguous().view(-1)
    return scanned if cells is None else scanned.index_select(0, cells)
