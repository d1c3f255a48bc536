"""``actor.backend: megatron``: the same update as our own backend's, resumed to the same bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch

pytest.importorskip("megatron.core")

from rlhfuse.algorithms.tally import merge, named
from rlhfuse.config import Config, PlacementConfig
from rlhfuse.megatron.backend import MegatronBackend
from rlhfuse.placement import StagePlacement
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Schedule
from rlhfuse.training.backend import MakeBackend
from rlhfuse.training.records import MiniBatchPlan
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.update import RankTrainer
from rlhfuse.update_plan import StageCosts, TrainedSample, plan_update
from tests.training.ranks import run_ranks
from tests.training.test_replicas import pipelines_of, placed
from tests.training.tiny_update import (
    KL_COEF,
    Models,
    cut,
    make_config,
    make_placement,
    make_plans,
    make_problem,
    make_samples,
    save_models,
    serial_rounds,
)

Weights = dict[str, torch.Tensor]
ROLES = ("actor", "critic")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"), tied=True, width=102)


def weights(trainer: RankTrainer) -> Weights:
    return {
        f"{role}/{name}": tensor.clone()
        for role in ROLES
        for name, tensor in trainer.named_tensors(role).items()
    }


@dataclass(frozen=True)
class Job:
    """Two updates of two mini-batches on `num_ranks` ranks."""

    config: Config
    backend: MakeBackend
    pipelines: Mapping[str, StagePlacement]
    plans: tuple[Sequence[MiniBatchPlan], ...]
    num_ranks: int
    folder: Path | None = None

    def trainer(self, rank: int) -> RankTrainer:
        return RankTrainer(
            self.config,
            rank=rank,
            world_size=self.num_ranks,
            pipelines=self.pipelines,
            device=torch.device("cpu"),
            dtype=torch.float32,
            total_steps=10,
            make_backend=self.backend,
        )

    def run(self, rank: int) -> tuple[Weights, Weights, object]:
        """Weights before and after, and metrics. With a folder: saved, and loaded into another
        trainer, between the two."""
        trainer = self.trainer(rank)
        before = weights(trainer)
        tallies = []
        for step, plans in enumerate(self.plans):
            if self.folder is not None and step:
                trainer.save(self.folder)
                trainer = self.trainer(rank)
                trainer.load(self.folder)
            tallies.append(trainer.update(step, make_samples(8, step), plans, KL_COEF, []))
        return before, weights(trainer), tallies[-1]

    def results(self) -> tuple[Weights, Weights, dict[str, float]]:
        """Of all ranks."""
        before: Weights = {}
        after: Weights = {}
        parts = run_ranks(self.num_ranks, self.run, limit_s=120)
        for one, other, _ in parts:
            before.update(one)
            for name, tensor in other.items():
                assert torch.equal(after.setdefault(name, tensor), tensor), name
        return before, after, named(merge([tally for *_, tally in parts]))  # type: ignore[misc]


def job(config: Config, backend: MakeBackend, rounds: tuple[Schedule, ...]) -> Job:
    plans = tuple(make_plans(cut(make_samples(8, step), 2, 2), rounds) for step in range(2))
    return Job(config, backend, make_placement(2), plans, 2)


@pytest.mark.slow
def test_updates_are_those_of_our_own_backend(models: Models, tmp_path: Path) -> None:
    """With weight gradients split off, and the actor's activations computed twice."""
    config = smooth(make_config(models, split_weight=True, recompute=True))
    serial = serial_rounds(make_problem(2, 2))
    fused = (fuse(make_problem(2, 2), iterations=20, split_weight=True),)
    ours = job(config, TorchBackend, serial)
    theirs = job(config, MegatronBackend, fused)
    found = compare(ours, theirs)
    # Serially, and saved and loaded on the way: not a bit changes.
    resumed = replace(job(config, MegatronBackend, serial), folder=tmp_path / "state")
    for name, weight in resumed.results()[1].items():
        assert torch.equal(found[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_tensor_and_data_parallel_updates_are_those_of_our_own_backend(
    tp: int, models: Models, tmp_path: Path
) -> None:
    """Replicas with the distributed optimizer (tp 1), or tensor-parallel stages (tp 2), saved and
    loaded between the updates."""
    config = smooth(placed(make_config(models), 2 if tp == 2 else 1, 2))
    config = msgspec.structs.replace(config, placement=PlacementConfig(num_devices=2, actor_pp=tp))
    pipelines = pipelines_of(config)
    sizes = {role: len(pipelines[role].ranks) for role in ROLES}
    costs = {r: StageCosts((1.0,) * n, (2.0,) * n, (1.0,) * n) for r, n in sizes.items()}
    plans = tuple(
        [
            MiniBatchPlan(b.microbatches, b.rounds)
            for b in plan_update(
                config,
                [
                    TrainedSample(s.sample_id, s.group, len(s.prompt) + len(s.response))
                    for s in make_samples(8, step)
                ],
                pipelines,
                costs,
                roles=ROLES,
                fused=True,
                step=step,
            ).minibatches
        ]
        for step in range(2)
    )
    ours = Job(config, TorchBackend, pipelines, plans, 2)
    wide = msgspec.structs.replace(config.placement, num_devices=2 * tp, tp=tp)
    config = msgspec.structs.replace(config, placement=wide)
    assert pipelines_of(config) == pipelines
    compare(ours, Job(config, MegatronBackend, pipelines, plans, 2 * tp, tmp_path / "state"))


def compare(ours: Job, theirs: Job) -> Weights:
    """The two jobs start and end with the same weights and numbers; the second's weights."""
    before, our_weights, our_metrics = ours.results()
    start, their_weights, their_metrics = theirs.results()
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        assert torch.equal(start[name], before[name]), name
        moved = float((weight - before[name]).abs().max())
        assert moved > 0, name
        assert float((their_weights[name] - weight).abs().max()) < 2e-3 * moved, name
    assert their_metrics.keys() == our_metrics.keys()
    for name, value in our_metrics.items():
        assert their_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    return their_weights


def smooth(config: Config) -> Config:
    """With an epsilon that keeps Adam from blowing up the rounding of tiny gradients."""
    change = msgspec.structs.replace
    optim = change(config.actor.optim, eps=1e-2)
    return change(
        config,
        actor=change(config.actor, optim=optim),
        critic=change(config.critic, optim=optim),
    )
