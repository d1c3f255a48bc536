"""How long will running samples still be? Remaining lengths, given the tokens so far.

The survival curve of response lengths is estimated from finished samples (of this iteration and
the ones before) and from running ones, which are censored observations (Kaplan and Meier, 1958).
Beyond what was ever seen it goes on as a Pareto tail, up to the response limit.
"""

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
TAIL_EXPONENT = 1.5
MOST_OBSERVATIONS = 4096  # more do not sharpen the curve, but cost time


class LengthModel:
    """`max_response_tokens` bounds every prediction. `history`: complete lengths, newest last."""

    def __init__(self, max_response_tokens: int, history: Iterable[int] = ()) -> None:
        self.max_response_tokens = max_response_tokens
        self._past: deque[int] = deque(history, maxlen=MOST_OBSERVATIONS)
        self._present: list[int] = []

    def begin(self) -> None:
        """A new iteration: what was seen in the one before is history."""
        self._past.extend(self._present)
        self._present.clear()

    def observe(self, response_tokens: int) -> None:
        """A response of this iteration is complete with this many tokens."""
        self._present.append(response_tokens)

    @property
    def history(self) -> tuple[int, ...]:
        """Complete lengths seen, newest last; what a new model starts from."""
        return (*self._past, *self._present)[-MOST_OBSERVATIONS:]

    def survival(self, running: Floats) -> tuple[Floats, Floats]:
        """(lengths that ended, ascending and distinct; part of all responses longer than each)."""
        # Finished and running samples of this iteration are thinned alike, or the curve bends.
        stride = -(-(len(running) + len(self._present)) // MOST_OBSERVATIONS) or 1
        censored = np.asarray(running[::stride])
        complete = np.array([*self._past, *self._present[::stride]], dtype=np.float64)
        if not len(complete):
            return np.empty(0), np.empty(0)
        lengths, ended = np.unique(complete, return_counts=True)
        # At risk at a length: everything known to have reached it.
        complete.sort()
        at_risk = len(complete) - np.searchsorted(complete, lengths, side="left")
        censored = np.sort(censored)
        at_risk = at_risk + len(censored) - np.searchsorted(censored, lengths, side="left")
        return lengths, np.asarray(np.cumprod(1.0 - ended / at_risk), dtype=np.float64)

    def remaining(self, tokens: Floats, quantiles: Floats) -> Floats:
        """Tokens still to come, at least 1. tokens [n] so far, quantiles [m, n] -> [m, n]."""
        lengths, survival = self.survival(tokens)
        reach = np.maximum(tokens, 8.0)
        tail = reach * (1.0 - quantiles) ** (-1.0 / TAIL_EXPONENT)
        final = tail
        if len(lengths):
            padded = np.concatenate([[1.0], survival])
            alive = padded[np.searchsorted(lengths, tokens, side="right")]  # S(tokens) [n]
            wanted = alive * (1.0 - quantiles)
            # First length at which the survival curve has fallen to what is wanted.
            index = np.searchsorted(-survival, -wanted, side="left")
            inside = index < len(lengths)
            known = lengths[np.minimum(index, len(lengths) - 1)]
            last = max(float(survival[-1]), 1e-12)
            beyond = np.maximum(lengths[-1], reach) * np.maximum(
                last / np.maximum(wanted, 1e-12), 1.0
            ) ** (1.0 / TAIL_EXPONENT)
            final = np.where(alive > 0, np.where(inside, known, beyond), tail)
        final = np.minimum(final, float(self.max_response_tokens))
        return np.asarray(np.maximum(final - tokens, 1.0), dtype=np.float64)


def stratified(num_scenarios: int, sample_ids: npt.NDArray[np.int64]) -> Floats:
    """Quantiles [m, n] in (0, 1): each sample meets every stratum once over the scenarios, in an
    order and at places of its own, which depend on its id alone: tails must not be left out."""
    rows = np.minimum(sample_ids, sample_ids % 4096)
    random = np.random.default_rng(0)
    table = random.permuted(np.tile(np.arange(num_scenarios), (int(rows.max()) + 1, 1)), axis=1)
    return np.asarray((table[rows] + random.random(table.shape)[rows]).T / num_scenarios)
