"""Laws of the simulator and of what the scheduler gains in it."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import numpy as np
import pytest

from rlhfuse.cost import CostModel
from rlhfuse.rollout import engine_model, forecast, running
from rlhfuse.rollout.bounds import lower_bound_s
from rlhfuse.rollout.clairvoyant import clairvoyant
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.simulator import samples_of, simulate
from rlhfuse.rollout.world import Loss, Simulator, Stats
from rlhfuse.timeline import Kind
from rlhfuse.warm_up import warm_up

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


@pytest.mark.parametrize("seed", range(4))
def test_nothing_beats_the_bound(seed: int) -> None:
    policy = Policy(max_response_tokens=384, max_running=32)
    lengths, prompts = _lengths(seed, 64), [16] * 64
    cost = replace(COST, decode_context_s=2e-6, swap_s=0.05)
    bound = lower_bound_s(cost, policy, lengths, prompts, 4, ROLES)
    best = clairvoyant(cost, policy, lengths, prompts, 4, ROLES, moments=5, second=False)
    assert bound <= best.end_s


def test_the_bound_is_met_where_there_is_nothing_to_decide() -> None:
    """One sample alone on one instance; and full batches of equal samples."""
    policy = Policy(max_running=4)
    cost = replace(COST, prefill_call_s=0.0)
    bound = lower_bound_s(cost, policy, [50], [10], 1, ("actor",))
    assert simulate(cost, policy, [50], [10], 1, ("actor",))[1].end_s == pytest.approx(bound)
    bound = lower_bound_s(cost, policy, [50] * 8, [10] * 8, 2, ())
    assert simulate(cost, policy, [50] * 8, [10] * 8, 2, ())[1].end_s == pytest.approx(bound)


TRAINED = replace(COST, score_token_s={**COST.score_token_s, "train": 4e-4})


@pytest.mark.parametrize("block", [1, 2])
def test_groups_are_trained_once_and_early_training_pays(block: int) -> None:
    lengths, prompts = _lengths(6, 96), [16] * 96
    groups = [i // 4 for i in range(96)]
    ends = {}
    for inter_stage in (InterStage.OFF, InterStage.ON):
        policy = Policy(
            inter_stage=inter_stage, max_response_tokens=384, max_running=64, block=block
        )
        timeline, stats = simulate(
            TRAINED, policy, lengths, prompts, 4, ("actor",), groups=groups, train=True,
            reward_s=0.01, history=_lengths(7, 256),
        )  # fmt: skip
        spans = [s for s in timeline.spans if s.kind is Kind.F]
        assert sum(s.args["tokens"] for s in spans) == block * (sum(lengths) + sum(prompts))  # type: ignore[misc]
        ends[inter_stage] = stats.end_s
    assert ends[InterStage.ON] < ends[InterStage.OFF]


def test_lost_instances_lose_no_sample() -> None:
    policy = Policy(max_response_tokens=384, max_running=64)
    losses = [Loss(0.2, 1, 0.5), Loss(0.6, 0, 0.9), Loss(1.0, 3, 9.0)]
    lengths, prompts = _lengths(8, 64), [16] * 64
    _, stats = simulate(COST, policy, lengths, prompts, 4, ROLES, losses=losses)
    _, whole = simulate(COST, policy, lengths, prompts, 4, ROLES)
    assert stats.end_s > whole.end_s  # and it ended: all are scored


def test_models_are_not_swapped_back_and_forth() -> None:
    """Each worker loads few models: far fewer loads than calls."""
    cost = replace(COST, swap_s=0.05)
    policy = Policy(max_response_tokens=384, max_running=64, score_token_budget=512)
    timeline, _ = simulate(cost, policy, _lengths(9, 128), [16] * 128, 4, ROLES)
    loads, calls = 0, 0
    for lane in timeline.lanes:
        roles = [s.name for s in timeline.of_lane(lane) if s.kind is Kind.SCORE]
        calls += len(roles)
        loads += sum(a != b for a, b in pairwise(["", *roles]))
    assert calls > 40
    assert loads <= 12


def test_siblings_share_their_prompt_where_engines_do() -> None:
    lengths, prompts, groups = _lengths(10, 64), [400] * 64, [i // 8 for i in range(64)]
    prefilled = []
    for shared in (True, False):
        policy = Policy(
            migration=Migration.OFF, max_response_tokens=384, max_running=64, shared_prefix=shared
        )
        timeline, _ = simulate(COST, policy, lengths, prompts, 2, ROLES, groups=groups)
        spans = [s for s in timeline.spans if s.kind is Kind.PREFILL]
        prefilled.append(sum(s.args["tokens"] for s in spans))  # type: ignore[misc]
    assert prefilled == [8 * 400, 64 * 400]


def test_a_straggler_is_noticed_and_emptied() -> None:
    """One worker is three times slower: its samples move away, unlike without moves."""
    policy = Policy(max_response_tokens=384, max_running=64)
    still = replace(policy, migration=Migration.OFF)
    for seed in range(3):
        lengths, prompts, history = _lengths(11 + seed, 64), [16] * 64, _lengths(30 + seed, 256)
        ours, never = (
            simulate(
                COST, asked, lengths, prompts, 4, ("reward",), history=history,
                slowdown=(3.0, 1.0, 1.0, 1.0),
            )[1].end_s
            for asked in (policy, still)
        )  # fmt: skip
        assert ours < 0.8 * never


@pytest.mark.parametrize("per_group", [4, 8])
def test_late_moves_overlook_no_training(per_group: int) -> None:
    """Groups to be trained, every fourth worker slow: no worse than never moving, within 2 %."""
    cost = replace(COST, score_token_s={"actor": 5e-5, "train": 1.5e-4})
    policy = Policy(max_response_tokens=384, max_running=64)
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        alike = np.repeat(rng.standard_normal(192 // per_group), per_group)
        drawn = 50 * np.exp(0.53 * (alike + rng.standard_normal(192)))
        lengths = np.clip(drawn, 4, 384).astype(int).tolist()
        ours, never = (
            simulate(
                cost, asked, lengths, [16] * 192, 8, ("actor",), train=True, reward_s=0.01,
                groups=[i // per_group for i in range(192)], history=_lengths(seed + 50, 256),
                slowdown=(1.0, 1.0, 1.0, 1.3) * 2, record=False,
            )[1].end_s
            for asked in (policy, replace(policy, migration=Migration.OFF))
        )  # fmt: skip
        ratios.append(ours / never)
    assert max(ratios) <= 1.02
    assert np.mean(ratios) < 0.97


def test_forecasts_are_compiled_once() -> None:
    """What the warm-up compiled is what decisions call: no second compilation in the live loop."""
    warm_up()
    modules = (engine_model, forecast, running)
    entries = [f for m in modules for name, f in vars(m).items() if not name.startswith("_")]
    compiled = [f for f in entries if hasattr(f, "signatures")]
    for migration in (Migration.AUTO, Migration.PAPER):
        _stats(0, InterStage.ON, migration)
    simulate(
        TRAINED, Policy(block=2), _lengths(0, 64), [16] * 64, 4, ("actor",), train=True,
        history=_lengths(1, 64),
    )  # fmt: skip
    assert [f.__name__ for f in compiled if len(f.signatures) > 1] == []


class _AskedOneByOne(RolloutScheduler):
    """Of which no simulator may assume that it would not answer."""

    def quiet(self) -> tuple[int, float]:
        return 0, inf


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("migration", [Migration.AUTO, Migration.PAPER, Migration.OFF, None])
def test_what_is_told_together_changes_nothing(seed: int, migration: Migration | None) -> None:
    """To the last bit: every span, every decision."""
    policy = Policy(
        inter_stage=InterStage.ON if migration else InterStage.OFF,
        migration=migration or Migration.OFF,
        max_response_tokens=384,
        max_running=64 if seed else 5,  # with a queue, and without
        block=1 + seed // 2,
        release_groups=seed == 3,
    )
    roles, lengths, groups = (
        ROLES[: 2 * (seed % 3)],
        _lengths(seed, 128),
        [i // 4 for i in range(128)],
    )
    ends = []
    for kind in (RolloutScheduler, _AskedOneByOne):
        scheduler = kind(
            4, roles, COST, policy, lengths=LengthModel(384, _lengths(9, 256)),
            function_reward=seed == 1,
        )  # fmt: skip
        world = Simulator(
            scheduler, COST, lengths, samples_of([16] * 128, groups if seed > 1 else None), 4,
            slowdown=(1.0, 1.2, 1.0, 1.0), losses=[Loss(0.3, 1, 0.6)] if seed == 2 else (),
        )  # fmt: skip
        ends.append(world.run())
        scheduler.validate()
    assert ends[0] == ends[1]
