"""A PPO update is the same however it is cut, or scheduled, and stops on NaN."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhfuse.algorithms.tally import named
from rlhfuse.config import AlgorithmConfig
from rlhfuse.kernels import rows
from rlhfuse.placement import StagePlacement
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule
from rlhfuse.timeline import Kind
from rlhfuse.training.failure import StepFailed
from rlhfuse.training.numbers import Numbers
from rlhfuse.training.records import (
    MiniBatchPlan,
    NonFiniteLoss,
    SampleData,
)
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.update import RankTrainer
from tests.training.ranks import run_ranks, stay_until_the_other_ended
from tests.training.tiny_update import (
    KL_COEF,
    Digests,
    Models,
    cut,
    digests,
    first_moments,
    make_config,
    make_placement,
    make_plans,
    make_problem,
    make_samples,
    make_trainer,
    one_update,
    plain_update,
    save_models,
    serial_rounds,
    two_updates,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("tied"), tied=True)


def test_the_update_is_that_of_the_kernels_definitions(
    tied: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "COMPILED_VOCAB", 1)  # compiled code also for these few tokens
    found = []
    for kernels in ("auto", "reference"):
        monkeypatch.setenv("RLHFUSE_KERNELS", kernels)
        metrics = one_update(make_config(tied), 1, tmp_path / kernels)
        moments = [first_moments(tmp_path / kernels, role) for role in ("actor", "critic")]
        found.append((metrics, moments))
    (fast, fast_moments), (plain, plain_moments) = found
    for name in (n for n in plain if n.startswith(("actor/", "critic/"))):
        assert fast[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-6), name
    for ours, theirs in zip(fast_moments, plain_moments, strict=True):
        assert ours.keys() == theirs.keys()
        for name, moment in theirs.items():
            assert float((ours[name] - moment).norm()) <= 1e-5 * float(moment.norm()), name
    assert any(
        not torch.equal(fast_moments[0][name], moment) for name, moment in plain_moments[0].items()
    )  # two computations, not one


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


def test_models_may_have_different_numbers_of_stages(models: Models) -> None:
    config = make_config(models)
    samples = make_samples(8)
    one = make_placement(1)["critic"].layers
    pipelines = {"actor": make_placement(2)["actor"], "critic": StagePlacement((1,), one)}
    problem = Problem(
        2, (Pipeline.make("actor", (0, 1), 2, 1, 2), Pipeline.make("critic", (1,), 2, 2, 4))
    )
    plans = make_plans(cut(samples, 1, 2), (fuse(problem, iterations=5),))

    def run(rank: int) -> dict[str, float]:
        return named(
            make_trainer(config, rank, 2, pipelines).update(0, samples, plans, KL_COEF, [])
        )

    metrics = {k: v for result in run_ranks(2, run) for k, v in result.items()}
    plain = plain_update(config, samples)
    assert metrics["critic/vf_loss"] == pytest.approx(plain.loss["critic"], rel=1e-5)
    for role in ("actor", "critic"):
        squares = sum(float(g.double().square().sum()) for g in plain.gradients[role].values())
        assert metrics[f"{role}/grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


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


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("biased"), actor="qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_split_backward_and_recomputation_change_no_bit(
    bias: bool, models: Models, biased: Models
) -> None:
    models = biased if bias else models
    problem = make_problem(2, 3)
    serial, *_ = two_updates(make_config(models), 2, serial_rounds(problem), 3)
    split = fuse(problem, iterations=20, split_weight=True)
    assert any(task.op is Op.W for row in split.rows for task in row)
    apart, *_ = two_updates(make_config(models, split_weight=True), 2, (split,), 3)
    assert apart == serial
    config = make_config(models, split_weight=True, recompute=True)
    assert two_updates(config, 2, (split,), 3)[0] == serial


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
        metrics = named(trainer.update(0, samples, plans, KL_COEF, []))
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


def test_gradients_do_not_depend_on_the_cut_into_microbatches(
    models: Models, tmp_path: Path
) -> None:
    config = make_config(models)
    samples = make_samples(8)
    moments = []
    for count in (1, 4):
        rounds = serial_rounds(make_problem(1, count))
        folder = tmp_path / str(count)

        def run(
            rank: int,
            count: int = count,
            rounds: tuple[Schedule, ...] = rounds,
            folder: Path = folder,
        ) -> None:
            trainer = make_trainer(config, rank, 1)
            trainer.update(0, samples, make_plans(cut(samples, 1, count), rounds), KL_COEF, [])
            trainer.save(folder)

        run_ranks(1, run)
        moments.append(first_moments(folder, "actor"))
    for name, whole in moments[0].items():
        largest = float(whole.abs().max())
        assert torch.allclose(moments[1][name], whole, rtol=1e-4, atol=2e-5 * largest), name


def test_padded_batches_give_the_gradients_of_packed_ones(models: Models, tmp_path: Path) -> None:
    config = make_config(models)
    padded = msgspec.structs.replace(
        config,
        actor=msgspec.structs.replace(config.actor, use_remove_padding=False),
        critic=msgspec.structs.replace(config.critic, use_remove_padding=False),
    )
    metrics = [one_update(c, 2, tmp_path / str(i)) for i, c in enumerate((config, padded))]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5, abs=1e-7)
    for role in ("actor", "critic"):
        packed = first_moments(tmp_path / "0", role)
        found = first_moments(tmp_path / "1", role)
        for name, expected in packed.items():
            largest = float(expected.abs().max())
            assert torch.allclose(found[name], expected, rtol=1e-4, atol=2e-5 * largest), name


def test_the_update_s_own_old_logprobs_give_the_update_of_recomputed_ones(
    models: Models, tmp_path: Path
) -> None:
    config = make_config(models)
    config = msgspec.structs.replace(config, algorithm=AlgorithmConfig(use_kl_in_reward=False))
    own = msgspec.structs.replace(
        config, rollout=msgspec.structs.replace(config.rollout, old_log_probs="update")
    )
    actor = AutoModelForCausalLM.from_pretrained(config.actor.path).float()
    samples = []
    for sample in make_samples(8):
        tokens = torch.from_numpy(np.concatenate([sample.prompt, sample.response])).long()
        logits = actor(tokens[None]).logits[0, len(sample.prompt) - 1 : -1]
        logprobs = (logits / config.rollout.temperature).log_softmax(-1).detach()
        old = logprobs.gather(1, tokens[len(sample.prompt) :, None])[:, 0].numpy()
        samples.append(replace(sample, old_logprobs=old))
    scored = one_update(config, 2, tmp_path / "scored", samples=samples)
    nothing = [replace(s, old_logprobs=np.zeros(0, np.float32)) for s in samples]
    found = one_update(own, 2, tmp_path / "own", samples=nothing)
    known = set(scored) - {"actor/reward_kl_penalty", "critic/kl"}
    assert {name: found[name] for name in known} == pytest.approx(
        {name: scored[name] for name in known}, rel=1e-4, abs=1e-6
    )
    assert found["actor/ratio_max"] == 1.0
    for role in ("actor", "critic"):
        expected, moments = (first_moments(tmp_path / name, role) for name in ("scored", "own"))
        for name, moment in expected.items():
            allowed = 2e-5 * float(moment.abs().max())
            assert torch.allclose(moments[name], moment, rtol=1e-4, atol=allowed), name


def test_a_rank_that_fails_between_tasks_and_step_ends_all_ranks_at_once(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the others wait for its numbers; and it is not its end that tells them."""
    samples = make_samples(8)
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(2, 2)))
    numbers = TorchBackend.numbers

    def run(rank: int) -> tuple[str, bool]:
        def failing(self: TorchBackend, roles: Sequence[str]) -> dict[str, Numbers]:
            if rank == 0:
                return numbers(self, roles)
            time.sleep(0.3)
            raise ArithmeticError("the norm broke")

        monkeypatch.setattr(TorchBackend, "numbers", failing)
        trainer = make_trainer(make_config(models), rank, 2)
        before = digests(trainer)
        with pytest.raises(StepFailed) as caught:
            trainer.update(3, samples, plans, KL_COEF, [])
        stay_until_the_other_ended(rank, 1 - rank)
        return str(caught.value), digests(trainer) == before

    for rank, (message, unchanged) in enumerate(run_ranks(2, run)):
        assert "rank 1 failed in step 3: ArithmeticError: the norm broke" in message
        assert message.startswith("rank 1 failed" if rank else "rank 0 stopped in step 3, because")
        assert unchanged


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus"])
def test_critic_free_algorithms_train_the_actor_alone(
    estimator: Literal["grpo", "rloo", "reinforce_plus_plus"], models: Models
) -> None:
    config = make_config(models)
    config = msgspec.structs.replace(
        config,
        actor=msgspec.structs.replace(config.actor, use_kl_loss=True),
        algorithm=AlgorithmConfig(adv_estimator=estimator, use_kl_in_reward=False, tis="on"),
    )
    samples = [replace(sample, values=None) for sample in make_samples(8)]
    rounds = serial_rounds(make_problem(2, 2))[:1]
    plans = [MiniBatchPlan({"actor": c}, rounds) for c in cut(samples, 2, 2)]
    pipelines = {"actor": make_placement(2)["actor"]}

    def run(rank: int) -> tuple[Digests, dict[str, float]]:
        trainer = RankTrainer(
            config,
            rank=rank,
            world_size=2,
            pipelines=pipelines,
            device=torch.device("cpu"),
            dtype=torch.float32,
            total_steps=10,
        )
        before = trainer.digest("actor")
        metrics = named(trainer.update(0, samples, plans, KL_COEF, []))
        after = trainer.digest("actor")
        assert all(before[name] != after[name] for name in before)
        return after, metrics

    metrics = run_ranks(2, run)[1][1]
    assert metrics["actor/kl_loss"] > 0
    assert 0 < metrics["rollout_corr/rollout_is_mean"] <= 2
    assert "critic/vf_loss" not in metrics
