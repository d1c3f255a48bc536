"""On how many blocks should an iteration begin? Where decode steps hardly lengthen with the batch
and there is much to score, all of them would leave the scorers without a device to themselves."""

import numpy as np

from rlhfuse.rollout.forecast import end_s
from rlhfuse.rollout.migration import LATER, Frame
from rlhfuse.rollout.snapshot import state_of, whole_iteration

MOST_SAMPLES = 2048
PARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def opening_blocks(num: int, blocks: int, prompt: float, frame: Frame) -> tuple[int, float]:
    """(blocks to dispatch to, predicted gain in seconds): all of them where nothing is known of
    lengths, nothing fits on fewer, or it does not pay by the margin."""
    policy, cost = frame.policy, frame.cost
    history = np.array(frame.lengths.history, dtype=np.float64)
    if not len(history) or blocks < 2:
        return blocks, 0.0
    stride = max(1, min(-(-num // MOST_SAMPLES), blocks // 16))
    part_blocks, part_num = blocks // stride, max(1, num // stride)
    instances = part_blocks * policy.block
    tail = whole_iteration(part_num, instances, prompt)
    remaining = np.random.default_rng(0).choice(history, (3, part_num))
    state = state_of(tail, remaining, frame.roles, frame.train, cost, policy, frame.table)
    prefill_s = cost.prefill_token_s * prompt
    state = state._replace(
        busy_s=np.full(instances, cost.prefill_call_s + prefill_s * part_num / instances),
        stall_s=np.full(part_num, prefill_s),
        stall_call_s=0.0,
    )
    need = prompt + policy.max_response_tokens

    def ends(part: float, at_count: int) -> float:
        kept = max(1, round(part * part_blocks)) * policy.block
        each = -(-min(at_count, part_num) // kept)
        fits = each <= policy.max_running and not 0 < policy.cache_tokens < each * need
        if not fits or kept >= instances:
            return float("inf")
        keep = np.asarray(np.arange(instances) < kept, dtype=np.bool_)
        return float(end_s(state, keep, at_count))

    all_s = float(end_s(state, np.zeros(instances, dtype=np.bool_), 0))
    begin_s, begin = min((ends(part, part_num), part) for part in PARTS)
    later_s = min(
        ends(part, max(1, int(when * part_num))) for when in LATER for part in (0.1, 0.3, 0.5)
    )
    if begin_s >= min((1.0 - policy.margin) * all_s, later_s):
        return blocks, 0.0
    return max(1, round(begin * blocks)), all_s - begin_s
