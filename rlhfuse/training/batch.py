"""From scored samples to what the losses read: advantages of the whole batch, micro-batches."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from rlhfuse.algorithms.advantages import (
    Advantages,
    TokenRewards,
    batch_stats,
    gae_advantages,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    rloo_advantages,
    sample_returns,
    token_rewards,
)
from rlhfuse.algorithms.mismatch import Correction, importance_weights, mismatch_stats
from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config
from rlhfuse.kernels.reference import KeptTokens
from rlhfuse.models.packed import PackedBatch, pack
from rlhfuse.scoring import Kept
from rlhfuse.training.records import SampleData

Columns = Mapping[str, Mapping[int, torch.Tensor]]
"""Per-token numbers [L] by name and sample id, on the CPU."""

OLD, ROLLOUT, REFERENCE, ADVANTAGES, RETURNS, VALUES, WEIGHTS = (
    "old_logprobs",
    "rollout_logprobs",
    "reference_logprobs",
    "advantages",
    "returns",
    "values",
    "weights",
)


@dataclass(frozen=True, slots=True)
class LossData:
    """What the losses of a whole batch read, and the batch's own metrics. `kept`: what the sampler
    kept of each sample, where log-probabilities are those among it."""

    columns: Columns
    stats: tuple[Stats, ...]
    kept: Mapping[int, Kept] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some samples, packed. T response tokens in all.

    `sample_ids` int64 [N]. `rows` int64 [T]: the row of the packed tokens that predicts each
    response token (the one before it). `labels` int64 [T]: the response tokens. `cu_seqlens` int32
    [N + 1]: responses.
    `kept`: what the sampler kept at each response token.
    """

    packed: PackedBatch
    sample_ids: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    columns: Mapping[str, torch.Tensor]
    kept: KeptTokens | None = None


def make_microbatch(
    samples: Sequence[SampleData],
    data: LossData | None,
    device: torch.device,
    *,
    padded: bool = False,
) -> MicroBatch:
    """Pack (or pad) `samples`; with `data` (ranks that hold the loss) also what the loss reads."""
    tokens = [np.concatenate([s.prompt, s.response]) for s in samples]
    packed = pack(tokens, device, padded=padded)
    offsets = np.cumsum([0, *packed.lengths[:-1]])
    rows = [
        np.arange(offset + len(s.prompt) - 1, offset + len(s.prompt) + len(s.response) - 1)
        for offset, s in zip(offsets, samples, strict=True)
    ]
    columns = {} if data is None else data.columns
    return MicroBatch(
        packed=packed,
        sample_ids=torch.tensor([s.sample_id for s in samples]).to(device),
        rows=torch.from_numpy(np.concatenate(rows)).to(device),
        labels=torch.from_numpy(np.concatenate([s.response for s in samples])).long().to(device),
        cu_seqlens=_bounds(samples).to(device),
        columns={
            name: torch.cat([column[s.sample_id] for s in samples]).to(device)
            for name, column in columns.items()
        },
        kept=None if data is None or not data.kept else _ragged(samples, data.kept, device),
    )


def _ragged(
    samples: Sequence[SampleData], kept: Mapping[int, Kept], device: torch.device
) -> KeptTokens:
    own = [kept[sample.sample_id] for sample in samples]
    counts = np.concatenate([part.counts for part in own], dtype=np.int64)
    ids = torch.from_numpy(np.concatenate([part.ids for part in own]))
    cu = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return KeptTokens(ids.to(device), cu.to(device))


def loss_data(
    config: Config,
    samples: Sequence[SampleData],
    kl_coef: float,
    *,
    truncate: bool,
    later: Collection[int] = (),
) -> LossData:
    """Advantages (and, with `truncate`, importance weights) of a whole batch, on the CPU.

    `later`: samples whose reference log-probabilities come later (`with_reference`): advantages
    must not depend on them, and the batch's metrics are without KL. Where the old
    log-probabilities are the update's own, losses see to the mismatch metrics. Results do not
    depend on the order of the samples: every rank that computes them gets the same bits. Raises
    ValueError where a sample lacks numbers that the algorithm needs.
    """
    cu_seqlens = _bounds(samples)
    scores = torch.tensor([sample.score for sample in samples], dtype=torch.float32)
    own = config.rollout.old_log_probs == "update"
    old = None if own else _joined(samples, OLD, [s.old_logprobs for s in samples])
    rollout = _joined(samples, ROLLOUT, [s.rollout_logprobs for s in samples])
    values = reference = None
    if config.uses_critic:
        values = _joined(samples, VALUES, [s.values for s in samples])
    if config.uses_reference and not later:
        reference = _joined(samples, REFERENCE, [s.reference_logprobs for s in samples])
    missing = later or old is None
    assert not (missing and config.reference_in_rewards), "advantages need the whole KL"
    kept = {s.sample_id: s.kept for s in samples if s.kept is not None}
    full = old  # the reference's are of the whole distribution
    if kept:
        full = _joined(samples, "full_logprobs", [s.full_logprobs for s in samples])
    rewards = token_rewards(
        scores,
        cu_seqlens,
        logprobs=full if reference is not None else None,
        ref_logprobs=reference if full is not None else None,
        kl_coef=kl_coef if config.algorithm.use_kl_in_reward and reference is not None else 0.0,
        kl_estimator=config.algorithm.kl_penalty,
    )
    advantages = _advantages(config, samples, scores, rewards, values, cu_seqlens)
    known = ~rollout.isnan()  # some may have died with the worker that measured them
    stats = [
        batch_stats(
            scores=scores,
            token_rewards=rewards,
            advantages=advantages,
            cu_seqlens=cu_seqlens,
            values=values,
        ),
    ]
    if kept:
        stats.append(_kept_stats(list(kept.values())))
    joined = {ADVANTAGES: advantages.advantages, RETURNS: advantages.returns}
    if old is None:
        joined[ROLLOUT] = rollout
    else:
        joined[OLD] = old
        stats.append(mismatch_stats(rollout[known], old[known]))
    if values is not None:
        joined[VALUES] = values
    if reference is not None:
        joined[REFERENCE] = reference
    if truncate:
        assert old is not None, "importance weights need the old policy before the update"
        corrected = importance_weights(old, rollout, cu_seqlens, correction(config))
        joined[WEIGHTS] = corrected.weights
        stats.append(corrected.stats)
    lengths = [len(sample.response) for sample in samples]
    columns = {
        name: dict(zip([s.sample_id for s in samples], column.split(lengths), strict=True))
        for name, column in joined.items()
    }
    data = LossData(columns, tuple(stats), kept)
    if not later:
        return data
    now = [s for s in samples if s.sample_id not in later]
    return with_reference(data, {s.sample_id: s.reference_logprobs for s in now})


def _kept_stats(kept: Sequence[Kept]) -> Stats:
    """How much of the vocabulary the sampler chose among."""
    counts = torch.from_numpy(np.concatenate([part.counts for part in kept])).double()
    count = counts.new_full((), float(counts.numel()))
    maxima = {"rollout/kept_tokens_max": counts.max()} if counts.numel() else {}
    return Stats({"rollout/kept_tokens_mean": (counts.sum(), count)}, {}, maxima)


def with_reference(data: LossData, found: Mapping[int, npt.NDArray[np.float32] | None]) -> LossData:
    """Also with these reference log-probabilities, by sample. Raises ValueError for a None."""
    missing = sorted(sample_id for sample_id, array in found.items() if array is None)
    if missing:
        raise ValueError(f"sample {missing[0]}: it has no {REFERENCE}")
    column = {i: torch.from_numpy(array) for i, array in found.items() if array is not None}
    known = data.columns.get(REFERENCE, {})
    return replace(data, columns={**data.columns, REFERENCE: {**known, **column}})


def correction(config: Config) -> Correction:
    """The correction for the rollout's log-probabilities that the configuration asks for."""
    algorithm = config.algorithm
    return Correction(
        cap=algorithm.tis_cap,
        level=algorithm.tis_level,
        rule=algorithm.tis_rule,
        floor=algorithm.tis_floor,
    )


def _advantages(
    config: Config,
    samples: Sequence[SampleData],
    scores: torch.Tensor,
    rewards: TokenRewards,
    values: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> Advantages:
    algorithm = config.algorithm
    groups = [sample.group for sample in samples]
    if algorithm.adv_estimator == "gae":
        assert values is not None
        return gae_advantages(
            rewards.rewards,
            values,
            cu_seqlens,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            whiten=algorithm.whiten_advantages,
        )
    if algorithm.adv_estimator == "grpo":
        return grpo_advantages(
            scores, groups, cu_seqlens, normalize_std=algorithm.norm_adv_by_std_in_grpo
        )
    if algorithm.adv_estimator == "rloo":
        return rloo_advantages(sample_returns(rewards.rewards, cu_seqlens), groups, cu_seqlens)
    return reinforce_plus_plus_advantages(
        rewards.rewards, cu_seqlens, gamma=algorithm.gamma, whiten=algorithm.whiten_advantages
    )


def _bounds(samples: Sequence[SampleData]) -> torch.Tensor:
    lengths = [0, *(len(sample.response) for sample in samples)]
    return torch.tensor(lengths, dtype=torch.int64).cumsum(0).to(torch.int32)


def _joined(
    samples: Sequence[SampleData], name: str, arrays: Sequence[npt.NDArray[np.float32] | None]
) -> torch.Tensor:
    """One number per response token of all samples [T]."""
    kept = []
    for sample, array in zip(samples, arrays, strict=True):
        if array is None or len(array) != len(sample.response):
            have = "none" if array is None else len(array)
            raise ValueError(
                f"sample {sample.sample_id}: {len(sample.response)} response tokens but "
                f"{have} {name}"
            )
        kept.append(array)
    return torch.from_numpy(np.concatenate(kept))
