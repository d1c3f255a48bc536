"""Metrics that add up exactly: what a loss saw, as sums over tokens and maxima.

A micro-batch gives `Stats` (still on its device), which become a `Tally` of plain numbers;
tallies of any cut of a batch merge to the same tally, in any order, and `named` turns the whole
into the field's metric names.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """Means as (total, weight) by metric name, raw sums by name, and maxima by metric name."""

    means: Mapping[str, tuple[float, float]]
    sums: Mapping[str, float]
    maxima: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stats:
    """A tally whose numbers are 0-d tensors: no device is waited for until `tally` is called."""

    means: Mapping[str, tuple[Tensor, Tensor]]
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]

    def tally(self) -> Tally:
        """Plain numbers, with one transfer from the device."""
        tensors = [part for pair in self.means.values() for part in pair]
        tensors += [*self.sums.values(), *self.maxima.values()]
        if not tensors:
            return Tally({}, {}, {})
        numbers = iter(torch.stack([tensor.double() for tensor in tensors]).tolist())
        return Tally(
            {name: (next(numbers), next(numbers)) for name in self.means},
            {name: next(numbers) for name in self.sums},
            {name: next(numbers) for name in self.maxima},
        )


def merge(tallies: Iterable[Tally]) -> Tally:
    """The tally of everything together; the same bits for every order."""
    parts = list(tallies)
    pairs: dict[str, list[tuple[float, float]]] = {}
    sums: dict[str, list[float]] = {}
    maxima: dict[str, float] = {}
    for part in parts:
        for name, pair in part.means.items():
            pairs.setdefault(name, []).append(pair)
        for name, value in part.sums.items():
            sums.setdefault(name, []).append(value)
        for name, value in part.maxima.items():
            maxima[name] = max(maxima.get(name, -math.inf), value)
    return Tally(
        {
            name: (math.fsum(p[0] for p in found), math.fsum(p[1] for p in found))
            for name, found in pairs.items()
        },
        {name: math.fsum(found) for name, found in sums.items()},
        maxima,
    )


def named(tally: Tally) -> dict[str, float]:
    """Metrics by the field's names; a mean over nothing is left out."""
    metrics = {name: total / weight for name, (total, weight) in tally.means.items() if weight}
    metrics |= {name: value for name, value in tally.maxima.items() if math.isfinite(value)}
    return metrics | _explained_variance(tally.sums) | _mismatch(tally.sums)


def _explained_variance(sums: Mapping[str, float]) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns), over the tokens."""
    count = sums.get("vf/count", 0.0)
    if count < 2:
        return {}
    spread = _variance(sums["vf/return_sq"], sums["vf/return"], count)
    error = _variance(sums["vf/error_sq"], sums["vf/error"], count)
    return {"critic/vf_explained_var": 1.0 - error / spread} if spread > 0 else {}


def _mismatch(sums: Mapping[str, float]) -> dict[str, float]:
    """Correlation of the two probabilities, and effective sample size of their ratios."""
    count = sums.get("mismatch/count", 0.0)
    if count < 1:
        return {}
    metrics = {
        "rollout_corr/rollout_is_eff_sample_size": (
            sums["mismatch/weight"] ** 2 / (count * sums["mismatch/weight_sq"])
        )
    }
    x = _variance(sums["mismatch/x_sq"], sums["mismatch/x"], count)
    y = _variance(sums["mismatch/y_sq"], sums["mismatch/y"], count)
    joint = sums["mismatch/xy"] / count - sums["mismatch/x"] * sums["mismatch/y"] / count**2
    if x > 0 and y > 0:
        correlation = max(-1.0, min(1.0, joint / math.sqrt(x * y)))
        metrics["training/rollout_actor_probs_pearson_corr"] = correlation
    return metrics


def _variance(square_sum: float, total: float, count: float) -> float:
    return max(square_sum / count - (total / count) ** 2, 0.0)
