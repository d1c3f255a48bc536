"""How long will running samples still be? Remaining lengths, given the tokens so far.

The survival curve of response lengths is estimated from finished samples (of this iteration and
the ones before) and from running ones, which are censored observations (Kaplan and Meier, 1958).
Beyond what was ever seen it goes on as a Pareto tail, up to the response limit.

What is known of a sample bends the curve: the source of its prompt, or a user's hint, scales its
lengths; finished and running siblings of its group tell its hazard (a gamma frailty shared by the
group: Vaupel and others, 1979), by as much as groups of earlier iterations were alike.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import inf, lgamma, log

import numpy as np
import numpy.typing as npt

from rlhfuse.sample import Sample

Floats = npt.NDArray[np.float64]
TAIL_EXPONENT = 1.5
MOST_OBSERVATIONS = 4096  # more do not sharpen the curve, but cost time
PRIOR_COUNT = 8.0  # a source's mean length is drawn to the overall one as if by so many samples
NEARLY_THERE = 1.25  # running samples count as alive so much further in a first iteration
_SHAPES = (1.0, 2.0, 4.0, 8.0, 16.0, inf)  # of the frailty: how alike siblings are


class LengthModel:
    """`max_response_tokens` bounds every prediction. `history`: complete lengths, newest last."""

    def __init__(self, max_response_tokens: int, history: Iterable[int] = ()) -> None:
        self.max_response_tokens = max_response_tokens
        self._past: deque[float] = deque(history, maxlen=MOST_OBSERVATIONS)  # scaled
        self._past_column = np.array(self._past, dtype=np.float64)
        self._past_raw: deque[int] = deque((int(n) for n in self._past), maxlen=MOST_OBSERVATIONS)
        self._present: list[float] = []
        self._present_raw: list[int] = []
        self._scale: dict[int, float] = {}  # by sample id, where it is not 1
        self._sources: dict[str, tuple[float, float]] = {}  # count and sum of lengths
        self._hinted = (0.0, 0.0)  # sums of hints and of what came of them
        self._finished: dict[int, list[float]] = {}  # group -> scaled lengths of its members
        self._siblings = True  # whether any group may have more than one member
        self._alone = False  # nothing but its length is known of any sample
        self._shape = inf
        self.mean = self._mean()  # of the lengths seen before this iteration

    # --- what is seen ----------------------------------------------------------------------

    def begin(self, samples: Sequence[Sample] = ()) -> None:
        """A new iteration with `samples`: what was seen in the one before is history."""
        self._learn_shape()
        self._past.extend(self._present)
        self._past_column = np.array(self._past, dtype=np.float64)
        self._past_raw.extend(self._present_raw)
        self._present.clear()
        self._present_raw.clear()
        self._finished.clear()
        self._siblings = len({sample.group for sample in samples}) < len(samples) or not samples
        told = self._siblings or any(s.source or s.length_hint > 0 for s in samples)
        self._alone = not told
        self.mean = self._mean()
        self._scale = self._scales(samples)

    def observe(self, response_tokens: int, sample: Sample | None = None) -> None:
        """A response of this iteration is complete with this many tokens."""
        scaled = float(response_tokens)
        if sample is not None:
            if self._scale:
                scaled /= self._scale.get(sample.id, 1.0)
            if self._siblings:
                self._finished.setdefault(sample.group, []).append(scaled)
            if sample.source:
                count, total = self._sources.get(sample.source, (0.0, 0.0))
                self._sources[sample.source] = (count + 1.0, total + response_tokens)
            if sample.length_hint > 0:
                hints, actual = self._hinted
                self._hinted = (hints + sample.length_hint, actual + response_tokens)
        self._present.append(scaled)
        self._present_raw.append(response_tokens)

    def observe_all(self, response_tokens: Sequence[int], samples: Sequence[Sample]) -> None:
        """`observe` of each, in order."""
        if self._alone:
            self._present.extend(map(float, response_tokens))
            self._present_raw.extend(response_tokens)
            return
        for tokens, sample in zip(response_tokens, samples, strict=True):
            self.observe(tokens, sample)

    @property
    def history(self) -> tuple[int, ...]:
        """Complete lengths seen, newest last; what a new model starts from."""
        return (*self._past_raw, *self._present_raw)[-MOST_OBSERVATIONS:]

    def _mean(self) -> float:
        """A quarter of the limit where nothing was seen."""
        past = self._past_raw
        return sum(past) / len(past) if past else 0.25 * self.max_response_tokens

    def _scales(self, samples: Sequence[Sample]) -> dict[int, float]:
        mean = self.mean
        hints, actual = self._hinted
        known = [s.length_hint for s in samples if s.length_hint > 0]
        if known and not hints:  # hints tell at least longer from shorter
            hints, actual = float(sum(known)), mean * len(known)
        scales = {}
        for sample in samples:
            if sample.length_hint > 0:
                scales[sample.id] = sample.length_hint * actual / hints / mean
            elif sample.source in self._sources:
                count, total = self._sources[sample.source]
                scales[sample.id] = (total / mean + PRIOR_COUNT) / (count + PRIOR_COUNT)
        return {i: min(max(scale, 0.05), 20.0) for i, scale in scales.items()}

    def _learn_shape(self) -> None:
        """The frailty's shape under which the last iteration's groups were most likely."""
        groups = [g for g in self._finished.values() if len(g) > 1]
        if not groups:
            return
        lengths, survival = self.survival(np.empty(0))
        hazards = [(len(g), float(_hazard(np.array(g), lengths, survival).sum())) for g in groups]

        def likelihood(shape: float) -> float:
            if shape == inf:
                return -sum(total for _, total in hazards)
            fixed = shape * log(shape) - lgamma(shape)
            return sum(
                fixed + lgamma(shape + n) - (shape + n) * log(shape + total) for n, total in hazards
            )

        self._shape = max(_SHAPES, key=likelihood)

    # --- what is predicted -----------------------------------------------------------------

    def expected_tokens(self, sample: Sample) -> float:
        """Expected tokens still to come, from what is known of the prompt: for dispatch."""
        final = self.mean * self._scale[sample.id] if sample.id in self._scale else self.mean
        done = sample.response_tokens
        if done:
            final = max(final, 1.5 * done)
        left = (final if final < self.max_response_tokens else self.max_response_tokens) - done
        return left if left > 1.0 else 1.0

    def scales(self, sample_ids: npt.NDArray[np.int64]) -> Floats:
        """By how much each sample's lengths are longer than the curve says. [n]"""
        if not self._scale:
            return np.ones(len(sample_ids))
        return np.array([self._scale.get(int(i), 1.0) for i in sample_ids])

    def frailties(self, tokens: Floats, groups: npt.NDArray[np.int64]) -> Floats:
        """Hazard of each running sample, relative to the curve, from its siblings. `tokens` are
        scaled. [n]"""
        if self._shape == inf or not len(tokens):
            return np.ones(len(tokens))
        lengths, survival = self.survival(tokens)
        distinct, index = np.unique(groups, return_inverse=True)
        exposure = np.bincount(index, _hazard(tokens, lengths, survival), len(distinct))
        ended = np.zeros(len(distinct))
        for place, group in enumerate(distinct.tolist()):
            mine = self._finished.get(group)
            if mine:
                ended[place] = len(mine)
                exposure[place] += _hazard(np.array(mine), lengths, survival).sum()
        return np.asarray(((ended + self._shape) / (exposure + self._shape))[index])

    def survival(self, running: Floats) -> tuple[Floats, Floats]:
        """(lengths that ended, ascending and distinct; part of all responses longer than each)."""
        # Finished and running samples of this iteration are thinned alike, or the curve bends.
        stride = -(-(len(running) + len(self._present)) // MOST_OBSERVATIONS) or 1
        censored = np.asarray(running[::stride])
        present = np.array(self._present[::stride], dtype=np.float64)
        complete = np.concatenate([self._past_column, present])
        if not len(complete):
            return np.empty(0), np.empty(0)
        lengths, ended = np.unique(complete, return_counts=True)
        # At risk at a length: everything known to have reached it.
        complete.sort()
        at_risk = len(complete) - np.searchsorted(complete, lengths, side="left")
        # Without history, a response that ended a little further than the rest have come would
        # say that all of them end there.
        slack = 1.0 if self._past else NEARLY_THERE
        censored = np.sort(slack * censored)
        at_risk = at_risk + len(censored) - np.searchsorted(censored, lengths, side="left")
        return lengths, np.asarray(np.cumprod(1.0 - ended / at_risk), dtype=np.float64)

    def remaining(
        self,
        tokens: Floats,
        quantiles: Floats,
        sample_ids: npt.NDArray[np.int64] | None = None,
        groups: npt.NDArray[np.int64] | None = None,
    ) -> Floats:
        """Tokens still to come, at least 1. tokens [n] so far, quantiles [m, n] -> [m, n].
        `sample_ids` and `groups` [n] let sources, hints and siblings speak."""
        scale = np.ones(len(tokens)) if sample_ids is None else self.scales(sample_ids)
        scaled = tokens / scale
        frailty = np.ones(len(tokens)) if groups is None else self.frailties(scaled, groups)
        left = (1.0 - quantiles) ** (1.0 / frailty)  # chance to get beyond, given that it is here
        lengths, survival = self.survival(scaled)
        reach = np.maximum(scaled, 8.0)
        tail = reach * left ** (-1.0 / TAIL_EXPONENT)
        final = tail
        if len(lengths):
            alive = _at(scaled, lengths, survival)
            wanted = alive * left
            # First length at which the survival curve has fallen to what is wanted.
            index = np.searchsorted(-survival, -wanted, side="left")
            inside = index < len(lengths)
            known = lengths[np.minimum(index, len(lengths) - 1)]
            last = max(float(survival[-1]), 1e-12)
            beyond = np.maximum(lengths[-1], reach) * np.maximum(
                last / np.maximum(wanted, 1e-12), 1.0
            ) ** (1.0 / TAIL_EXPONENT)
            final = np.where(alive > 0, np.where(inside, known, beyond), tail)
        final = np.minimum(final * scale, float(self.max_response_tokens))
        return np.asarray(np.maximum(final - tokens, 1.0), dtype=np.float64)


def _at(tokens: Floats, lengths: Floats, survival: Floats) -> Floats:
    """The survival curve at `tokens`."""
    padded = np.concatenate([[1.0], survival])
    return np.asarray(padded[np.searchsorted(lengths, tokens, side="right")], dtype=np.float64)


def _hazard(tokens: Floats, lengths: Floats, survival: Floats) -> Floats:
    """Cumulated hazard up to `tokens`; that of complete responses is exponential with mean 1."""
    if not len(lengths):
        return np.zeros(len(tokens))
    return np.asarray(-np.log(np.maximum(_at(tokens, lengths, survival), 1e-4)))


def stratified(num_scenarios: int, sample_ids: npt.NDArray[np.int64]) -> Floats:
    """Quantiles [m, n] in (0, 1): each sample meets every stratum once over the scenarios, in an
    order and at places of its own, which depend on its id alone: tails must not be left out."""
    rows = np.minimum(sample_ids, sample_ids % 4096)
    return np.asarray(_strata(num_scenarios, int(rows.max()) + 1)[rows].T)


@lru_cache(maxsize=16)
def _strata(num_scenarios: int, rows: int) -> Floats:
    random = np.random.default_rng(0)
    table = random.permuted(np.tile(np.arange(num_scenarios), (rows, 1)), axis=1)
    return np.asarray((table + random.random(table.shape)) / num_scenarios)
