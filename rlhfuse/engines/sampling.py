"""Position-keyed sampling: a token depends on (seed, position, logits) and on nothing else.

Gumbel-max: the token is the argmax of ``logits / temperature + noise``, where the noise of every
vocabulary entry is a function of the sample's seed and the token's position in the sequence. So a
sample that moves, or starts again elsewhere, is drawn the same. What is left is the rounding of
the logits, which depends on the batch: draws that rounding could have turned are flagged, and
`rlhfuse.engines.canonical` decides them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from rlhfuse.engines.base import SamplingParams, TokenIds
from rlhfuse.kernels.keyed import row_bits, row_keys, signed

NEAR_TIE = 1e-3
"""Largest noise in float32 logits that cannot turn a draw without its being flagged; observed
noise is about a hundredth of it."""


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float64 [rows, vocab_size], from int64 `seeds` and `positions`
    [rows]. The same on every device, to the last bits of the logarithm.

    Each row is SplitMix64 started from a hash of (seed, position); `position` is the index of the
    token to be drawn in the whole sequence, prompt included.
    """
    bits = row_bits(row_keys(seeds, positions), vocab_size)
    # 52 bits and a half: never 0, never 1, exact.
    bits = (bits >> 12).bitwise_and_((1 << 52) - 1)
    uniform = bits.to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


@dataclass(frozen=True, slots=True, eq=False)
class RowParams:
    """Sampling parameters of a batch, one row each (tensors [rows])."""

    seeds: torch.Tensor
    temperature: torch.Tensor  # 1 for greedy rows
    noise_scale: torch.Tensor  # 0 for greedy rows, else 1
    top_k: torch.Tensor  # vocabulary size where off
    top_p: torch.Tensor
    min_p: torch.Tensor
    slope: torch.Tensor  # most that noise in a logit grows by a penalty
    truncates: bool

    @classmethod
    def of(
        cls,
        seeds: Sequence[int],
        params: Sequence[SamplingParams],
        *,
        vocab_size: int,
        device: torch.device | str,
    ) -> Self:
        """Columns from one `SamplingParams` a row."""
        columns = torch.tensor(
            [
                (
                    p.temperature or 1.0,
                    float(p.temperature > 0),
                    min(p.top_k or vocab_size, vocab_size),
                    p.top_p,
                    p.min_p,
                    max(p.repetition_penalty, 1 / p.repetition_penalty),
                )
                for p in params
            ],
            dtype=torch.float64,
            device=device,
        ).unbind(1)
        return cls(
            seeds=torch.tensor([signed(s) for s in seeds], dtype=torch.int64, device=device),
            temperature=columns[0],
            noise_scale=columns[1],
            top_k=columns[2].long(),
            top_p=columns[3],
            min_p=columns[4],
            slope=columns[5],
            truncates=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """tokens int64 [rows]; logprobs [rows] under the truncated, temperature-scaled distribution
    (greedy: under that at temperature 1); near_ties bool [rows]: to be decided canonically."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    near_ties: torch.Tensor


def draw(
    logits: torch.Tensor, positions: torch.Tensor, rows: RowParams, *, near_tie: float = NEAR_TIE
) -> Draw:
    """Draw one token per row from logits [rows, V] (float32 or float64; -inf forbids a token),
    after `forbid_early_stop` and `penalise`.

    `near_tie` bounds the noise that the logits had before; with 0 they are taken at their word.
    """
    dtype = logits.dtype
    scaled = logits / rows.temperature.to(dtype)[:, None]
    noise = gumbel(rows.seeds, positions, logits.shape[1]) * rows.noise_scale[:, None]
    noisy = scaled + noise.to(dtype)
    bound = near_tie * (rows.slope / rows.temperature).to(dtype)
    certain = None
    if rows.truncates:
        certain, kept, possible = _truncate(scaled, rows, bound)
        noisy = noisy.masked_fill_(~possible, -math.inf)
        normaliser = scaled.masked_fill(~kept, -math.inf).logsumexp(-1)
    else:
        normaliser = scaled.logsumexp(-1)
    best = noisy.topk(2, dim=-1)
    winners = best.indices[:, :1]
    near_ties = best.values[:, 0] - best.values[:, 1] < bound
    if certain is not None:
        near_ties |= ~certain.gather(1, winners)[:, 0]
    logprobs = scaled.gather(1, winners)[:, 0] - normaliser
    return Draw(tokens=winners[:, 0], logprobs=logprobs, near_ties=near_ties)


def keep(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which tokens a draw from logits [rows, V] with these parameters chooses among: bool
    [rows, V], the same for the same logits."""
    count, vocab_size = logits.shape
    rows = RowParams.of([0] * count, [params] * count, vocab_size=vocab_size, device=logits.device)
    scaled = logits / rows.temperature.to(logits.dtype)[:, None]
    return _truncate(scaled, rows, torch.zeros_like(rows.top_p, dtype=logits.dtype))[1]


def _truncate(
    scaled: torch.Tensor, rows: RowParams, bound: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks [rows, V] of the tokens that top-k, top-p and min-p keep: for certain, as the numbers
    stand, and possibly, where each scaled logit may be wrong by up to `bound` [rows].

    Top-k keeps what is no less likely than the k-th token; top-p, on what top-k keeps, a token if
    strictly likelier ones have less than `top_p` together; min-p what is at least `min_p` times as
    likely as the likeliest.
    """
    bound = bound[:, None]
    ordered = _descending(scaled)
    top_k = rows.top_k[:, None]
    kth, after_kth = _edge(ordered, top_k)
    masses = ordered.masked_fill(ordered < kth, -math.inf).softmax(-1)
    # Of all likelier ones; it never falls, so that edges are found by bisection.
    before = torch.nn.functional.pad(masses.cumsum(-1)[:, :-1], (1, 0))
    top_p = rows.top_p.to(scaled.dtype)[:, None]
    top_p = top_p.masked_fill(top_p >= 1, math.inf)  # rounding must not cut a full distribution

    def nucleus(mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _edge(ordered, torch.searchsorted(before, mass).clamp_min_(1))

    floor = ordered[:, :1] + rows.min_p.to(scaled.dtype)[:, None].log()
    kept_from = torch.maximum(torch.maximum(kth, nucleus(top_p)[0]), floor)
    # A probability is off by a factor within exp(2 bound) of 1.
    widest = nucleus(top_p / (1 - 2 * bound))[0]
    possible_from = torch.maximum(torch.maximum(kth, widest), floor) - bound
    # What beats the first token outside a nucleus cannot leave it, whatever the order inside.
    outside = nucleus(top_p / (1 + 2 * bound))[1]
    certain_above = torch.maximum(torch.maximum(after_kth, outside), floor) + bound
    return scaled > certain_above, scaled >= kept_from, scaled >= possible_from


def _descending(values: torch.Tensor) -> torch.Tensor:
    """Each row sorted. On a CPU by numpy, whose vectorised sort is fifteen times as fast."""
    if values.is_cuda:
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


def _edge(ordered: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last of the first `count` [rows, 1] values of `ordered` [rows, V], and the next one."""
    width = ordered.shape[1]
    following = ordered.gather(1, count.clamp_max(width - 1))
    return ordered.gather(1, count - 1), following.masked_fill(count == width, -math.inf)


def forbid_early_stop(
    logits: torch.Tensor, params: Sequence[SamplingParams], response_tokens: Sequence[int]
) -> None:
    """Rule out, in place, the stop tokens of rows that are still short of `min_tokens`."""
    for row, (p, length) in enumerate(zip(params, response_tokens, strict=True)):
        if p.stop_token_ids and length < p.min_tokens:
            logits[row, list(p.stop_token_ids)] = -math.inf


def penalise(logits: torch.Tensor, params: SamplingParams, prefix: TokenIds, prompt: int) -> None:
    """Apply, in place, the penalties of one row's logits [V]; the first `prompt` tokens of
    `prefix` are the prompt, the others the response so far."""
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(prefix)).long().to(logits.device)
        values, by = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / by, values * by)
    if params.counts_response:
        tokens, counts = np.unique(prefix[prompt:], return_counts=True)
        off = params.presence_penalty + params.frequency_penalty * counts
        index = torch.from_numpy(tokens).long().to(logits.device)
        logits[index] -= torch.from_numpy(off).to(logits)
