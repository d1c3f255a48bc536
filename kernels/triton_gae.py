# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: packed GAE, returns and moments of the advantages in one launch.

One program per sequence walks it from its end in blocks: an associative scan inside a block, a
carry between blocks. The same kernel without values gives discounted returns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048


@triton.jit
def _combine(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, value_b + decay_b * value_a


@triton.jit(do_not_specialize=["gamma", "decay"])
def _scan(
    rewards_ptr,
    values_ptr,
    bootstrap_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    moments_ptr,
    gamma,
    decay,
    VALUES: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    final = tl.load(bootstrap_ptr + sequence).to(tl.float32) if BOOTSTRAP else 0.0
    lanes = tl.arange(0, BLOCK)
    carry = tl.zeros([], tl.float32)
    count = tl.zeros([], tl.float32)
    mean = tl.zeros([], tl.float32)
    deviation = tl.zeros([], tl.float32)
    stop = end
    while stop > begin:
        at = stop - 1 - lanes  # lane 0 is the last token: the scan runs backwards in time
        inside = at >= begin
        delta = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.zeros([BLOCK], tl.float32)
        if VALUES:
            value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
            after = tl.load(values_ptr + at + 1, mask=inside & (at + 1 < end), other=0.0)
            after = tl.where(at + 1 == end, final, after.to(tl.float32))
            delta = delta + gamma * after - value
        decays = tl.zeros([BLOCK], tl.float32) + decay
        power, scanned = tl.associative_scan((decays, delta), 0, _combine)
        scanned += power * carry
        tl.store(advantages_ptr + at, scanned, mask=inside)
        if VALUES:
            tl.store(returns_ptr + at, scanned + value, mask=inside)
        carry = tl.sum(tl.where(lanes == BLOCK - 1, scanned, 0.0), 0)
        # Two passes inside the block, then Chan's merge with what came before.
        here = tl.minimum(stop - begin, BLOCK).to(tl.float32)
        own_mean = tl.sum(tl.where(inside, scanned, 0.0), 0) / here
        centred = tl.where(inside, scanned - own_mean, 0.0)
        shift = own_mean - mean
        total = count + here
        deviation += tl.sum(centred * centred, 0) + shift * shift * (count * here / total)
        mean += shift * (here / total)
        count = total
        stop -= BLOCK
    tl.store(moments_ptr + sequence * 3, count)
    tl.store(moments_ptr + sequence * 3 + 1, mean)
    tl.store(moments_ptr + sequence * 3 + 2, deviation)


def scan(
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [T], returns [T] and the advantages' (count, mean, deviation) [N, 3].

    Without `values`, advantages are discounted returns and returns the same tensor.
    """
    num_tokens, num_sequences = rewards.numel(), cu_seqlens.numel() - 1
    advantages = torch.empty(num_tokens, dtype=torch.float32, device=rewards.device)
    returns = advantages if values is None else torch.empty_like(advantages)
    moments = torch.zeros(num_sequences, 3, dtype=torch.float32, device=rewards.device)
    if num_sequences == 0 or num_tokens == 0:
        return advantages, returns, moments
    rewards = rewards.contiguous()
    _scan[(num_sequences,)](
        rewards,
        rewards if values is None else values.contiguous(),
        rewards if bootstrap is None else bootstrap.contiguous(),
        cu_seqlens.contiguous(),
        advantages,
        returns,
        moments,
        gamma,
        decay,
        VALUES=values is not None,
        BOOTSTRAP=bootstrap is not None,
        BLOCK=block_size(num_tokens, num_sequences),
        num_warps=8,
    )
    return advantages, returns, moments


def block_size(num_tokens: int, num_sequences: int) -> int:
    """Tokens of one scan: about a mean sequence, a power of two from 128 to 2048.

    Taken from host numbers only, so that no device is waited for.
    """
    mean = -(-num_tokens // max(num_sequences, 1))
    return min(_MAX_BLOCK, max(128, 1 << (mean - 1).bit_length()))
