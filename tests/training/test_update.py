"""A PPO update is the same however it is cut, scheduled, interrupted; and stops on NaN."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhfuse.config import Config
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Schedule
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.training.update import RankTrainer
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    Models,
    cut,
    make_config,
    make_placement,
    make_plans,
    make_problem,
    make_samples,
    plain_update,
    save_models,
    serial_rounds,
)

Digests = dict[str, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("tied"), tied=True)


def make_trainer(config: Config, rank: int, num_ranks: int) -> RankTrainer:
    return RankTrainer(
        config,
        rank=rank,
        world_size=num_ranks,
        placement=make_placement(num_ranks),
        device=torch.device("cpu"),
        dtype=torch.float32,
        total_steps=10,
    )


def digests(trainer: RankTrainer) -> Digests:
    return {
        f"{role}/{name}": digest
        for role in ("actor", "critic")
        for name, digest in trainer.digest(role).items()
    }


def two_updates(
    config: Config, num_ranks: int, rounds: tuple[Schedule, ...], num_microbatches: int = 2
) -> tuple[Digests, dict[str, float], list[Span]]:
    """All ranks' digests and metrics after two updates of two mini-batches."""
    batches = [make_samples(8, seed) for seed in (0, 1)]

    def run(rank: int) -> tuple[Digests, dict[str, float], list[Span]]:
        trainer = make_trainer(config, rank, num_ranks)
        spans: list[Span] = []
        metrics: dict[str, float] = {}
        for step, samples in enumerate(batches):
            plans = make_plans(cut(samples, 2, num_microbatches), rounds)
            metrics = trainer.update(step, samples, plans, KL_COEF, spans)
        return digests(trainer), metrics, spans

    results = run_ranks(num_ranks, run)
    together = {k: v for result in results for k, v in result[0].items()}
    metrics = {k: v for result in results for k, v in result[1].items()}
    return together, metrics, [span for result in results for span in result[2]]


def one_update(config: Config, num_ranks: int, folder: Path) -> dict[str, float]:
    """One mini-batch, and a checkpoint of what it did. Returns all metrics."""
    samples = make_samples(8)
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(num_ranks, 2)))

    def run(rank: int) -> dict[str, float]:
        trainer = make_trainer(config, rank, num_ranks)
        metrics = trainer.update(0, samples, plans, KL_COEF, [])
        trainer.save(folder)
        return metrics

    return {k: v for metrics in run_ranks(num_ranks, run) for k, v in metrics.items()}


def first_moments(folder: Path, role: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("exp_avg/"): tensor
        for path in sorted((folder / role).glob("stage_*.safetensors"))
        for name, tensor in load_file(path).items()
        if name.startswith("exp_avg/")
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_losses_and_gradients_are_those_of_a_plain_loop_over_unsplit_models(
    num_ranks: int, tie: bool, models: Models, tied: Models, tmp_path: Path
) -> None:
    config = make_config(tied if tie else models)
    metrics = one_update(config, num_ranks, tmp_path)
    plain = plain_update(config, make_samples(8))
    assert metrics["critic/vf_loss"] == pytest.approx(plain.loss["critic"], rel=1e-5)
    total = metrics["actor/pg_loss"] - config.actor.entropy_coeff * metrics["actor/entropy"]
    assert total == pytest.approx(plain.loss["actor"], rel=1e-5)
    for role in ("actor", "critic"):
        expected = plain.gradients[role]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
        assert metrics[f"{role}/grad_norm"] == pytest.approx(norm, rel=1e-5)
        moments = first_moments(tmp_path, role)
        clip = min(1.0, config.actor.optim.clip_grad / norm)
        assert set(expected) <= set(moments)
        for name, gradient in expected.items():
            # Float32 rounding, over sums of a few hundred terms.
            largest = float(gradient.abs().max())
            assert torch.allclose(
                moments[name] / (0.1 * clip), gradient, rtol=1e-4, atol=2e-5 * largest + 1e-9
            ), name


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fused_updates_equal_serial_updates_bit_for_bit(num_ranks: int, models: Models) -> None:
    problem = make_problem(num_ranks, 2)
    serial, serial_metrics, _ = two_updates(make_config(models), num_ranks, serial_rounds(problem))
    fused = fuse(problem, iterations=20)
    interleaved, metrics, spans = two_updates(make_config(models), num_ranks, (fused,))
    assert interleaved == serial
    assert metrics == serial_metrics
    tasks = [span for span in spans if span.kind in (Kind.F, Kind.B)]
    assert len(tasks) == 2 * 2 * 2 * 2 * 2 * num_ranks  # updates, mini-batches, roles, mbs, F and B


def test_split_backward_and_recomputation_change_no_bit(models: Models) -> None:
    problem = make_problem(2, 3)
    serial, *_ = two_updates(make_config(models), 2, serial_rounds(problem), 3)
    split = fuse(problem, iterations=20, split_weight=True)
    assert any(task.op is Op.W for row in split.rows for task in row)
    apart, *_ = two_updates(make_config(models, split_weight=True), 2, (split,), 3)
    assert apart == serial
    config = make_config(models, split_weight=True, recompute=True)
    assert two_updates(config, 2, (split,), 3)[0] == serial


@pytest.mark.parametrize("tie", [False, True])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    tie: bool, models: Models, tied: Models, tmp_path: Path
) -> None:
    config = make_config(tied if tie else models)
    rounds = serial_rounds(make_problem(2, 2))
    expected, *_ = two_updates(config, 2, rounds)
    first, second = make_samples(8, 0), make_samples(8, 1)

    def begin(rank: int) -> None:
        trainer = make_trainer(config, rank, 2)
        trainer.update(0, first, make_plans(cut(first, 2, 2), rounds), KL_COEF, [])
        trainer.save(tmp_path)

    def go_on(rank: int) -> Digests:
        trainer = make_trainer(config, rank, 2)
        trainer.load(tmp_path)
        trainer.update(1, second, make_plans(cut(second, 2, 2), rounds), KL_COEF, [])
        return digests(trainer)

    run_ranks(2, begin)
    results = run_ranks(2, go_on)
    assert {k: v for result in results for k, v in result.items()} == expected


def test_a_checkpoint_loads_into_other_stages_and_exports_to_transformers(
    tied: Models, tmp_path: Path
) -> None:
    config = make_config(tied)
    one_update(config, 2, tmp_path / "saved")

    def load(rank: int) -> Digests:
        trainer = make_trainer(config, rank, 4)
        trainer.load(tmp_path / "saved")
        trainer.save(tmp_path / "again")
        trainer.export_hf(tmp_path / "actor", "actor")
        return digests(trainer)

    found = {k: v for result in run_ranks(4, load) for k, v in result.items()}
    names = {name: role for name in found for role in [name.split("/")[0]]}
    assert set(names.values()) == {"actor", "critic"}
    before, after = (first_moments(tmp_path / run, "actor") for run in ("saved", "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    saved = {
        name: tensor
        for stage in range(2)
        for name, tensor in load_file(
            tmp_path / "saved" / "actor" / f"stage_{stage}.safetensors"
        ).items()
    }
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, saved[f"weight/{name}"]), name


def test_damaged_checkpoints_are_refused(models: Models, tmp_path: Path) -> None:
    config = make_config(models)
    one_update(config, 1, tmp_path)
    path = tmp_path / "critic" / "stage_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

    def load(rank: int) -> str:
        with pytest.raises(ValueError, match="is damaged") as caught:
            make_trainer(config, rank, 1).load(tmp_path)
        return str(caught.value)

    assert str(path) in run_ranks(1, load)[0]


def spoilt(samples: Sequence[SampleData]) -> list[SampleData]:
    """The third sample's values are NaN: the critic's loss will be."""
    wrong = np.full_like(samples[2].response, np.nan, dtype=np.float32)
    return [replace(s, values=wrong) if i == 2 else s for i, s in enumerate(samples)]


def test_nan_stops_all_ranks_before_anything_changes(models: Models) -> None:
    config = make_config(models)
    samples = spoilt(make_samples(8))
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(2, 2)))

    def run(rank: int) -> tuple[str, bool, bool]:
        trainer = make_trainer(config, rank, 2)
        before = digests(trainer)
        with pytest.raises(NonFiniteLoss) as caught:
            trainer.update(7, samples, plans, KL_COEF, [])
        unchanged = digests(trainer) == before
        good = make_samples(8)
        trainer.update(8, good, make_plans(cut(good, 1, 2), plans[0].rounds), KL_COEF, [])
        return str(caught.value), unchanged, digests(trainer) != before

    for message, unchanged, went_on in run_ranks(2, run):
        assert "step 7, mini-batch 0" in message
        assert unchanged
        assert went_on


def test_critic_warm_up_leaves_the_actor_alone(models: Models) -> None:
    config = make_config(models)
    samples = make_samples(8)
    critic_round = serial_rounds(make_problem(2, 2))[1]
    plans = [MiniBatchPlan({"critic": c}, (critic_round,)) for c in cut(samples, 2, 2)]

    def run(rank: int) -> tuple[bool, bool, dict[str, float]]:
        trainer = make_trainer(config, rank, 2)
        before = {role: trainer.digest(role) for role in ("actor", "critic")}
        metrics = trainer.update(0, samples, plans, KL_COEF, [])
        after = {role: trainer.digest(role) for role in ("actor", "critic")}
        return before["actor"] == after["actor"], before["critic"] != after["critic"], metrics

    results = run_ranks(2, run)
    assert all(same and moved for same, moved, _ in results)
    assert "critic/vf_loss" in results[0][2]
    assert "critic/rewards/mean" in results[1][2]


def test_a_sample_without_values_fails_on_all_ranks_and_is_named(models: Models) -> None:
    config = make_config(models)
    samples = [replace(s, values=None) if s.sample_id == 103 else s for s in make_samples(8)]
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(2, 2)))

    def run(rank: int) -> str:
        trainer = make_trainer(config, rank, 2)
        with pytest.raises(RuntimeError) as caught:
            trainer.update(0, samples, plans, KL_COEF, [])
        return str(caught.value)

    assert all("sample 103: " in message for message in run_ranks(2, run))
