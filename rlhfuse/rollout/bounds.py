"""No policy can generate and score sooner than this: a proven bound, true lengths known.

Let T be the end. Device time: a token made in a batch of b costs its instance step(b) / b seconds
and its sample step(b) seconds of waiting. Let g(s) be the least device time of a token that may
take s seconds, and h the greatest convex function below g. A sample of L tokens can wait at most
T - own, where `own` is what it needs before its first and after its last token, so by Jensen's
inequality its tokens cost at least L h((T - own) / L). Added over samples, with prefill and
scoring, that must fit into (instances x T). The least T for which it does is the bound. It allows
samples to move at any time for nothing and splits device time as finely as one likes.
"""

from collections.abc import Sequence

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.forecast import Floats
from rlhfuse.rollout.groups import TRAIN
from rlhfuse.rollout.policy import Policy


def lower_bound_s(
    cost: CostModel,
    policy: Policy,
    lengths: Sequence[int],
    prompts: Sequence[int],
    instances: int,
    roles: tuple[str, ...],
    *,
    train: bool = False,
    reward_s: float = 0.0,
) -> float:
    """Seconds from the first dispatch to the last score (or gradient, with `train`)."""
    tokens = np.asarray(lengths, dtype=np.float64)
    prompt = np.asarray(prompts, dtype=np.float64)
    every = (*roles, TRAIN) if train else roles
    rates = [cost.score_token_s[role] for role in every]
    final = tokens + prompt
    after = np.full(len(tokens), reward_s)
    if roles:
        dearest = max(cost.score_token_s[role] for role in roles)
        after = np.maximum(after, cost.score_call_s + dearest * final)
    if train:
        after = after + cost.score_call_s + cost.score_token_s[TRAIN] * final
    context_s = cost.decode_context_s * tokens * (prompt + 0.5 * tokens)
    # A shared prompt is computed once by a sibling: only what is certain counts.
    prefill_s = np.zeros(len(tokens)) if policy.shared_prefix else cost.prefill_token_s * prompt
    own = prefill_s + context_s + after
    work = policy.block * (sum(rates) * float(final.sum()) + cost.swap_s * len(every))
    work += float((prefill_s + context_s).sum())
    seconds, device = _hull(cost.step_table(policy.max_running)[1:])
    first_s = float(seconds[0])

    def fits(end_s: float) -> bool:
        wait = (end_s - own) / tokens
        if float(wait.min()) < first_s * (1 - 1e-12):
            return False
        decode = float((tokens * np.interp(wait, seconds, device)).sum())
        return decode + work <= instances * end_s

    low = float((own + tokens * first_s).max())
    if fits(low):
        return low
    high = 2.0 * low
    while not fits(high):
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


def _hull(steps: Floats) -> tuple[Floats, Floats]:
    """The greatest convex, falling function below (step time, device time of a token), by its
    corners; flat beyond the last one."""
    least = np.minimum.accumulate(steps / np.arange(1, len(steps) + 1))
    corners: list[tuple[float, float]] = []
    for x, y in zip(steps.tolist(), least.tolist(), strict=True):
        if corners and x <= corners[-1][0]:  # no slower, so the larger batch is better
            corners.pop()
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2], corners[-1]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, y))
    return np.array([c[0] for c in corners]), np.array([c[1] for c in corners])
