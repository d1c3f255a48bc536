"""Scores of a validation set become metrics: mean and pass@k, over all and per data source."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """One response to the prompt that `prompt` identifies, its score and further metrics."""

    prompt: str
    data_source: str
    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    responses: Sequence[ScoredResponse], name: str, pass_threshold: float
) -> dict[str, float]:
    """Metrics of the validation set `name`; a response passes when its score is above the
    threshold.

    ``val-core/<name>/reward/{mean,pass}@<n>`` come first, with n the (least) number of responses
    per prompt; where the set mixes data sources, the same under ``<name>/<source>``; then, under
    ``val-aux/``, spread, pass@k for smaller k, and the means of what reward functions report.
    """
    if not responses:
        return {}
    parts = {name: list(responses)}
    sources = sorted({response.data_source for response in responses})
    if len(sources) > 1:
        for source in sources:
            chosen = [response for response in responses if response.data_source == source]
            parts[f"{name}/{source}"] = chosen
    metrics: dict[str, float] = {}
    for place, chosen in parts.items():
        metrics.update(_core(place, chosen, pass_threshold))
    for place, chosen in parts.items():
        metrics.update(_aux(place, chosen, pass_threshold))
    return metrics


def pass_at_k(num_responses: int, num_passed: int, k: int) -> float:
    """Chance that at least one of `k` of the responses passes, drawn without replacement: the
    unbiased estimator of Chen et al., 2021 (arXiv 2107.03374), 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= num_responses or not 0 <= num_passed <= num_responses:
        raise ValueError(f"pass@k of {k=}, {num_responses=}, {num_passed=} is not defined")
    return 1 - math.comb(num_responses - num_passed, k) / math.comb(num_responses, k)


def _groups(responses: Sequence[ScoredResponse]) -> list[list[ScoredResponse]]:
    groups: dict[str, list[ScoredResponse]] = defaultdict(list)
    for response in responses:
        groups[response.prompt].append(response)
    return list(groups.values())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _pass(groups: Sequence[Sequence[ScoredResponse]], k: int, threshold: float) -> float:
    return _mean([pass_at_k(len(g), sum(r.score > threshold for r in g), k) for g in groups])


def _core(
    place: str, responses: Sequence[ScoredResponse], threshold: float
) -> Iterator[tuple[str, float]]:
    groups = _groups(responses)
    least = min(len(group) for group in groups)
    means = [_mean([response.score for response in group]) for group in groups]
    yield f"val-core/{place}/reward/mean@{least}", _mean(means)
    yield f"val-core/{place}/reward/pass@{least}", _pass(groups, least, threshold)


def _aux(
    place: str, responses: Sequence[ScoredResponse], threshold: float
) -> Iterator[tuple[str, float]]:
    groups = _groups(responses)
    least = min(len(group) for group in groups)
    k = 1
    while k < least:
        yield f"val-aux/{place}/reward/pass@{k}", _pass(groups, k, threshold)
        k *= 2
    if least > 1:
        spreads = []
        for group in groups:
            mean = _mean([response.score for response in group])
            spreads.append(math.sqrt(_mean([(r.score - mean) ** 2 for r in group])))
        best = [max(response.score for response in group) for group in groups]
        worst = [min(response.score for response in group) for group in groups]
        yield f"val-aux/{place}/reward/std@{least}", _mean(spreads)
        yield f"val-aux/{place}/reward/best@{least}", _mean(best)
        yield f"val-aux/{place}/reward/worst@{least}", _mean(worst)
    for name in sorted({name for response in responses for name in response.metrics}):
        values = [response.metrics[name] for response in responses if name in response.metrics]
        yield f"val-aux/{place}/{name}/mean@{least}", _mean(values)
