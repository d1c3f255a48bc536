# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: packed GAE, returns and the advantages' moments in one launch, for any mix of lengths.

A program owns a block of the packed axis, wherever sequences begin and end in it: an associative
scan whose decay is 0 at a sequence's last token. What flows in from the rest of the sequence that
the block cuts, the program sums up itself, as far as its weight is a number above 0. So a long
sequence is worked on by many programs, and none waits for another: no flags, no second launch,
the same bits every time. Without values it gives discounted returns; with `Shaping` the rewards
are made here as well.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhfuse.kernels.reference import KL_ESTIMATORS, Shaping
from rlhfuse.kernels.triton_whiten import moments_of

_MAX_BLOCK = 2048
_AHEAD = 2048


@triton.jit
def _combine(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, value_b + decay_b * value_a


@triton.jit
def reward_of(rewards_ptr, logprobs_ptr, ref_ptr, at, live, kl, SHAPED: tl.constexpr):
    """The reward of each place; with SHAPED, what the KL penalty makes of it (no score)."""
    if SHAPED == 0:
        reward = tl.load(rewards_ptr + at, mask=live, other=0.0).to(tl.float32)
    else:
        own = tl.load(logprobs_ptr + at, mask=live, other=0.0).to(tl.float32)
        gap = own - tl.load(ref_ptr + at, mask=live, other=0.0).to(tl.float32)
        if SHAPED == 2:
            gap = 0.5 * gap * gap
        if SHAPED == 3:
            gap = tl.minimum(tl.maximum(gap, -20.0), 20.0)
            # exp(-gap) - 1 + gap loses everything near 0: there its series (error 1e-9).
            series = gap * gap * (0.5 - gap * (1.0 / 6.0 - gap * (1.0 / 24.0 - gap / 120.0)))
            gap = tl.where(tl.abs(gap) < 0.05, series, tl.exp(-gap) - 1.0 + gap)
        reward = -kl * gap
    return reward


@triton.jit
def _delta(
    rewards_ptr, logprobs_ptr, ref_ptr, scores_ptr, values_ptr, bootstrap_ptr,
    at, live, final, owner, kl, gamma,
    SHAPED: tl.constexpr, VALUES: tl.constexpr, BOOTSTRAP: tl.constexpr,
):  # fmt: skip
    """(what the scan adds up, the value, the reward) of the tokens `at`."""
    reward = reward_of(rewards_ptr, logprobs_ptr, ref_ptr, at, live, kl, SHAPED)
    if SHAPED > 0:
        reward += tl.load(scores_ptr + owner, mask=live & final, other=0.0).to(tl.float32)
    value = tl.zeros_like(reward)
    delta = reward
    if VALUES:
        value = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
        after = tl.load(values_ptr + at + 1, mask=live & (final == 0), other=0.0).to(tl.float32)
        if BOOTSTRAP:
            beyond = tl.load(bootstrap_ptr + owner, mask=live & final, other=0.0)
            after += beyond.to(tl.float32)
        delta = reward + gamma * after - value
    return delta, value, reward


@triton.jit(do_not_specialize=["gamma", "decay", "log2_decay", "kl", "num_tokens", "num_sequences"])
def _scan(
    rewards_ptr, logprobs_ptr, ref_ptr, scores_ptr, values_ptr, bootstrap_ptr, cu_seqlens_ptr,
    advantages_ptr, returns_ptr, shaped_ptr, moments_ptr,
    gamma, decay, log2_decay, kl, num_tokens, num_sequences,
    SHAPED: tl.constexpr, VALUES: tl.constexpr, BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    at = (block + 1) * BLOCK - 1 - lanes  # lane 0 is the last token: the scan runs back in time
    live = at < num_tokens
    # The sequence of each token: the number of boundaries up to it, by bisection.
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + num_sequences
    reach = num_sequences + 1
    while reach > 0:
        open_ = low < high
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_ptr + middle, mask=open_, other=0).to(tl.int64) <= at
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
        reach = reach // 2
    end = tl.load(cu_seqlens_ptr + low, mask=live, other=0).to(tl.int64)
    owner = low - 1
    final = end == at + 1
    delta, value, reward = _delta(
        rewards_ptr, logprobs_ptr, ref_ptr, scores_ptr, values_ptr, bootstrap_ptr,
        at, live, final, owner, kl, gamma, SHAPED, VALUES, BOOTSTRAP,
    )  # fmt: skip
    powers, scanned = tl.associative_scan((tl.where(final, 0.0, decay), delta), 0, _combine)

    # The rest of the sequence that this block cuts (nothing, where it ends here).
    first = (block + 1) * BLOCK
    stop = tl.max(tl.where(live, end, 0), 0)
    cut = tl.max(tl.where(live, owner, 0), 0)
    carry = tl.zeros([], tl.float32)
    ahead = tl.arange(0, AHEAD)
    weight = 1.0
    position = first
    while (position < stop) & (weight > 0.0):
        there = position + ahead
        within = there < stop
        more, _, _ = _delta(
            rewards_ptr, logprobs_ptr, ref_ptr, scores_ptr, values_ptr, bootstrap_ptr,
            there, within, there + 1 == stop, cut + ahead * 0, kl, gamma,
            SHAPED, VALUES, BOOTSTRAP,
        )  # fmt: skip
        own = tl.exp2(ahead.to(tl.float32) * log2_decay)
        carry += weight * tl.sum(tl.where(within, own * more, 0.0), 0)
        position += AHEAD
        weight = tl.exp2((position - first).to(tl.float32) * log2_decay)
    scanned += powers * carry

    tl.store(advantages_ptr + at, scanned, mask=live)
    if VALUES:
        tl.store(returns_ptr + at, scanned + value, mask=live)
    if SHAPED > 0:
        tl.store(shaped_ptr + at, reward, mask=live)
    count, mean, spread = moments_of(scanned, live)
    tl.store(moments_ptr + block * 3, count)
    tl.store(moments_ptr + block * 3 + 1, mean)
    tl.store(moments_ptr + block * 3 + 2, spread)


@dataclass(frozen=True, slots=True)
class Scan:
    """Advantages, returns and rewards [T], and (count, mean, squared deviations) of the advantages
    of each block, float64 [P, 3]; the same tensor twice where one of them is another."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    moments: Tensor


def scan(
    rewards: Tensor | Shaping,
    values: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    decay: float,
) -> Scan:
    """The scan of packed rewards; without `values`, advantages are discounted returns."""
    shaping = rewards if isinstance(rewards, Shaping) else None
    given = rewards.logprobs if isinstance(rewards, Shaping) else rewards
    given = given.contiguous()
    num_tokens, num_sequences = given.numel(), cu_seqlens.numel() - 1
    advantages = torch.empty(num_tokens, dtype=torch.float32, device=given.device)
    returns = advantages if values is None else torch.empty_like(advantages)
    shaped = given if shaping is None else torch.empty_like(advantages)
    block = block_size(num_tokens)
    blocks = -(-num_tokens // block)
    moments = torch.empty(blocks, 3, dtype=torch.float64, device=given.device)
    if num_tokens:
        _scan[(blocks,)](
            given,
            given,
            given if shaping is None else shaping.ref_logprobs.contiguous(),
            given if shaping is None else shaping.scores.contiguous(),
            given if values is None else values.contiguous(),
            given if bootstrap is None else bootstrap.contiguous(),
            cu_seqlens.contiguous(),
            advantages,
            returns,
            shaped,
            moments,
            gamma,
            decay,
            math.log2(decay) if decay > 0 else -1.0e30,
            0.0 if shaping is None else shaping.coefficient,
            num_tokens,
            num_sequences,
            SHAPED=0 if shaping is None else 1 + KL_ESTIMATORS.index(shaping.estimator),
            VALUES=values is not None,
            BOOTSTRAP=bootstrap is not None,
            BLOCK=block,
            AHEAD=_AHEAD,
            num_warps=8,
        )
    return Scan(advantages, returns, shaped, moments)


def block_size(num_tokens: int) -> int:
    """Tokens of a program: some 512 programs, a power of two from 128 to 2048.

    Taken from host numbers only, so that no device is waited for.
    """
    return min(_MAX_BLOCK, max(128, 1 << (-(-num_tokens // 512) - 1).bit_length()))
