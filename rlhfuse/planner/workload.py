"""The samples of one typical step, and what is done with them. No tokens, only their numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from rlhfuse.config import Config
from rlhfuse.model_shape import ModelShape, shape_of

_SEED = 20240913


@dataclass(frozen=True, slots=True)
class Workload:
    """One step. `lengths` and `prompts` are tokens per sample, `per_prompt` samples share a prompt;
    `history`: response lengths that the scheduler has seen in earlier steps. `models`: shapes by
    role, of all roles that are trained or scored by a model; `scored`: those run in inference."""

    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    history: tuple[int, ...]
    per_prompt: int
    limit: int
    prompts_per_minibatch: int
    epochs: int
    models: dict[str, ModelShape]
    trained: tuple[str, ...]
    scored: tuple[str, ...]
    described: str  # where the lengths come from

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths) + sum(self.prompts)

    @property
    def num_minibatches(self) -> int:
        """Of the whole step, all epochs."""
        return self.epochs * (len(self.lengths) // self.samples_per_minibatch)

    @property
    def samples_per_minibatch(self) -> int:
        return self.prompts_per_minibatch * self.per_prompt

    @property
    def tokens_per_minibatch(self) -> float:
        return self.tokens * self.epochs / self.num_minibatches

    @property
    def mean_total(self) -> float:
        """Tokens of a sample, prompt and response."""
        return self.tokens / self.num_samples


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of response lengths: lognormal, or recorded numbers drawn again."""

    median: float
    sigma: float
    recorded: tuple[int, ...] = ()

    def draw(self, count: int, limit: int, seed: int) -> tuple[int, ...]:
        """A typical batch: the distribution's quantiles in random order, cut off at `limit`.

        One draw of a heavy tail can be anything; quantiles show every part of it once.
        """
        quantiles = (np.arange(count) + 0.5) / count
        if self.recorded:
            found = np.quantile(np.asarray(self.recorded, dtype=np.float64), quantiles)
        else:
            normal = [NormalDist().inv_cdf(q) for q in quantiles.tolist()]
            found = self.median * np.exp(self.sigma * np.asarray(normal))
        mixed = np.random.default_rng(_SEED + seed).permutation(found)
        return tuple(np.clip(np.rint(mixed), 1, limit).astype(int).tolist())

    def text(self, limit: int) -> str:
        if self.recorded:
            return f"{len(self.recorded)} recorded response lengths, cut off at {limit}"
        p999 = min(limit, self.median * math.exp(3.09 * self.sigma))
        return (
            f"response lengths lognormal, median {self.median:.0f}, sigma {self.sigma:g} "
            f"(99.9 % below {p999:.0f}), cut off at {limit}"
        )


def workload_of(config: Config, recorded: Sequence[int] = (), *, seed: int = 0) -> Workload:
    """The step that a configuration describes. `recorded`: response lengths to draw from.

    Raises:
        ValueError: a model is neither a folder nor a known name.
    """
    plan, limit = config.plan, config.rollout.response_length
    count = config.data.train_batch_size * config.rollout.n
    median = plan.response_median or max(1.0, limit / 6)
    lengths = Lengths(float(median), plan.response_sigma, tuple(recorded))
    mean = plan.prompt_mean or max(1, config.data.max_prompt_length // 2)
    return Workload(
        lengths=lengths.draw(count, limit, seed),
        prompts=(int(mean),) * count,
        history=lengths.draw(min(max(count, 256), 4096), limit, seed + 1),
        per_prompt=config.rollout.n,
        limit=limit,
        prompts_per_minibatch=config.actor.ppo_mini_batch_size,
        epochs=config.actor.ppo_epochs,
        models=models_of(config),
        trained=("actor", "critic") if config.uses_critic else ("actor",),
        scored=config.scored_roles,
        described=lengths.text(limit),
    )


def with_lengths(
    workload: Workload, lengths: Sequence[int], prompts: Sequence[int], history: Sequence[int]
) -> Workload:
    """The same step with samples that are known."""
    return replace(
        workload,
        lengths=tuple(lengths),
        prompts=tuple(prompts),
        history=tuple(history),
        described=f"{len(lengths)} known response lengths",
    )


def models_of(config: Config) -> dict[str, ModelShape]:
    """Shapes by role, of all that are trained or score. Raises ValueError as `shape_of`."""
    models = {"actor": shape_of(config.actor.path)}
    if config.uses_critic:
        models["critic"] = shape_of(config.critic.path)
    if config.uses_reference:
        models["reference"] = shape_of(config.reference.path or config.actor.path)
    if config.reward.path:
        models["reward"] = shape_of(config.reward.path)
    return models
