"""Forward passes of reference, actor, critic and reward model over finished samples.

What enters a loss must not depend on company: every result here is, bit for bit, what the sample
gives alone, in any batch and under any token budget (CPU, float32, one thread). Attention runs per
sample at its own length, and no matrix product has fewer than 16 rows.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rlhfuse.engines.base import TokenIds
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.models.packed import PackedBatch, pack
from rlhfuse.models.stage import Head, ModelStage

Floats = npt.NDArray[np.float32]


class Tokens(NamedTuple):
    """A finished sample: int32 token ids of prompt (at least one) and response."""

    prompt: TokenIds
    response: TokenIds


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
