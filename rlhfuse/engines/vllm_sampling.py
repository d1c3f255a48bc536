"""Position-keyed draws inside vLLM's batch: the maths of the logits processor, without vLLM.

vLLM keeps its requests in the rows of one persistent batch and tells a logits processor what
changed: rows removed, added, moved. `KeyedDraws` mirrors that, draws every row's token, and keeps
what the engine wants to know after the step: log-probabilities, near ties and their logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlhfuse.engines.base import SamplingParams, TokenIds
from rlhfuse.engines.sampling import NEAR_TIE, RowParams, draw, forbid_early_stop, penalise


@dataclass(frozen=True, slots=True)
class KeyedSample:
    """What the draws of a sample are keyed by. `prompt_tokens`: of the sample's own prompt, also
    where vLLM was given prompt and response together."""

    sample_id: int
    seed: int
    params: SamplingParams
    prompt_tokens: int


class Drawn(NamedTuple):
    """A row's draw. `seen`: float32 logits [V] where the draw is a near tie, after the ban on early
    stops and penalties."""

    token: int
    logprob: float
    near_tie: bool
    seen: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Row:
    sample: KeyedSample
    given: Sequence[int]  # what vLLM was given as prompt
    output: Sequence[int]  # what it has generated since: a list of vLLM's that grows

    @property
    def length(self) -> int:
        return len(self.given) + len(self.output)

    @property
    def prefix(self) -> TokenIds:
        return np.array([*self.given, *self.output], dtype=np.int32)


class KeyedDraws:
    """The rows of one engine's batch. `exact`: near ties are flagged, for a canonical decision."""

    def __init__(self, *, exact: bool = True) -> None:
        self.exact = exact
        self._samples: dict[int, KeyedSample] = {}
        self._rows: dict[int, _Row] = {}
        self._columns: RowParams | None = None
        self._drawn: dict[int, Drawn] = {}

    # --- the engine's side -----------------------------------------------------------------

    def expect(self, sample: KeyedSample) -> None:
        """Announce a sample before vLLM is given its request."""
        self._samples[sample.sample_id] = sample

    def forget(self, sample_id: int) -> None:
        """The sample is not this engine's any more."""
        self._samples.pop(sample_id, None)
        self._drawn.pop(sample_id, None)

    def take(self, sample_id: int) -> Drawn:
        """What the last step drew for a sample."""
        return self._drawn.pop(sample_id)

    # --- vLLM's side -----------------------------------------------------------------------

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)
        self._columns = None

    def add(self, row: int, sample_id: int, given: Sequence[int], output: Sequence[int]) -> None:
        """A request takes a row; `output` is the list that grows with every token."""
        self._rows[row] = _Row(self._samples[sample_id], given, output)
        self._columns = None

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """A row moves into another; with `swap` the other takes its place."""
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and other is not None:
            self._rows[source] = other
        self._columns = None

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [rows] for float32 logits [rows, V], which are changed (stop tokens are
        forbidden before `min_tokens`, penalties are applied)."""
        rows = [self._rows[i] for i in range(logits.shape[0])]
        params = [row.sample.params for row in rows]
        positions = [row.length for row in rows]
        forbid_early_stop(
            logits,
            params,
            [p - row.sample.prompt_tokens for p, row in zip(positions, rows, strict=True)],
        )
        for index, row in enumerate(rows):
            if params[index].penalises:
                penalise(logits[index], params[index], row.prefix, row.sample.prompt_tokens)
        if self._columns is None:
            self._columns = RowParams.of(
                [row.sample.seed for row in rows],
                params,
                vocab_size=logits.shape[1],
                device=logits.device,
            )
        drawn = draw(
            logits,
            torch.tensor(positions, device=logits.device),
            self._columns,
            near_tie=NEAR_TIE if self.exact else 0.0,
        )
        self._keep(rows, drawn.tokens, drawn.logprobs, drawn.near_ties, logits)
        return drawn.tokens

    def _keep(
        self,
        rows: Sequence[_Row],
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        near_ties: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Overwritten every step: vLLM draws for half-prefilled rows too, and drops the tokens."""
        columns = zip(
            rows, tokens.tolist(), logprobs.tolist(), near_ties.tolist(), logits, strict=True
        )
        self._drawn = {
            row.sample.sample_id: Drawn(
                token,
                logprob,
                near_tie and self.exact,
                seen.clone() if near_tie and self.exact else None,
            )
            for row, token, logprob, near_tie, seen in columns
        }


def of_each_draft(
    values: torch.Tensor,
    ends: torch.Tensor,
    count: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """Each request's value [requests] for each of its draft tokens [count], of which `ends` is the
    running sum; `replace_from` becomes `replace_to`."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    return replaced.repeat_interleave(counts, output_size=count)


def mixed_seed(seed: int, position: int) -> int:
    """Another seed for another position: SplitMix64's step, in 64 bits."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
