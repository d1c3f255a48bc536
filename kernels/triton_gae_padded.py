# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: GAE of padded rows [B, L] with a mask, advantages, returns and their moments in one
launch.

What a token needs of those behind it is a pair: the advantage A of the next kept token, and what
that one is worth today, W = gamma V (behind the last one: the score and gamma bootstrap). A kept
token maps (A, W) to (decay A + W + r - V, gamma V), a masked one to itself, and the end of a row to
a constant: such maps compose, so this is an associative scan. A program owns a block of the B L
places, wherever rows end in it, and composes what lies beyond it in the row that it cuts by itself,
as far as that has any weight: programs do not wait for each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhfuse.kernels.reference import KL_ESTIMATORS, Shaping
from rlhfuse.kernels.triton_gae import Scan, block_size, reward_of
from rlhfuse.kernels.triton_whiten import moments_of

_AHEAD = 256
_MAX_BLOCK = 512


@triton.jit
def _compose(a1, b1, c1, e1, f1, g1, a2, b2, c2, e2, f2, g2):
    """The second map after the first: A' = a A + b W + c, W' = e W + f, S' = e S + g."""
    return (
        a2 * a1,
        a2 * b1 + b2 * e1,
        a2 * c1 + b2 * f1 + c2,
        e2 * e1,
        e2 * f1 + f2,
        e2 * g1 + g2,
    )


@triton.jit
def _token(
    rewards_ptr, ref_ptr, values_ptr, mask_ptr, at, live, kl,
    SHAPED: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """(whether it is kept, its reward without the score, its value) of each place."""
    kept = live & (tl.load(mask_ptr + at, mask=live, other=0) != 0)
    reward = reward_of(rewards_ptr, rewards_ptr, ref_ptr, at, kept, kl, SHAPED)
    value = tl.zeros_like(reward)
    if VALUES:
        value = tl.load(values_ptr + at, mask=kept, other=0.0).to(tl.float32)
    return kept, reward, value


@triton.jit
def _map(kept, reward, value, gamma, decay):
    """What a place does to what follows it: (a, b, c, e, f)."""
    passed = tl.where(kept, 0.0, 1.0)
    return (
        tl.where(kept, decay, 1.0),
        1.0 - passed,
        tl.where(kept, reward - value, 0.0),
        passed,
        tl.where(kept, gamma * value, 0.0),
    )


@triton.jit
def _behind(
    scores_ptr, bootstrap_ptr, row, live, gamma, SHAPED: tl.constexpr, BOOTSTRAP: tl.constexpr
):
    """(W, S) behind the last token of a row."""
    score = tl.zeros_like(row).to(tl.float32)
    if SHAPED > 0:
        score = tl.load(scores_ptr + row, mask=live, other=0.0).to(tl.float32)
    worth = score
    if BOOTSTRAP:
        beyond = tl.load(bootstrap_ptr + row, mask=live, other=0.0).to(tl.float32)
        worth = score + gamma * beyond
    return worth, score


@triton.jit(do_not_specialize=["gamma", "decay", "kl", "num_places", "length"])
def _scan_padded(
    rewards_ptr, ref_ptr, scores_ptr, values_ptr, bootstrap_ptr, mask_ptr,
    advantages_ptr, returns_ptr, shaped_ptr, moments_ptr,
    gamma, decay, kl, num_places, length,
    SHAPED: tl.constexpr, VALUES: tl.constexpr, BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    at = (block + 1) * BLOCK - 1 - lanes  # lane 0 is the last place: the scan runs back in time
    live = at < num_places
    row = at // length
    final = at - row * length == length - 1
    # Each lane's map is that of the place behind it, so that the scan tells it what follows.
    kept, reward, value = _token(
        rewards_ptr, ref_ptr, values_ptr, mask_ptr, at + 1, live & (final == 0), kl,
        SHAPED, VALUES,
    )  # fmt: skip
    worth, score = _behind(scores_ptr, bootstrap_ptr, row, live & final, gamma, SHAPED, BOOTSTRAP)
    a, b, c, e, f = _map(kept, reward, value, gamma, decay)
    a, e = tl.where(final, 0.0, a), tl.where(final, 0.0, e)
    a, b, c, e, f, g = tl.associative_scan((a, b, c, e, f + worth, score), 0, _compose)

    # The rest of the row that this block cuts (nothing, where it ends here).
    first = (block + 1) * BLOCK
    cut = (first - 1) // length
    stop = tl.minimum((cut + 1) * length, num_places)
    own_a, own_b, own_c, own_e, own_f = 1.0, 0.0, 0.0, 1.0, 0.0
    ahead = tl.arange(0, AHEAD)
    position = first + 1
    while (position < stop) & ((own_a > 0.0) | (own_b > 0.0) | (own_e > 0.0)):
        there = position + AHEAD - 1 - ahead
        far_kept, far_reward, far_value = _token(
            rewards_ptr, ref_ptr, values_ptr, mask_ptr, there, there < stop, kl,
            SHAPED, VALUES,
        )  # fmt: skip
        ma, mb, mc, me, mf = _map(far_kept, far_reward, far_value, gamma, decay)
        ma, mb, mc, me, mf, _ = tl.associative_scan(
            (ma, mb, mc, me, mf, tl.zeros_like(mf)), 0, _compose
        )
        whole = ahead == AHEAD - 1
        ma, mb = tl.sum(tl.where(whole, ma, 0.0), 0), tl.sum(tl.where(whole, mb, 0.0), 0)
        mc, me = tl.sum(tl.where(whole, mc, 0.0), 0), tl.sum(tl.where(whole, me, 0.0), 0)
        mf = tl.sum(tl.where(whole, mf, 0.0), 0)
        own_a, own_b, own_c, own_e, own_f, _ = _compose(
            ma, mb, mc, me, mf, 0.0, own_a, own_b, own_c, own_e, own_f, 0.0
        )
        position += AHEAD
    end_w, end_s = _behind(
        scores_ptr, bootstrap_ptr, cut, first <= num_places, gamma, SHAPED, BOOTSTRAP
    )
    after_a, after_w = own_b * end_w + own_c, own_e * end_w + own_f
    after_s = own_e * end_s
    advantage, worth = a * after_a + b * after_w + c, e * after_w + f

    kept, reward, value = _token(
        rewards_ptr, ref_ptr, values_ptr, mask_ptr, at, live, kl, SHAPED, VALUES
    )
    advantage = tl.where(kept, decay * advantage + worth + reward - value, 0.0)
    tl.store(advantages_ptr + at, advantage, mask=live)
    if VALUES:
        tl.store(returns_ptr + at, tl.where(kept, advantage + value, 0.0), mask=live)
    if SHAPED > 0:
        tl.store(shaped_ptr + at, tl.where(kept, reward + e * after_s + g, 0.0), mask=live)
    count, mean, spread = moments_of(advantage, kept)
    tl.store(moments_ptr + block * 3, count)
    tl.store(moments_ptr + block * 3 + 1, mean)
    tl.store(moments_ptr + block * 3 + 2, spread)


def scan_padded(
    rewards: Tensor | Shaping,
    values: Tensor | None,
    bootstrap: Tensor | None,
    mask: Tensor,
    *,
    gamma: float,
    decay: float,
) -> Scan:
    """The scan of padded rows, [B, L] each; without `values`, advantages are discounted returns."""
    shaping = rewards if isinstance(rewards, Shaping) else None
    given = rewards.logprobs if isinstance(rewards, Shaping) else rewards
    given, places = given.contiguous(), given.numel()
    advantages = torch.empty(given.shape, dtype=torch.float32, device=given.device)
    returns = advantages if values is None else torch.empty_like(advantages)
    shaped = given if shaping is None else torch.empty_like(advantages)
    block = min(_MAX_BLOCK, block_size(places))
    blocks = -(-places // block)
    moments = torch.empty(blocks, 3, dtype=torch.float64, device=given.device)
    if places:
        _scan_padded[(blocks,)](
            given,
            given if shaping is None else shaping.ref_logprobs.contiguous(),
            given if shaping is None else shaping.scores.contiguous(),
            given if values is None else values.contiguous(),
            given if bootstrap is None else bootstrap.contiguous(),
            mask.contiguous(),
            advantages,
            returns,
            shaped,
            moments,
            gamma,
            decay,
            0.0 if shaping is None else shaping.coefficient,
            places,
            given.shape[1],
            SHAPED=0 if shaping is None else 1 + KL_ESTIMATORS.index(shaping.estimator),
            VALUES=values is not None,
            BOOTSTRAP=bootstrap is not None,
            BLOCK=block,
            AHEAD=_AHEAD,
            num_warps=block // 64,
        )
    return Scan(advantages, returns, shaped, moments)
