"""Laws of the simulator and of what the scheduler gains in it."""

from itertools import pairwise

import numpy as np
import pytest

from rlhfuse.cost import CostModel
from rlhfuse.rollout.clairvoyant import clairvoyant
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.simulator import Stats, simulate
from rlhfuse.timeline import Kind

ROLES = ("actor", "critic", "reference", "reward")
COST = CostModel.default()


def _lengths(seed: int, num: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(50), 0.75, num), 4, 384).astype(int).tolist()  # type: ignore[no-any-return]


def _stats(seed: int, inter_stage: InterStage, migration: Migration) -> Stats:
    policy = Policy(
        inter_stage=inter_stage, migration=migration, max_response_tokens=384, max_running=64
    )
    history = _lengths(seed + 100, 256)
    return simulate(COST, policy, _lengths(seed, 64), [16] * 64, 2, ROLES, history=history)[1]


def test_one_sample_takes_what_its_parts_take() -> None:
    _, stats = simulate(COST, Policy(), [10], [5], 1, ("actor",))
    expected = COST.prefill_s(5) + 10 * COST.step_s(1)
    assert stats.generation_s == pytest.approx(expected)
    assert stats.end_s == pytest.approx(expected + COST.score_s("actor", 15))


def test_batch_falls_as_samples_finish() -> None:
    _, stats = simulate(COST, Policy(), [10, 30, 50], [5, 5, 5], 1, ())
    steps = 10 * COST.step_s(3) + 20 * COST.step_s(2) + 20 * COST.step_s(1)
    assert stats.generation_s == pytest.approx(COST.prefill_s(15) + steps)


@pytest.mark.parametrize("seed", range(3))
def test_fusion_pays_and_moving_pays_more(seed: int) -> None:
    serial = _stats(seed, InterStage.OFF, Migration.OFF)
    early = _stats(seed, InterStage.ON, Migration.OFF)
    ours = _stats(seed, InterStage.ON, Migration.AUTO)
    assert early.end_s <= serial.end_s * 1.002
    assert ours.end_s < 0.92 * serial.end_s
    assert ours.decisions


def test_close_to_the_clairvoyant_single_move() -> None:
    policy = Policy(max_response_tokens=384, max_running=64)
    best = clairvoyant(COST, policy, _lengths(1, 64), [16] * 64, 2, ROLES)
    assert _stats(1, InterStage.ON, Migration.AUTO).end_s <= 1.05 * best.end_s


def test_nothing_to_score_nothing_to_gain() -> None:
    """Without scoring work a move cannot help, so none is made."""
    policy = Policy(max_response_tokens=384, max_running=64)
    lengths = _lengths(2, 64)
    _, stats = simulate(COST, policy, lengths, [16] * 64, 2, (), history=_lengths(3, 256))
    _, serial = simulate(
        COST, Policy(inter_stage=InterStage.OFF, max_running=64), lengths, [16] * 64, 2, ()
    )
    assert stats.end_s <= serial.end_s * 1.0001


@pytest.mark.parametrize("migration", [Migration.AUTO, Migration.PAPER])
def test_workers_do_one_thing_at_a_time(migration: Migration) -> None:
    policy = Policy(migration=migration, max_response_tokens=384, max_running=64)
    timeline, stats = simulate(COST, policy, _lengths(4, 128), [16] * 128, 4, ROLES)
    assert stats.num_moved > 0
    for lane in timeline.lanes:
        spans = timeline.of_lane(lane)
        for before, after in pairwise(spans):
            assert after.start_s >= before.end_s - 1e-9
    scored = sum(s.args["tokens"] for s in timeline.spans if s.kind is Kind.SCORE)  # type: ignore[misc]
    assert scored == len(ROLES) * (sum(_lengths(4, 128)) + 16 * 128)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_wrong_expectations_cost_little(factor: float) -> None:
    """Lengths expected far too short or long: still no worse than never moving, within 2 %."""
    policy = Policy(max_response_tokens=384, max_running=64)
    still = Policy(migration=Migration.OFF, max_response_tokens=384, max_running=64)
    for seed in range(2):
        history = [min(384, int(factor * n) + 1) for n in _lengths(seed + 50, 256)]
        lengths, prompts = _lengths(seed, 64), [16] * 64
        _, ours = simulate(COST, policy, lengths, prompts, 2, ROLES, history=history)
        _, never = simulate(COST, still, lengths, prompts, 2, ROLES)
        assert ours.end_s <= 1.02 * never.end_s


def test_deterministic() -> None:
    first = _stats(5, InterStage.ON, Migration.AUTO)
    assert first == _stats(5, InterStage.ON, Migration.AUTO)
