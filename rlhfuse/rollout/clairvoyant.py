"""How well could one do with the true lengths known? A reference for policies, by search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rlhfuse.cost import CostModel
from rlhfuse.rollout.forecast import Floats
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.simulator import simulate
from rlhfuse.sample import Sample


class KnownLengths(LengthModel):
    """Predicts the truth: `true[sample id]`."""

    def __init__(self, max_response_tokens: int, true: Sequence[int]) -> None:
        super().__init__(max_response_tokens)
        self._true = np.asarray(true, dtype=np.float64)

    def expected_tokens(self, sample: Sample) -> float:
        return float(self._true[sample.id]) - sample.response_tokens

    def remaining(
        self,
        tokens: Floats,
        quantiles: Floats,
        sample_ids: npt.NDArray[np.int64] | None = None,
        groups: npt.NDArray[np.int64] | None = None,
    ) -> Floats:
        assert sample_ids is not None
        left = np.maximum(self._true[sample_ids] - tokens, 1.0)
        return np.tile(left, (len(quantiles), 1))


@dataclass(frozen=True, slots=True)
class Best:
    """The best that was found. `how`: the order of moves, or the rule. `policy`, with a dispatch
    that is `known` to know the lengths or not, does it again (also live)."""

    end_s: float
    how: str
    tried: int
    policy: Policy
    known: bool


def clairvoyant(
    cost: CostModel,
    policy: Policy,
    lengths: Sequence[int],
    prompts: Sequence[int],
    instances: int,
    roles: tuple[str, ...],
    *,
    groups: Sequence[int] | None = None,
    history: Sequence[int] = (),
    train: bool = False,
    reward_s: float | None = None,
    moments: int = 6,
    second: bool = True,
) -> Best:
    """The best over: no move; our rule, knowing the lengths, with several margins; every single
    move on a grid of moments (samples that remain) and sizes (blocks that go on); and, after the
    best of these, a second move. Each with a dispatch that knows the lengths, and with one that
    does not."""
    blocks = instances // policy.block
    num = len(lengths)

    search = _Search(policy)

    def run(changed: Policy, how: str, *, known: bool = True) -> None:
        limit = policy.max_response_tokens
        predictor = KnownLengths(limit, lengths) if known else LengthModel(limit, history)
        _, stats = simulate(
            cost, changed, lengths, prompts, instances, roles, groups=groups,
            predictor=predictor, train=train, reward_s=reward_s, record=False,
        )  # fmt: skip
        search.note(Best(stats.end_s, how, 0, changed, known))

    on = replace(policy, inter_stage=InterStage.ON)
    never = replace(on, migration=Migration.OFF)
    for known in (True, False):
        run(never, f"no move, {known=}", known=known)
    for margin in (0.0, 0.01, 0.03):
        ours = replace(on, migration=Migration.AUTO, margin=margin)
        run(ours, f"our rule, margin {margin:g}")
    counts = sorted({max(1, round(num * i / moments)) for i in range(1, moments)}, reverse=True)
    sizes = sorted({s for p in (0.06, 0.15, 0.3, 0.5, 0.75) if (s := round(p * blocks))})
    sizes = sizes or [1]

    def order(*moves: tuple[int, int]) -> None:
        how = ", ".join(f"at {count} on {size}" for count, size in moves)
        run(replace(on, migration=Migration.FORCED, forced=moves), how)

    _first_moves(order, counts, [s for s in sizes if s < blocks])
    if second and search.moves:
        _second_moves(search.moves[0], order, counts, sizes)
    return replace(search.best, tried=search.tried)


class _Search:
    """The best so far, and the best order of moves."""

    def __init__(self, policy: Policy) -> None:
        self.best = Best(float("inf"), "", 0, policy, known=False)
        self.tried = 0
        self.moves: tuple[tuple[int, int], ...] = ()
        self.moves_s = float("inf")

    def note(self, found: Best) -> None:
        self.tried += 1
        if found.end_s < self.best.end_s:
            self.best = found
        moves = found.policy.forced
        if moves and found.end_s < self.moves_s:
            self.moves_s, self.moves = found.end_s, moves


_Order = Callable[..., None]


def _first_moves(order: _Order, counts: list[int], sizes: list[int]) -> None:
    for count in counts:
        for size in sizes:
            order((count, size))


def _second_moves(
    first: tuple[int, int], order: _Order, counts: list[int], sizes: list[int]
) -> None:
    later = [c for c in (*counts, 8, 2) if c < first[0]]
    for count in later[-4:]:
        for size in sorted({1, sizes[0], sizes[len(sizes) // 2], sizes[-1]} - {first[1]}):
            order(first, (count, size))
