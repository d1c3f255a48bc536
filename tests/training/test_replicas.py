"""Data-parallel replicas: the same update, whoever holds which share of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from rlhfuse.algorithms.tally import merge, named
from rlhfuse.config import Config, PlacementConfig
from rlhfuse.models.partition import partition
from rlhfuse.models.stage import EMBEDDING, LM_HEAD
from rlhfuse.placement import StagePlacement, pipeline_ranks, role_of
from rlhfuse.training.optimizer import divide
from rlhfuse.training.records import MiniBatchPlan
from rlhfuse.training.reduction import Key, Reductions
from rlhfuse.training.stage_runner import AutogradRunner
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
    plain_update,
    save_models,
)

NUM_RANKS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("tied"), tied=True, actor="qwen2")


def placed(config: Config, actor_pp: int, critic_pp: int, *, shard: bool = True) -> Config:
    """`config` on four devices, with the mini-batch of `make_samples(8)`: four prompts."""
    replace = msgspec.structs.replace
    sizes = {"ppo_mini_batch_size": 4, "num_microbatches": 2}
    return replace(
        config,
        actor=msgspec.structs.replace(config.actor, **sizes),
        critic=msgspec.structs.replace(config.critic, **sizes),
        placement=PlacementConfig(
            num_devices=NUM_RANKS, actor_pp=actor_pp, critic_pp=critic_pp, shard_optimizer=shard
        ),
    )


def pipelines_of(config: Config) -> dict[str, StagePlacement]:
    found = {}
    for name, ranks in pipeline_ranks(config).items():
        layers = tuple((r.start, r.stop) for r in partition(4, len(ranks), layer_cost=1.0))
        found[name] = StagePlacement(ranks, layers)
    return found


def plans_of(config: Config, fused: bool) -> list[MiniBatchPlan]:
    """Of one update on `make_samples(8)`."""
    pipelines = pipelines_of(config)
    samples = make_samples(8)
    costs = {}
    for role in ("actor", "critic"):
        count = len(pipelines[role].ranks)
        costs[role] = StageCosts((1.0,) * count, (2.0,) * count, (1.0,) * count)
    plan = plan_update(
        config,
        [TrainedSample(s.sample_id, s.group, len(s.prompt) + len(s.response)) for s in samples],
        pipelines,
        costs,
        roles=("actor", "critic"),
        fused=fused,
        step=1,
    )
    plans = [MiniBatchPlan(b.microbatches, b.rounds) for b in plan.minibatches]
    assert {role_of(name) for b in plans for name in b.microbatches} == {"actor", "critic"}
    return plans


def updated(
    config: Config, fused: bool, folder: Path
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Digests of every rank and all metrics after one update; the checkpoint goes to `folder`."""
    plans = plans_of(config, fused)

    def run(rank: int) -> tuple[dict[str, str], object]:
        trainer = make_trainer(config, rank, NUM_RANKS, pipelines_of(config))
        tally = trainer.update(0, make_samples(8), plans, KL_COEF, [])
        trainer.save(folder)
        return digests(trainer), tally

    results = run_ranks(NUM_RANKS, run)
    return [r[0] for r in results], named(merge([r[1] for r in results]))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("actor_pp", "critic_pp", "tie"),
    [(2, 2, False), (4, 2, False), (1, 4, False), (2, 4, True), (1, 2, True)],
)
def test_an_update_on_replicas_is_the_plain_one(
    actor_pp: Literal[1, 2, 4],
    critic_pp: Literal[2, 4],
    tie: bool,
    models: Models,
    tied: Models,
    tmp_path: Path,
) -> None:
    """Replicas agree on every bit; the gradients are the unsplit models' to float32 rounding, and
    their norm counts every parameter once."""
    config = placed(make_config(tied if tie else models), actor_pp, critic_pp)
    held, metrics = updated(config, True, tmp_path)
    together: dict[str, str] = {}
    for mine in held:
        for name, digest in mine.items():
            assert together.setdefault(name, digest) == digest, name
    plain = plain_update(config, make_samples(8))
    assert metrics["critic/vf_loss"] == pytest.approx(plain.loss["critic"], rel=1e-5)
    for role in ("actor", "critic"):
        moments = first_moments(tmp_path, role)
        norm = metrics[f"{role}/grad_norm"]
        squares = sum(float(g.double().square().sum()) for g in plain.gradients[role].values())
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)
        clip = min(1.0, config.actor.optim.clip_grad / norm)
        assert set(plain.gradients[role]) <= set(moments)
        for name, gradient in plain.gradients[role].items():
            largest = float(gradient.abs().max())
            assert torch.allclose(
                moments[name] / (0.1 * clip), gradient, rtol=1e-4, atol=2e-5 * largest + 1e-9
            ), name


def test_tied_ends_of_replicas_stay_one_matrix(tied: Models, tmp_path: Path) -> None:
    """Though each end has its own optimizer, and shares it with another replica."""
    updated(placed(make_config(tied), 2, 2), True, tmp_path)
    before = load_file(tied.actor / "model.safetensors")[EMBEDDING]
    first, last = (load_file(tmp_path / f"actor/stage_{s}.safetensors") for s in range(2))
    assert torch.equal(first[f"weight/{EMBEDDING}"], last[f"weight/{LM_HEAD}"])
    assert not torch.equal(first[f"weight/{EMBEDDING}"], before)


def test_gradients_travel_while_the_other_model_still_runs(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank starts the sum of one model's gradients with tasks of the other one to come."""
    config = placed(make_config(models), 2, 2)
    plans = plans_of(config, True)
    backward, start = AutogradRunner.backward, Reductions.start
    seen: list[str] = []

    def noted_backward(
        self: AutogradRunner, microbatch: int, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        seen.append("task")
        return backward(self, microbatch, gradient)

    def noted_start(
        self: Reductions, key: Key, gradients: Sequence[torch.Tensor], group: dist.ProcessGroup
    ) -> None:
        seen.append("start")
        start(self, key, gradients, group)

    def run(rank: int) -> list[str]:
        monkeypatch.setattr(AutogradRunner, "backward", noted_backward)
        monkeypatch.setattr(Reductions, "start", noted_start)
        trainer = make_trainer(config, rank, NUM_RANKS, pipelines_of(config))
        trainer.update(0, make_samples(8), plans, KL_COEF, [])
        return seen

    for order in run_ranks(NUM_RANKS, run):
        assert order.count("start") == 2  # of the actor and of the critic
        assert "task" in order[order.index("start") :]


@pytest.mark.slow
def test_neither_fusion_nor_sharding_changes_a_bit(models: Models, tmp_path: Path) -> None:
    config = make_config(models)
    fused = updated(placed(config, 2, 2), True, tmp_path / "fused")
    assert updated(placed(config, 2, 2), False, tmp_path / "serial") == fused
    whole = placed(config, 2, 2, shard=False)
    assert updated(whole, True, tmp_path / "whole") == fused
    assert len(list((tmp_path / "fused").rglob("shard_1_stage_*.json"))) == 4
    assert not list((tmp_path / "whole").rglob("shard_*"))
    for role in ("actor", "critic"):
        sharded, kept = (first_moments(tmp_path / f, role) for f in ("fused", "whole"))
        assert set(sharded) == set(kept)
        assert all(torch.equal(sharded[name], kept[name]) for name in kept)


def test_a_checkpoint_of_replicas_loads_into_other_replicas(models: Models, tmp_path: Path) -> None:
    config = placed(make_config(models), 2, 2)
    held, _ = updated(config, True, tmp_path)
    other = placed(make_config(models), 4, 1)

    def load(rank: int) -> dict[str, str]:
        trainer = make_trainer(other, rank, NUM_RANKS, pipelines_of(other))
        trainer.load(tmp_path)
        trainer.save(tmp_path / "again")
        return digests(trainer)

    loaded = run_ranks(NUM_RANKS, load)
    before = {name: digest for mine in held for name, digest in mine.items()}
    assert {name: digest for mine in loaded for name, digest in mine.items()} == before
    for role in ("actor", "critic"):
        first, second = (first_moments(f, role) for f in (tmp_path, tmp_path / "again"))
        assert set(first) == set(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "actor" / "shard_1_stage_0.json").unlink()

    def refused(rank: int) -> str:
        trainer = make_trainer(other, rank, NUM_RANKS, pipelines_of(other))
        with pytest.raises(ValueError, match=r"shard_1_stage_0\.json is missing") as caught:
            trainer.load(tmp_path)
        return str(caught.value)

    assert len(run_ranks(NUM_RANKS, refused)) == NUM_RANKS


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_every_parameter_has_one_owner_and_owners_hold_alike(num_shards: int) -> None:
    sizes = [40, 3, 17, 90, 5, 60, 1, 33, 12, 8]
    parameters = {f"p{i}": nn.Parameter(torch.zeros(n)) for i, n in enumerate(sizes)}
    shards = divide(parameters, num_shards)
    assert sorted(name for shard in shards for name in shard) == sorted(parameters)
    loads = [sum(parameters[name].numel() for name in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(sizes)
