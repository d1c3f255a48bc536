"""What an update runs depends on ids and lengths alone; schedules change its time, not its work."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.config import Config
from rlhfuse.logprob_sources import why_reference_stays
from rlhfuse.placement import StagePlacement
from rlhfuse.schedules.ir import Op
from rlhfuse.timeline import Kind, Span
from rlhfuse.update_plan import (
    StageCosts,
    TrainedSample,
    forward_only,
    later_samples,
    measured_costs,
    plan_update,
    rebuilding_gain,
)

ROLES = ("actor", "critic")
PIPELINES = {
    "actor": StagePlacement((0, 1), ((0, 2), (2, 4))),
    "critic": StagePlacement((1, 0), ((0, 2), (2, 4))),
}
replace = msgspec.structs.replace


def _config(epochs: int = 1) -> Config:
    config = Config()
    actor = replace(config.actor, ppo_mini_batch_size=4, num_microbatches=2, ppo_epochs=epochs)
    critic = replace(config.critic, ppo_mini_batch_size=4, num_microbatches=2, ppo_epochs=epochs)
    return replace(config, actor=actor, critic=critic)


def _costs(scale: float, skew: float) -> dict[str, StageCosts]:
    cost = StageCosts((scale, scale * skew), (2 * scale, 2 * scale * skew), (scale, scale * skew))
    return dict.fromkeys(ROLES, cost)


def _samples(lengths: list[int]) -> list[TrainedSample]:
    return [TrainedSample(i, i // 2, length) for i, length in enumerate(lengths)]


lengths = st.lists(st.integers(1, 300), min_size=16, max_size=16)


@settings(max_examples=15, deadline=None)
@given(lengths, st.integers(1, 2), st.booleans())
def test_every_sample_once_per_role_and_epoch(sizes: list[int], epochs: int, fused: bool) -> None:
    plan = plan_update(
        _config(epochs),
        _samples(sizes),
        PIPELINES,
        _costs(1.0, 1.0),
        roles=ROLES,
        fused=fused,
        step=3,
    )
    for role in ROLES:
        seen = Counter(
            i for batch in plan.minibatches for micro in batch.microbatches[role] for i in micro
        )
        assert seen == Counter({i: epochs for i in range(len(sizes))})
    for batch in plan.minibatches:
        for role in ROLES:
            count = len(batch.microbatches[role])
            tasks = Counter(
                (t.pp_stage, t.microbatch, t.op)
                for schedule in batch.rounds
                for row in schedule.rows
                for t in row
                if t.pipeline == role
            )
            assert tasks == Counter(
                (s, k, op) for s in range(2) for k in range(count) for op in (Op.F, Op.B)
            )


@settings(max_examples=15, deadline=None)
@given(lengths, st.floats(0.1, 10.0), st.floats(0.2, 5.0))
def test_costs_and_fusion_do_not_change_what_is_computed(
    sizes: list[int], scale: float, skew: float
) -> None:
    def cut(costs: dict[str, StageCosts], fused: bool) -> list[object]:
        plan = plan_update(
            _config(), _samples(sizes), PIPELINES, costs, roles=ROLES, fused=fused, step=1
        )
        return [batch.microbatches for batch in plan.minibatches]

    assert cut(_costs(1.0, 1.0), False) == cut(_costs(scale, skew), True)


@settings(max_examples=15, deadline=None)
@given(lengths)
def test_a_fused_update_is_never_predicted_slower(sizes: list[int]) -> None:
    plan = plan_update(
        _config(), _samples(sizes), PIPELINES, _costs(1.0, 1.3), roles=ROLES, fused=True, step=1
    )
    assert plan.predicted_s <= plan.serial_s * (1 + 1e-9)


def test_measured_costs_are_seconds_per_token_and_keep_what_did_not_run() -> None:
    spans = [
        Span("rank0", 0.0, 0.5, Kind.F, "actor:0F0", {}),
        Span("rank0", 1.0, 1.5, Kind.F, "actor:0F1", {}),
        Span("rank0", 2.0, 4.0, Kind.B, "actor:0B0", {}),
        Span("rank0", 4.0, 9.0, Kind.SCORE, "actor", {}),
    ]
    before = _costs(7.0, 1.0)
    after = measured_costs(spans, {"actor": 100}, before)
    assert after["actor"].forward == (0.01, 7.0)
    assert after["actor"].backward == (0.02, 14.0)
    assert after["actor"].weight == (0.01, 7.0)
    assert after["critic"] == before["critic"]


def test_what_the_update_computes_itself_and_the_rest_are_the_batch() -> None:
    base = _config()
    config = replace(
        base,
        actor=replace(base.actor, use_kl_loss=True),
        algorithm=replace(base.algorithm, adv_estimator="grpo"),
        data=replace(base.data, train_batch_size=8),
    )
    assert not why_reference_stays(config)
    samples = _samples([10 + i for i in range(16)])
    later = later_samples(config, [(s.id, s.group) for s in samples], 3)
    plan = plan_update(
        config,
        samples,
        {"actor": PIPELINES["actor"]},
        {"actor": _costs(1.0, 1.0)["actor"], "reference": forward_only((1.0, 1.0))},
        roles=("actor",),
        fused=True,
        step=3,
        reference={"reference": PIPELINES["critic"]},
    )
    first, second = plan.minibatches
    assert sorted(plan.forward_samples) == sorted(later)
    assert first.forward["reference"] == second.microbatches["actor"]
    assert not second.forward
    # Both micro-batches of the reference fit into the actor's bubbles.
    alone = plan_update(
        config,
        samples,
        {"actor": PIPELINES["actor"]},
        _costs(1.0, 1.0),
        roles=("actor",),
        fused=True,
        step=3,
    )
    assert plan.predicted_s < 1.1 * alone.predicted_s


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ("algorithm", {"adv_estimator": "gae"}, "critic"),
        ("algorithm", {"adv_estimator": "rloo"}, "use_kl_in_reward"),
        ("actor", {"use_kl_loss": False}, "no reference"),
        ("actor", {"ppo_mini_batch_size": 8}, "one mini-batch"),
        ("placement", {"actor_pp": 1}, "one stage"),
        ("fusion", {"intra_stage": "off"}, "intra_stage is off"),
        ("fusion", {"reference": "off"}, "reference is off"),
    ],
)
def test_why_the_reference_stays_with_the_rollout_workers(
    section: str, change: dict[str, str | int | bool], reason: str
) -> None:
    base = _config()
    config = replace(
        base,
        actor=replace(base.actor, use_kl_loss=True),
        algorithm=replace(base.algorithm, adv_estimator="grpo"),
        data=replace(base.data, train_batch_size=8),
    )
    changed = replace(config, **{section: replace(getattr(config, section), **change)})
    assert reason in why_reference_stays(changed)
    assert not why_reference_stays(config)


def test_rebuilding_gains_where_the_first_guess_was_wrong() -> None:
    samples = _samples([20, 300, 40, 80, 160, 30, 50, 90] * 2)
    guess, real = _costs(1.0, 1.0), _costs(1.0, 1.0)
    real["critic"] = _costs(0.3, 1.0)["critic"]  # a critic of a third of the actor's work

    def gain(costs: dict[str, StageCosts], *, fused: bool) -> float:
        plan = plan_update(_config(), samples, PIPELINES, costs, roles=ROLES, fused=fused, step=1)
        return rebuilding_gain(_config(), plan.minibatches[0], samples, PIPELINES, guess)

    assert gain(guess, fused=True) == 1.0
    assert gain(real, fused=False) == 1.0
    assert gain(real, fused=True) > 1.02
