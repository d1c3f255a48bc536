"""What things cost: seconds, as a function of batch sizes and tokens.

A `CostModel` is given, read from JSON, or fitted from measured spans (`fit`); the simulator, the
rollout scheduler and the planner ask it, and a run improves it as it goes. `basis` says for each
group of numbers where they come from, and the largest decode batch seen, so that nobody takes an
extrapolation for a measurement.

`fit` reads these span arguments (numbers unless said otherwise):

- ``Kind.GENERATE``: ``steps`` engine steps, ``batch`` and ``context_tokens`` (mean per step;
  context tokens are summed over the batch).
- ``Kind.PREFILL``: ``tokens``.
- ``Kind.SCORE``: ``role`` (text), ``tokens``, ``samples``; one span per scoring call.
- ``Kind.MIGRATE``: ``tokens`` moved with their cache. Spans of different names are parts of a
  migration (leaving, fetching, taking in), and their costs add up; those without tokens had none.
- ``Kind.WEIGHTS``, ``Kind.SWAP``: no arguments; the median duration counts.
- ``Kind.F``, ``B``, ``I``, ``W``: ``pipeline`` (text), ``pp_stage``, ``tokens``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from rlhfuse.timeline import Kind, Span, Timeline

Floats = npt.NDArray[np.float64]
MIN_SPANS = 3  # fewer measurements than this leave a number as it was


@dataclass(frozen=True, slots=True)
class StageCost:
    """One pp_stage of one training pipeline, seconds per token of a micro-batch."""

    forward_token_s: float
    backward_token_s: float
    weight_token_s: float = 0.0  # the part of backward that may be split off as W
    call_s: float = 0.0  # per task


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds for everything the planners decide on.

    decode_batch, decode_step_s: knots of the engine step time over the number of running samples
    (linear between, the last segment's slope beyond); decode_context_s is added per token of
    context in the batch. score_token_s: per role; score_call_s per call. A migration with its
    cache costs migrate_call_s and migrate_token_s per token in transit, without it a prefill of
    all its tokens at the receiver. swap_s: changing the model that a worker scores with.
    """

    decode_batch: tuple[float, ...]
    decode_step_s: tuple[float, ...]
    decode_context_s: float
    prefill_token_s: float
    prefill_call_s: float
    score_token_s: dict[str, float]
    score_call_s: float
    migrate_token_s: float
    migrate_call_s: float
    weight_sync_s: float
    swap_s: float
    train: dict[str, tuple[StageCost, ...]] = field(default_factory=dict)
    basis: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        knots, steps = self.decode_batch, self.decode_step_s
        if len(knots) != len(steps) or not knots:
            raise ValueError(f"cost model: {len(knots)} decode batches, {len(steps)} step times")
        if any(a >= b for a, b in pairwise(knots)) or min(steps) <= 0:
            raise ValueError(f"cost model: decode batches must rise, times be positive: {knots=}")

    @classmethod
    def default(cls) -> "CostModel":
        """A 3-million-parameter model on one CPU thread: the quick start before it is measured."""
        return cls(
            decode_batch=(1.0, 4.0, 16.0, 32.0, 64.0),
            decode_step_s=(3.0e-3, 3.0e-3, 4.8e-3, 6.6e-3, 10.0e-3),
            decode_context_s=0.0,
            prefill_token_s=5e-5,
            prefill_call_s=2e-3,
            score_token_s=dict.fromkeys(("actor", "critic", "reference", "reward"), 1.5e-4),
            score_call_s=2e-3,
            migrate_token_s=2e-6,
            migrate_call_s=3e-3,
            weight_sync_s=0.1,
            swap_s=0.0,
            basis={"all": "default"},
        )

    def step_s(self, batch: float, context_tokens: float = 0.0) -> float:
        """One engine step with `batch` running samples that hold `context_tokens` in all."""
        if batch <= 0:
            return 0.0
        knots, steps = self.decode_batch, self.decode_step_s
        if batch > knots[-1] and len(knots) > 1:
            slope = (steps[-1] - steps[-2]) / (knots[-1] - knots[-2])
            base = steps[-1] + slope * (batch - knots[-1])
        else:
            base = float(np.interp(batch, knots, steps))
        return base + self.decode_context_s * context_tokens

    def step_table(self, max_batch: int) -> Floats:
        """`step_s(b)` without context for b = 0..max_batch."""
        return np.array([self.step_s(b) for b in range(max_batch + 1)])

    def covers(self, batch: float) -> bool:
        """Whether a decode batch lies within what was given or measured."""
        return self.decode_batch[0] <= batch <= self.decode_batch[-1]

    def prefill_s(self, tokens: float) -> float:
        return self.prefill_call_s + self.prefill_token_s * tokens

    def score_s(self, role: str, tokens: float) -> float:
        """One scoring call. Raises KeyError for a role that the model does not know."""
        return self.score_call_s + self.score_token_s[role] * tokens

    def migrate_s(self, tokens: float, *, with_cache: bool) -> float:
        """From the order to leave until the sample can decode again, for one sample."""
        if with_cache:
            return self.migrate_call_s + self.migrate_token_s * tokens
        return self.migrate_call_s + self.prefill_s(tokens)

    def cache_pays(self, tokens: Floats) -> npt.NDArray[np.bool_]:
        """Whether moving a key-value cache of so many tokens is no slower than prefilling again."""
        again_s = self.prefill_call_s + self.prefill_token_s * tokens
        return np.asarray(self.migrate_token_s * tokens <= again_s)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def from_json(cls, data: bytes) -> "CostModel":
        """Raises ValueError where `data` is not a cost model written by `to_json`."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a cost model: {error}") from error


def fit(timeline: Timeline, previous: CostModel) -> CostModel:
    """`previous` with every number replaced that `timeline` has measurements for.

    Robust to stragglers (Huber weights); what too few spans speak of is kept. `basis` of the
    result says, per group, from how many spans it was fitted and the median error, or that it
    was kept.
    """
    by_kind: dict[Kind, list[Span]] = {}
    for span in timeline.spans:
        by_kind.setdefault(span.kind, []).append(span)
    basis = {"all": previous.basis.get("all", "given"), **previous.basis}
    cost = _fit_decode(by_kind.get(Kind.GENERATE, []), previous, basis)
    cost = _fit_scores(by_kind.get(Kind.SCORE, []), cost, basis)
    call_s, token_s = _fit_line(
        by_kind.get(Kind.PREFILL, []), (cost.prefill_call_s, cost.prefill_token_s), "prefill", basis
    )
    cost = replace(cost, prefill_call_s=call_s, prefill_token_s=token_s)
    cost = _fit_migrations(by_kind.get(Kind.MIGRATE, []), cost, basis)
    sync_s = _median(by_kind.get(Kind.WEIGHTS, []), cost.weight_sync_s, "weights", basis)
    swap_s = _median(by_kind.get(Kind.SWAP, []), cost.swap_s, "swap", basis)
    train = _fit_train(by_kind, cost, basis)
    return replace(cost, weight_sync_s=sync_s, swap_s=swap_s, train=train, basis=basis)


def _number(span: Span, name: str) -> float:
    value = span.args.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _huber(design: Floats, seconds: Floats, prior: Floats, strength: Floats) -> Floats:
    """Least squares with Huber weights, drawn to `prior` by `strength` (one per column)."""
    weights = np.ones(len(seconds))
    solution: Floats = prior
    for _ in range(8):
        weighted = design * weights[:, None]
        left = weighted.T @ design + np.diag(strength)
        solution = np.asarray(
            np.linalg.solve(left, weighted.T @ seconds + strength * prior), dtype=np.float64
        )
        errors = np.abs(seconds - design @ solution)
        scale = 1.5 * float(np.median(errors)) + 1e-12
        weights = np.minimum(1.0, scale / np.maximum(errors, 1e-300))
    return solution


def _note(basis: dict[str, str], name: str, seconds: Floats, predicted: Floats) -> None:
    error = float(np.median(np.abs(predicted - seconds) / np.maximum(seconds, 1e-12)))
    basis[name] = f"fitted from {len(seconds)} spans, median error {100 * error:.1f} %"


def _kept(basis: dict[str, str], name: str, count: int) -> None:
    before = basis.get(name, basis["all"])
    basis[name] = before if before.startswith("kept") else f"kept ({count} spans): {before}"


def _hats(batches: Floats, knots: Floats) -> Floats:
    """Linear interpolation weights, one column per knot; the ends extend flat."""
    eye = np.eye(len(knots))
    return np.stack([np.interp(batches, knots, column) for column in eye], axis=1)


def _fit_decode(spans: list[Span], cost: CostModel, basis: dict[str, str]) -> CostModel:
    spans = [s for s in spans if _number(s, "steps") > 0 and _number(s, "batch") >= 1]
    if len(spans) < MIN_SPANS:
        _kept(basis, "decode", len(spans))
        return cost
    steps = np.array([_number(s, "steps") for s in spans])
    batches = np.array([_number(s, "batch") for s in spans])
    context = np.array([_number(s, "context_tokens") for s in spans])
    seconds = np.array([s.duration_s for s in spans]) / steps
    # Knots at powers of two up to what was seen; beyond it the previous shape, rescaled.
    top = float(batches.max())
    knots = np.array([*(2.0**i for i in range(int(np.log2(top)) + 1) if 2.0**i < top), top])
    before = np.array([cost.step_s(b) for b in knots])
    at_seen = np.array([cost.step_s(b, c) for b, c in zip(batches, context, strict=True)])
    ratio = float(np.median(seconds / at_seen))
    prior = np.append(before * ratio, cost.decode_context_s * ratio)
    design = np.column_stack([_hats(batches, knots), context])
    # Relative errors count. A number is believed beforehand as if a fraction of a span said so.
    scale = 1.0 / (at_seen * ratio)
    strength = 0.1 * np.mean((design * scale[:, None]) ** 2, axis=0) + 1e-12
    solution = _huber(design * scale[:, None], seconds * scale, prior, strength)
    slope = max(0.0, float(solution[-1]))
    values = np.maximum.accumulate(np.maximum(solution[:-1], 1e-9))
    beyond = [(b, cost.step_s(b) * ratio) for b in cost.decode_batch if b > 1.01 * top]
    _note(basis, "decode", seconds, _hats(batches, knots) @ values + slope * context)
    basis["decode_range"] = f"batches 1..{top:.0f} measured"
    table = [*zip(knots.tolist(), values.tolist(), strict=True), *beyond]
    rising = np.maximum.accumulate([step for _, step in table])
    return replace(
        cost,
        decode_batch=tuple(float(batch) for batch, _ in table),
        decode_step_s=tuple(float(step) for step in rising),
        decode_context_s=slope,
    )


def _line(spans: list[Span], prior: tuple[float, float]) -> tuple[float, float, Floats, Floats]:
    """(per call, per token, measured, predicted) of duration = call + tokens x rate."""
    tokens = np.array([_number(s, "tokens") for s in spans])
    seconds = np.array([s.duration_s for s in spans])
    design = np.column_stack([np.ones(len(spans)), tokens]) / np.maximum(seconds, 1e-9)[:, None]
    strength = 0.01 * np.mean(design**2, axis=0) + 1e-12
    call_s, token_s = _huber(design, np.ones(len(spans)), np.array(prior), strength)
    if call_s < 0 or token_s < 0:  # one line through the origin, or a constant
        rate = float(np.median(seconds / np.maximum(tokens, 1.0)))
        call_s, token_s = (0.0, rate) if call_s < 0 else (float(np.median(seconds)), 0.0)
    return float(call_s), float(token_s), seconds, call_s + token_s * tokens


def _fit_line(
    spans: list[Span], prior: tuple[float, float], name: str, basis: dict[str, str]
) -> tuple[float, float]:
    spans = [s for s in spans if _number(s, "tokens") > 0]
    if len(spans) < MIN_SPANS:
        _kept(basis, name, len(spans))
        return prior
    call_s, token_s, seconds, predicted = _line(spans, prior)
    _note(basis, name, seconds, predicted)
    return call_s, token_s


def _fit_migrations(spans: list[Span], cost: CostModel, basis: dict[str, str]) -> CostModel:
    """A line for each part, and their sum; nothing where a part was hardly seen."""
    parts: dict[str, list[Span]] = {}
    for span in spans:
        if _number(span, "tokens") > 0:
            parts.setdefault(span.name, []).append(span)
    fewest = min((len(found) for found in parts.values()), default=0)
    if fewest < MIN_SPANS:
        _kept(basis, "migrate", fewest)
        return cost
    share = (cost.migrate_call_s / len(parts), cost.migrate_token_s / len(parts))
    lines = [_line(found, share) for found in parts.values()]
    seconds, predicted = (np.concatenate([line[i] for line in lines]) for i in (2, 3))
    _note(basis, "migrate", seconds, predicted)
    call_s, token_s = sum(line[0] for line in lines), sum(line[1] for line in lines)
    return replace(cost, migrate_call_s=call_s, migrate_token_s=token_s)


def _fit_scores(spans: list[Span], cost: CostModel, basis: dict[str, str]) -> CostModel:
    """A rate per role; the call overhead is the mean over roles, weighted by their spans."""
    rates = dict(cost.score_token_s)
    calls: list[tuple[float, int]] = []
    for role in sorted({str(s.args.get("role", "")) for s in spans} | set(rates)):
        mine = [s for s in spans if s.args.get("role") == role and _number(s, "tokens") > 0]
        if len(mine) < MIN_SPANS:
            _kept(basis, f"score/{role}", len(mine))
            continue
        prior = (cost.score_call_s, rates.get(role, _dearest(cost)))
        call_s, rates[role], seconds, predicted = _line(mine, prior)
        calls.append((call_s, len(mine)))
        _note(basis, f"score/{role}", seconds, predicted)
    if not calls:
        return cost
    call_s = sum(c * n for c, n in calls) / sum(n for _, n in calls)
    return replace(cost, score_token_s=rates, score_call_s=call_s)


def _dearest(cost: CostModel) -> float:
    """Seconds per token assumed for a role without any number: the dearest known one."""
    return max(cost.score_token_s.values(), default=1e-4)


def _median(spans: list[Span], before: float, name: str, basis: dict[str, str]) -> float:
    if len(spans) < MIN_SPANS:
        _kept(basis, name, len(spans))
        return before
    seconds = np.array([s.duration_s for s in spans])
    middle = float(np.median(seconds))
    _note(basis, name, seconds, np.full(len(seconds), middle))
    return middle


def _rate(spans: Iterable[Span], before: float) -> float:
    """Seconds per token: the median over spans, or `before` where there are none."""
    rates = [s.duration_s / _number(s, "tokens") for s in spans if _number(s, "tokens") > 0]
    return float(np.median(rates)) if rates else before


def _fit_train(
    by_kind: dict[Kind, list[Span]], cost: CostModel, basis: dict[str, str]
) -> dict[str, tuple[StageCost, ...]]:
    tasks: dict[str, dict[int, dict[Kind, list[Span]]]] = {}
    for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
        for span in by_kind.get(kind, []):
            stages = tasks.setdefault(str(span.args.get("pipeline", "")), {})
            stage = stages.setdefault(int(_number(span, "pp_stage")), {})
            stage.setdefault(kind, []).append(span)
    train = dict(cost.train)
    for pipeline, stages in tasks.items():
        known = dict(enumerate(train.get(pipeline, ())))
        for index, spans in stages.items():
            known[index] = _stage_cost(spans, known.get(index, StageCost(0.0, 0.0)))
        train[pipeline] = tuple(
            known.get(i, StageCost(0.0, 0.0)) for i in range(max(known, default=-1) + 1)
        )
        total = sum(len(s) for stage in stages.values() for s in stage.values())
        basis[f"train/{pipeline}"] = f"fitted from {total} spans"
    return train


def _stage_cost(spans: dict[Kind, list[Span]], before: StageCost) -> StageCost:
    def get(kind: Kind) -> list[Span]:
        return spans.get(kind, [])

    weight = _rate(get(Kind.W), before.weight_token_s)
    split = _rate(get(Kind.I), 0.0) + weight if get(Kind.I) else before.backward_token_s
    return StageCost(
        forward_token_s=_rate(get(Kind.F), before.forward_token_s),
        backward_token_s=_rate(get(Kind.B), split),
        weight_token_s=weight,
        call_s=before.call_s,
    )
