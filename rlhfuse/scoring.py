"""Forward passes of reference, actor, critic and reward model over finished samples.

What enters a loss must not depend on company: every result here is, bit for bit, what the sample
gives alone, in any batch and under any token budget (CPU, float32, one thread). Attention runs per
sample at its own length, and no matrix product has fewer than 16 rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from rlhfuse.engines.base import SamplingParams, TokenIds
from rlhfuse.engines.sampling import forbid_early_stop, keep
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.replay import replay
from rlhfuse.models.packed import PackedBatch, pack
from rlhfuse.models.stage import Head, ModelStage

Floats = npt.NDArray[np.float32]

# Tokens that are written down for a position, and for a sample (as bytes, with their counts).
_MOST_KEPT = 4096
_MOST_BYTES = 60 << 20


class Tokens(NamedTuple):
    """A finished sample: int32 token ids of prompt (at least one) and response."""

    prompt: TokenIds
    response: TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the sampler kept at each position of a response: how many tokens, int32 [L], and which,
    int32 [sum of counts], end to end."""

    counts: TokenIds
    ids: TokenIds

    @property
    def together(self) -> TokenIds:
        """Counts, then ids."""
        return np.concatenate([self.counts, self.ids])

    @classmethod
    def apart(cls, together: TokenIds, length: int) -> Self:
        """From counts of a response of `length` tokens, then ids."""
        return cls(together[:length], together[length:])


class Replayed(NamedTuple):
    """Log-probabilities of a response under the whole distribution and among what the sampler kept,
    and what that was."""

    logprobs: Floats
    among_kept: Floats
    kept: Kept


@torch.inference_mode()
def token_logprobs(
    model: ModelStage, samples: Sequence[Tokens], *, temperature: float, token_budget: int
) -> list[Floats]:
    """Log-probability of each response token at `temperature` (0, greedy, counts as 1) under the
    full distribution: float32 [response length] per sample. `model` is a whole language model."""
    assert model.head is Head.LM
    results: list[Floats] = []
    for chosen, batch, hidden in _passes(model, samples, token_budget):
        rows, labels = _response_rows(chosen, batch)
        scores = linear_logprob(
            hidden[rows], model.lm_head_weight(), labels, temperature=temperature or 1.0
        )
        results += _per_response(chosen, scores.logprob)
    return results


@torch.inference_mode()
def replayed_logprobs(
    model: ModelStage, samples: Sequence[Tokens], params: SamplingParams, *, token_budget: int
) -> list[Replayed]:
    """`token_logprobs`, and those under the distribution that `params` made of it.

    What top-k, top-p and min-p keep is found again from the logits here, not reported by the
    engine: so it is a function of the sample and the weights alone, for any engine, after any
    migration or loss. At an edge that rounding decides, engine and scorer may differ by the token
    there. At most 4,096 tokens are written down for a position (the likeliest), fewer in a response
    of more than 3,800 tokens.
    """
    results: list[Replayed] = []
    for chosen, batch, hidden in _passes(model, samples, token_budget):
        rows, labels = _response_rows(chosen, batch)
        places = np.concatenate([np.arange(len(sample.response)) for sample in chosen])
        room = [min(_MOST_KEPT, _MOST_BYTES // (4 * max(1, len(s.response))) - 2) for s in chosen]
        most = np.repeat(room, [len(sample.response) for sample in chosen])

        def kept(
            part: slice, logits: torch.Tensor, places: npt.NDArray[np.int64] = places
        ) -> torch.Tensor:
            early = places[part].tolist()
            if params.min_tokens:
                forbid_early_stop(logits, [params] * len(early), early)
            return keep(logits, params)

        found = replay(
            hidden[rows], model.lm_head_weight(), labels, kept,
            most=torch.from_numpy(most).to(labels.device), temperature=params.temperature or 1.0,
        )  # fmt: skip
        counts = found.kept.cu.diff().int().cpu().numpy()
        ids, ends = found.kept.ids.cpu().numpy(), np.cumsum([len(s.response) for s in chosen])
        per_sample = np.split(counts, ends[:-1])
        edges = np.cumsum([own.sum() for own in per_sample])
        lists = zip(per_sample, np.split(ids, edges[:-1]), strict=True)
        results += [
            Replayed(full, among, Kept(own.copy(), which.copy()))
            for full, among, (own, which) in zip(
                _per_response(chosen, found.logprob),
                _per_response(chosen, found.replayed),
                lists,
                strict=True,
            )
        ]
    return results


@torch.inference_mode()
def values(model: ModelStage, samples: Sequence[Tokens], *, token_budget: int) -> list[Floats]:
    """Value of the state before each response token: float32 [response length] per sample."""
    results: list[Floats] = []
    for chosen, batch, hidden in _passes(model, samples, token_budget):
        rows, _ = _response_rows(chosen, batch)
        results += _per_response(chosen, model.values(hidden[rows]))
    return results


@torch.inference_mode()
def rewards(model: ModelStage, samples: Sequence[Tokens], *, token_budget: int) -> list[float]:
    """Score of each sample: the scalar head at its last token."""
    results: list[float] = []
    for _, batch, hidden in _passes(model, samples, token_budget):
        last = batch.cu_seqlens[1:].long() - 1
        results += model.values(hidden[last]).tolist()
    return results


def batches_by_budget(lengths: Sequence[int], token_budget: int) -> list[range]:
    """Consecutive samples in each range, of at most `token_budget` tokens together (or one)."""
    ranges: list[range] = []
    start = held = 0
    for index, length in enumerate(lengths):
        if index > start and held + length > token_budget:
            ranges.append(range(start, index))
            start, held = index, 0
        held += length
    return [*ranges, range(start, len(lengths))] if lengths else []


def _passes(
    model: ModelStage, samples: Sequence[Tokens], token_budget: int
) -> Iterator[tuple[Sequence[Tokens], PackedBatch, torch.Tensor]]:
    """Per batch: its samples, their packing, and the last hidden states [num_tokens, H]."""
    assert model.first
    assert model.last
    device = next(model.parameters()).device
    sequences = [np.concatenate(sample) for sample in samples]
    for chosen in batches_by_budget([len(tokens) for tokens in sequences], token_budget):
        batch = pack([sequences[i] for i in chosen], device)
        yield [samples[i] for i in chosen], batch, model(batch.token_ids, batch)


def _response_rows(
    samples: Sequence[Tokens], batch: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose next token is a response token, and those tokens: two int64 [T]."""
    starts = np.cumsum([0, *batch.lengths])
    rows = [
        np.arange(len(sample.response)) + start + len(sample.prompt) - 1
        for sample, start in zip(samples, starts[:-1], strict=True)
    ]
    indices = torch.from_numpy(np.concatenate(rows)).to(batch.token_ids.device)
    return indices, batch.token_ids[indices + 1]


def _per_response(samples: Sequence[Tokens], flat: torch.Tensor) -> list[Floats]:
    floats = flat.float().cpu().numpy()
    ends = np.cumsum([len(sample.response) for sample in samples])
    return [part.copy() for part in np.split(floats, ends[:-1])]
