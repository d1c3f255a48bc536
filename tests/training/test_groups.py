"""Groups trained one by one, some ahead of the update: the same bits whoever trains which when."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from rlhfuse.algorithms.tally import Tally, merge, named
from rlhfuse.config import AlgorithmConfig, Config, FusionConfig, PlacementConfig
from rlhfuse.group_plan import plan_group, plan_groups
from rlhfuse.group_training import BatchSize, why_groups_wait
from rlhfuse.messages import MiniBatch
from rlhfuse.placement import StagePlacement
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.update_plan import StageCosts, TrainedSample, plan_update
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    Models,
    digests,
    first_moments,
    make_config,
    make_samples,
    make_trainer,
    save_models,
)

PIPELINES = {
    name: StagePlacement((rank,), ((0, 4),)) for rank, name in enumerate(["actor", "actor.1"])
}
COSTS = {"actor": StageCosts((1.0,), (2.0,), (1.0,))}
NUM_GROUPS = 6
Orders = tuple[tuple[int, ...], tuple[int, ...]]
"""The groups that each of two ranks trains ahead, in order."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"), tied=True)


def grpo(models: Models, aggregation: str, *, early: bool = True) -> Config:
    """Two devices, each a replica; micro-batches of a few samples, so that groups are cut."""
    replace_ = msgspec.structs.replace
    config = make_config(models)
    actor = replace_(config.actor, ppo_mini_batch_size=NUM_GROUPS, ppo_max_token_len_per_gpu=48)
    actor = msgspec.convert(
        {**msgspec.to_builtins(actor), "loss_agg_mode": aggregation}, type(actor)
    )
    return replace_(
        config,
        actor=actor,
        algorithm=AlgorithmConfig(adv_estimator="grpo"),
        rollout=replace_(config.rollout, n=3, response_length=32),
        data=replace_(config.data, train_batch_size=NUM_GROUPS),
        placement=PlacementConfig(num_devices=2, actor_pp=1),
        fusion=FusionConfig(early_training="on" if early else "off"),
    )


def batch() -> list[SampleData]:
    return [replace(s, group=i // 3) for i, s in enumerate(make_samples(3 * NUM_GROUPS))]


def known(samples: Sequence[SampleData]) -> list[TrainedSample]:
    return [TrainedSample(s.sample_id, s.group, len(s.prompt) + len(s.response)) for s in samples]


def order_of(plan: MiniBatch) -> MiniBatchPlan:
    return MiniBatchPlan(plan.microbatches, plan.rounds)


def trained(
    config: Config, ahead: Orders, samples: Sequence[SampleData], folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """Weights on both ranks, and metrics, of an update before which `ahead` was trained."""
    done = {group for order in ahead for group in order}
    rest = [s for s in samples if s.group not in done]
    whole = BatchSize(sum(len(s.response) for s in samples), len(samples))

    def run(rank: int) -> tuple[dict[str, str], Tally]:
        trainer = make_trainer(config, rank, 2, PIPELINES)
        for group in ahead[rank]:
            mine = [s for s in samples if s.group == group]
            plan = order_of(plan_group(config, known(mine), rank, PIPELINES, COSTS))
            trainer.accumulate(1, mine, plan, KL_COEF, [])
        plans = [
            order_of(b) for b in plan_groups(config, known(rest), PIPELINES, COSTS).minibatches
        ]
        tally = trainer.update(1, rest, plans, KL_COEF, [], whole=whole)
        trainer.save(folder)
        return digests(trainer), tally

    (first, a), (second, b) = run_ranks(2, run)
    assert first == second, "replicas differ"
    return first, named(merge([a, b]))


@pytest.mark.parametrize(
    ("aggregation", "ahead"),
    [
        ("token-mean", ((4, 1), (3,))),
        # One replica has nothing to do at all.
        ("seq-mean-token-mean", ((), (5, 2, 0, 4, 3, 1))),
    ],
)
def test_whoever_trains_which_group_when_changes_no_bit(
    aggregation: str, ahead: Orders, models: Models, tmp_path: Path
) -> None:
    config, samples = grpo(models, aggregation), batch()
    together = trained(config, ((), ()), samples, tmp_path / "together")
    weights, metrics = trained(config, ahead, samples, tmp_path / "ahead")
    assert weights == together[0]
    assert metrics == pytest.approx(together[1], rel=1e-6)


def test_the_gradient_is_the_ordinary_updates_to_rounding(models: Models, tmp_path: Path) -> None:
    samples = batch()
    trained(grpo(models, "token-mean"), ((3, 0), (5,)), samples, tmp_path / "groups")
    plain = grpo(models, "token-mean", early=False)
    plan = plan_update(
        plain, known(samples), PIPELINES, COSTS, roles=("actor",), fused=True, step=1
    )

    def run(rank: int) -> None:
        trainer = make_trainer(plain, rank, 2, PIPELINES)
        trainer.update(1, samples, [order_of(b) for b in plan.minibatches], KL_COEF, [])
        trainer.save(tmp_path / "plain")

    run_ranks(2, run)
    ours, theirs = (first_moments(tmp_path / name, "actor") for name in ("groups", "plain"))
    assert ours.keys() == theirs.keys()
    for name, moment in theirs.items():
        assert float((ours[name] - moment).norm()) <= 1e-6 * float(moment.norm()), name
    assert any(not torch.equal(ours[name], moment) for name, moment in theirs.items())


def test_a_group_that_is_not_finite_stops_all_ranks_before_anything_changes(
    models: Models,
) -> None:
    config, samples = grpo(models, "token-mean"), batch()
    broken = replace(samples[0], old_logprobs=np.full_like(samples[0].old_logprobs, np.nan))
    whole = BatchSize(sum(len(s.response) for s in samples), len(samples))
    first = [broken, *samples[1:3]]

    def run(rank: int) -> Mapping[str, str]:
        trainer = make_trainer(config, rank, 2, PIPELINES)
        before = digests(trainer)
        if rank == 0:
            plan = order_of(plan_group(config, known(first), 0, PIPELINES, COSTS))
            trainer.accumulate(1, first, plan, KL_COEF, [])
        rest = samples[3:]
        plans = [
            order_of(b) for b in plan_groups(config, known(rest), PIPELINES, COSTS).minibatches
        ]
        with pytest.raises(NonFiniteLoss):
            trainer.update(1, rest, plans, KL_COEF, [], whole=whole)
        assert digests(trainer) == before
        # The step runs again, with a batch that is sound: what was summed before is forgotten.
        plans = [
            order_of(b) for b in plan_groups(config, known(samples), PIPELINES, COSTS).minibatches
        ]
        trainer.update(2, samples, plans, KL_COEF, [], whole=whole)
        return digests(trainer)

    found, _ = run_ranks(2, run)
    expected = run_ranks(2, lambda rank: _once(config, rank, samples, whole))[0]
    assert found == expected


def _once(
    config: Config, rank: int, samples: Sequence[SampleData], whole: BatchSize
) -> Mapping[str, str]:
    trainer = make_trainer(config, rank, 2, PIPELINES)
    plans = [order_of(b) for b in plan_groups(config, known(samples), PIPELINES, COSTS).minibatches]
    trainer.update(2, samples, plans, KL_COEF, [], whole=whole)
    return digests(trainer)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"algorithm": {"adv_estimator": "gae"}}, "critic"),
        ({"actor": {"ppo_mini_batch_size": 3}}, "several optimizer steps"),
        ({"actor": {"num_microbatches": 2}}, "num_microbatches"),
        ({"placement": {"actor_pp": 2}}, "actor_pp"),
        ({"algorithm": {"adv_estimator": "reinforce_plus_plus"}}, "whitened"),
        ({}, ""),
    ],
)
def test_where_groups_wait_a_reason_is_given(
    changes: Mapping[str, Mapping[str, object]], why: str, models: Models
) -> None:
    config = grpo(models, "token-mean")
    tree = msgspec.to_builtins(config)
    for section, keys in changes.items():
        tree[section] |= keys
    reason = why_groups_wait(msgspec.convert(tree, Config))
    assert why in reason
    assert bool(reason) == bool(changes)
