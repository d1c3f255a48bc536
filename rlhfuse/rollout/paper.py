"""RLHFuse's own rule for the tail (arXiv 2409.13221, section 4): one threshold, one move."""

import numpy as np

from rlhfuse.rollout.forecast import Bools, end_s
from rlhfuse.rollout.migration import Frame, Move, assign, block_order, keep_first
from rlhfuse.rollout.snapshot import Tail, state_of, whole_iteration

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
WITHOUT_HISTORY = 0.2  # what the paper found best
FLAT = 1.5  # a step may take so much longer than that of one sample
MOST_SAMPLES = 2048


def decide_by_threshold(tail: Tail, threshold: float, frame: Frame) -> Move | None:
    """When the unfinished part falls below the threshold, keep the least number of instances whose
    batch capacity (decode latency not yet rising) and cache hold the tail, those with the most
    remaining samples."""
    num = len(tail.sample_ids)
    if num > threshold * tail.num_samples:
        return None
    blocks = block_order(tail, frame.policy.block)
    used = len(set((tail.home // frame.policy.block).tolist()))
    for number in range(least_blocks(num, frame), used):
        keep = keep_first(tail, blocks, number)
        destinations = assign(tail, keep, -tail.tokens, frame.policy)
        if destinations is not None:
            text = f"{num} of {tail.num_samples} samples remain: {number} blocks go on"
            return Move(destinations, text, 0.0)
    return None


def decide_forced(tail: Tail, number: int, frame: Frame) -> Move | None:
    """`number` blocks go on, as ordered."""
    blocks = block_order(tail, frame.policy.block)
    keep = keep_first(tail, blocks, min(number, len(blocks)))
    quantiles = np.full((1, len(tail.home)), 0.5)
    expected = frame.lengths.remaining(tail.tokens, quantiles, tail.sample_ids, tail.groups)[0]
    destinations = assign(tail, keep, expected, frame.policy)
    return None if destinations is None else Move(destinations, "ordered", 0.0)


def least_blocks(num: int, frame: Frame) -> int:
    """Blocks whose decode latency has not yet risen with `num` samples among them."""
    flat = np.flatnonzero(frame.table[1:] <= FLAT * frame.table[1]) + 1
    capacity = min(int(flat.max()), frame.policy.max_running) * frame.policy.block
    return max(1, -(-num // capacity))


def best_threshold(num_samples: int, instances: int, prompt: float, frame: Frame) -> float:
    """R_t: the part of the samples at which moving ends an iteration soonest, simulated over the
    lengths of earlier iterations; of a large iteration, for a part of it."""
    history = np.array(frame.lengths.history, dtype=np.float64)
    if not len(history):
        return WITHOUT_HISTORY
    block = frame.policy.block
    stride = max(1, min(-(-num_samples // MOST_SAMPLES), instances // (16 * block)))
    instances = max(block, instances // stride // block * block)
    num = max(1, num_samples // stride)
    remaining = np.random.default_rng(0).choice(history, (4, num))
    tail = whole_iteration(num, instances, prompt)
    state = state_of(
        tail, remaining, frame.roles, frame.train, frame.cost, frame.policy, frame.table
    )

    def ends(part: float) -> float:
        count = max(1, int(part * num))
        return float(end_s(state, _first(instances, block * least_blocks(count, frame)), count))

    never: Bools = np.zeros(instances, dtype=np.bool_)
    best_s, best = float(end_s(state, never, 0)), 0.0
    for part in THRESHOLDS:
        if block * least_blocks(max(1, int(part * num)), frame) < instances:
            best_s, best = min((best_s, best), (ends(part), part))
    return best


def _first(instances: int, number: int) -> Bools:
    return np.asarray(np.arange(instances) < number, dtype=np.bool_)
