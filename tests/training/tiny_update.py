"""A tiny PPO update: models, samples and plans, and the same update as a plain PyTorch loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfuse.algorithms.tally import named
from rlhfuse.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    CriticConfig,
    FusionConfig,
    OptimConfig,
    RolloutConfig,
    TrainerConfig,
)
from rlhfuse.models.partition import partition
from rlhfuse.models.stage import Head
from rlhfuse.placement import StagePlacement
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.timeline import Span
from rlhfuse.training.records import MiniBatchPlan, SampleData
from rlhfuse.training.update import RankTrainer
from tests.models.tiny import save_tiny
from tests.training.ranks import run_ranks

VOCABULARY = 211
KL_COEF = 0.1
Microbatches = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Models:
    actor: Path
    critic: Path


def save_models(
    folder: Path, *, tied: bool = False, width: int = 101, actor: str = "llama"
) -> Models:
    models = Models(folder / "actor", folder / "critic")
    save_tiny(models.actor, actor, tied=tied, seed=1, width=width)
    save_tiny(models.critic, "qwen3", head=Head.SCALAR, seed=2, width=width)
    return models


def make_config(
    models: Models, *, split_weight: bool = False, recompute: bool = False, lr: float = 1e-3
) -> Config:
    optim = OptimConfig(lr=lr, clip_grad=0.5, weight_decay=0.1, lr_warmup_steps=1)
    return Config(
        actor=ActorConfig(
            path=str(models.actor),
            optim=optim,
            entropy_coeff=0.01,
            gradient_checkpointing=recompute,
        ),
        critic=CriticConfig(path=str(models.critic), optim=optim),
        algorithm=AlgorithmConfig(lam=0.9, gamma=0.99),
        rollout=RolloutConfig(temperature=0.7),
        fusion=FusionConfig(split_weight=split_weight),
        trainer=TrainerConfig(wait_timeout_s=20.0),
    )


def make_samples(count: int, seed: int = 0) -> list[SampleData]:
    rng = np.random.default_rng(seed)

    def floats(length: int, mean: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        drawn: np.ndarray[tuple[int], np.dtype[np.float32]] = rng.normal(mean, 0.3, length).astype(
            np.float32
        )
        return drawn

    samples = []
    for index in range(count):
        length = int(rng.integers(1, 30))
        samples.append(
            SampleData(
                sample_id=100 + index,
                group=index // 2,
                prompt=rng.integers(1, VOCABULARY, rng.integers(2, 9), dtype=np.int32),
                response=rng.integers(1, VOCABULARY, length, dtype=np.int32),
                score=float(rng.normal()),
                old_logprobs=floats(length, -5.0),
                rollout_logprobs=floats(length, -5.0),
                reference_logprobs=floats(length, -5.0),
                values=floats(length, 0.0),
            )
        )
    return samples


def make_placement(num_ranks: int) -> dict[str, StagePlacement]:
    layers = tuple((r.start, r.stop) for r in partition(4, num_ranks, layer_cost=1.0))
    return {
        "actor": StagePlacement(tuple(range(num_ranks)), layers),
        "critic": StagePlacement(tuple(range(num_ranks))[::-1], layers),
    }


def cut(
    samples: Sequence[SampleData], num_minibatches: int, num_microbatches: int
) -> list[Microbatches]:
    ids = [sample.sample_id for sample in samples]
    size = len(ids) // num_minibatches
    parts = [ids[i * size : (i + 1) * size] for i in range(num_minibatches)]
    return [
        tuple(tuple(part[m::num_microbatches]) for m in range(num_microbatches)) for part in parts
    ]


def make_problem(num_ranks: int, num_microbatches: int) -> Problem:
    ranks = range(num_ranks)
    return Problem(
        num_ranks,
        (
            Pipeline.make("actor", ranks, num_microbatches, 1, 2, weight=1),
            Pipeline.make("critic", ranks[::-1], num_microbatches, 1, 2, weight=1),
        ),
    )


def serial_rounds(problem: Problem) -> tuple[Schedule, ...]:
    return tuple(one_f_one_b(Problem(problem.num_ranks, (p,))) for p in problem.pipelines)


def make_plans(cuts: Sequence[Microbatches], rounds: tuple[Schedule, ...]) -> list[MiniBatchPlan]:
    return [MiniBatchPlan({"actor": c, "critic": c}, rounds) for c in cuts]


@dataclass(frozen=True)
class Plain:
    """What one mini-batch gives in a plain loop: losses, and gradients by name."""

    loss: Mapping[str, float]
    gradients: Mapping[str, Mapping[str, torch.Tensor]]


def plain_update(config: Config, samples: Sequence[SampleData]) -> Plain:
    """One mini-batch of all samples, each run alone through transformers' own whole model."""
    targets = _targets(config, samples)
    num_tokens = sum(len(sample.response) for sample in samples)
    actor = AutoModelForCausalLM.from_pretrained(config.actor.path).float()
    critic = AutoModelForSequenceClassification.from_pretrained(config.critic.path).float()
    pg_loss = vf_loss = torch.zeros(())
    for sample, (advantages, returns) in zip(samples, targets, strict=True):
        tokens = torch.from_numpy(np.concatenate([sample.prompt, sample.response])).long()[None]
        span = slice(len(sample.prompt) - 1, -1)
        log_probs = (actor(tokens).logits[0, span] / config.rollout.temperature).log_softmax(-1)
        labels = tokens[0, len(sample.prompt) :, None]
        ratio = (log_probs.gather(1, labels)[:, 0] - torch.from_numpy(sample.old_logprobs)).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
        bounded = torch.minimum(surrogate, -advantages * config.actor.clip_ratio_c)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        pg_loss = pg_loss + (surrogate - config.actor.entropy_coeff * entropy).sum()
        values = critic.score(critic.model(tokens).last_hidden_state)[0, span, 0]
        old, clip = torch.from_numpy(sample.values), config.critic.cliprange_value
        clipped = old + (values - old).clamp(-clip, clip)
        errors = torch.maximum((values - returns).square(), (clipped - returns).square())
        vf_loss = vf_loss + 0.5 * errors.sum()
    losses = {"actor": pg_loss / num_tokens, "critic": vf_loss / num_tokens}
    gradients = {}
    for role, model in (("actor", actor), ("critic", critic)):
        losses[role].backward()
        gradients[role] = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return Plain({role: float(loss.detach()) for role, loss in losses.items()}, gradients)


def _targets(
    config: Config, samples: Sequence[SampleData]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Whitened advantages and returns of each sample: GAE by its definition."""
    algorithm = config.algorithm
    unwhitened = []
    for sample in samples:
        assert sample.values is not None
        assert sample.reference_logprobs is not None
        rewards = -KL_COEF * (sample.old_logprobs - sample.reference_logprobs).astype(np.float64)
        rewards[-1] += sample.score
        following = np.append(sample.values[1:], 0.0)
        advantage, found = 0.0, []
        for reward, value, after in zip(
            rewards[::-1], sample.values[::-1], following[::-1], strict=True
        ):
            delta = reward + algorithm.gamma * after - value
            advantage = delta + algorithm.gamma * algorithm.lam * advantage
            found.append(advantage)
        unwhitened.append(torch.tensor(found[::-1]))
    everything = torch.cat(unwhitened).double()
    mean, std = everything.mean(), everything.std()
    return [
        (((a - mean) / (std + 1e-8)).float(), a + torch.from_numpy(s.values))
        for a, s in zip(unwhitened, samples, strict=True)
    ]


Digests = dict[str, str]


def make_trainer(
    config: Config,
    rank: int,
    num_ranks: int,
    pipelines: Mapping[str, StagePlacement] | None = None,
) -> RankTrainer:
    return RankTrainer(
        config,
        rank=rank,
        world_size=num_ranks,
        pipelines=pipelines or make_placement(num_ranks),
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
            metrics = named(trainer.update(step, samples, plans, KL_COEF, spans))
        return digests(trainer), metrics, spans

    results = run_ranks(num_ranks, run)
    together = {k: v for result in results for k, v in result[0].items()}
    metrics = {k: v for result in results for k, v in result[1].items()}
    return together, metrics, [span for result in results for span in result[2]]


def one_update(
    config: Config,
    num_ranks: int,
    folder: Path,
    num_microbatches: int = 2,
    samples: Sequence[SampleData] | None = None,
) -> dict[str, float]:
    """One mini-batch, and a checkpoint of what it did. Returns all metrics."""
    samples = samples or make_samples(8)
    rounds = serial_rounds(make_problem(num_ranks, num_microbatches))
    plans = make_plans(cut(samples, 1, num_microbatches), rounds)

    def run(rank: int) -> dict[str, float]:
        trainer = make_trainer(config, rank, num_ranks)
        metrics = named(trainer.update(0, samples, plans, KL_COEF, []))
        trainer.save(folder)
        return metrics

    return {k: v for metrics in run_ranks(num_ranks, run) for k, v in metrics.items()}


def first_moments(folder: Path, role: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("exp_avg/"): tensor
        for path in sorted((folder / role).glob("*stage_*.safetensors"))
        for name, tensor in load_file(path).items()
        if name.startswith("exp_avg/")
    }
