"""From the parallel layouts of two models on the same GPUs to one problem.

A *rank* of the problem is the group of GPUs that one pipeline stage of the wider model (more tensor
parallelism) takes. Where the other model is w times narrower, w of its replicas stand side by side
on every rank, do the same at the same time, and count as one pipeline. A *block* is the least set
of ranks that K1 pipelines of one model and K2 of the other cover together (RLHFuse's fusion
factors); all blocks run the same schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, log2

from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.timing import makespan

MOST_OFFSETS = 8  # tried per direction
ROUNDS = 4  # of search for each place tried
FINALISTS, LONGER = 3, 8  # the best few are searched so many times longer

Values = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """One model: its sizes, and what one data-parallel replica runs, per pp_stage.

    `num_microbatches` are those of one replica; times and memory as in `Pipeline.make`, of one GPU.
    """

    name: str
    tp: int
    pp: int
    dp: int
    num_microbatches: int
    forward: Values
    backward: Values
    weight: Values = 0.0
    activation: Values = 1.0
    activation_after_input: Values | None = None

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"{self.name} (tp {self.tp}, pp {self.pp}, dp {self.dp})"


@dataclass(frozen=True, slots=True)
class Blocks:
    """How two layouts share GPUs. Pairs are for the first and the second model."""

    gpus_per_rank: int
    num_blocks: int
    ranks_per_block: int
    factors: tuple[int, int]  # K1 and K2: pipelines on one block
    side_by_side: tuple[int, int]  # replicas that count as one pipeline

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_rank * self.ranks_per_block * self.num_blocks


@dataclass(frozen=True, slots=True)
class Placement:
    """One block as a problem, and where the second model's stages stand in it.

    `makespan` is that of a short search, which chose among directions and offsets.
    """

    blocks: Blocks
    problem: Problem
    reverse: bool
    offset: int
    makespan: float

    def describe(self) -> str:
        """One line for people."""
        blocks, (first, second) = self.blocks, self.blocks.factors
        way = "against" if self.reverse else "along"
        shift = f", shifted by {self.offset}" if self.offset else ""
        return (
            f"{blocks.num_blocks} x {blocks.ranks_per_block} ranks of {blocks.gpus_per_rank} GPUs; "
            f"K1 = {first}, K2 = {second}; the second model runs {way} the first{shift}"
        )


def share_blocks(first: ModelLayout, second: ModelLayout) -> Blocks:
    """The blocks that the two models share.

    A model on fewer GPUs than the other leaves ranks of each block to the other alone.

    Raises:
        ValueError: a size below one, or stages that would overlap in part; near layouts of the
            second model that can be fused are named.
    """
    for model in (first, second):
        for key in ("tp", "pp", "dp"):
            if getattr(model, key) < 1:
                raise ValueError(f"{model}: {key} is {getattr(model, key)}, expected at least 1")
    why = _obstacle(first, second)
    if why is not None:
        near = near_layouts(first, second)
        way = "; ".join(f"tp {tp}, pp {pp}, dp {dp}" for tp, pp, dp in near) or "none"
        raise ValueError(f"{first} and {second} cannot be fused: {why}; near that can: {way}")
    wide = max(first.tp, second.tp)
    beside = (wide // first.tp, wide // second.tp)
    pipelines = (first.dp // beside[0], second.dp // beside[1])
    num_blocks = gcd(*pipelines)
    factors = (pipelines[0] // num_blocks, pipelines[1] // num_blocks)
    ranks = max(factors[0] * first.pp, factors[1] * second.pp)
    return Blocks(wide, num_blocks, ranks, factors, beside)


def _obstacle(first: ModelLayout, second: ModelLayout) -> str | None:
    wide, narrow = (first, second) if first.tp >= second.tp else (second, first)
    if wide.tp % narrow.tp:
        return (
            f"tp {narrow.tp} does not divide tp {wide.tp}, so stages of {narrow.name} would stand "
            f"across stages of {wide.name}"
        )
    beside = wide.tp // narrow.tp
    if narrow.dp % beside:
        return (
            f"{beside} stages of {narrow.name} stand on each stage of {wide.name}; they must be of "
            f"{beside} replicas, and dp {narrow.dp} is no multiple of that"
        )
    return None


def near_layouts(
    fixed: ModelLayout, other: ModelLayout, limit: int = 3
) -> tuple[tuple[int, int, int], ...]:
    """(tp, pp, dp) of `other` on as many GPUs that can be fused with `fixed`, the nearest first.

    Distance: by what factors tp, pp and dp change, in octaves; fewer changed sizes first.
    """

    def distance(sizes: tuple[int, int, int]) -> tuple[float, int, tuple[int, int, int]]:
        pairs = list(zip(sizes, (other.tp, other.pp, other.dp), strict=True))
        return sum(abs(log2(a / b)) for a, b in pairs), sum(a != b for a, b in pairs), sizes

    found = []
    for tp in _divisors(other.num_gpus):
        for pp in _divisors(other.num_gpus // tp):
            sizes = (tp, pp, other.num_gpus // tp // pp)
            changed = ModelLayout(other.name, *sizes, other.num_microbatches, 1.0, 0.0)
            if _obstacle(fixed, changed) is None:
                found.append(sizes)
    return tuple(sorted(found, key=distance)[:limit])


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def block_problem(
    first: ModelLayout,
    second: ModelLayout,
    *,
    reverse: bool = True,
    offset: int = 0,
    memory_cap: float | None = None,
    link_latency: float = 0.0,
) -> Problem:
    """One block: the first model's pipelines in order, the second's from `offset` on, wrapping.

    Raises:
        ValueError: as `share_blocks` and `Problem`.
    """
    blocks = share_blocks(first, second)
    ranks = blocks.ranks_per_block
    pipelines = _pipelines(first, blocks.factors[0], ranks, reverse=False, offset=0)
    pipelines += _pipelines(second, blocks.factors[1], ranks, reverse=reverse, offset=offset)
    return Problem(ranks, tuple(pipelines), memory_cap, link_latency)


def _pipelines(
    model: ModelLayout, count: int, ranks: int, *, reverse: bool, offset: int
) -> list[Pipeline]:
    made = []
    for copy in range(count):
        home = [(offset + copy * model.pp + stage) % ranks for stage in range(model.pp)]
        made.append(
            Pipeline.make(
                model.name if count == 1 else f"{model.name}{copy}",
                home[::-1] if reverse else home,
                model.num_microbatches,
                model.forward,
                model.backward,
                weight=model.weight,
                activation=model.activation,
                activation_after_input=model.activation_after_input,
            )
        )
    return made


def place(
    first: ModelLayout,
    second: ModelLayout,
    *,
    memory_cap: float | None = None,
    link_latency: float = 0.0,
    split_weight: bool = False,
    rounds: int = ROUNDS,
    seed: int = 0,
    on_try: Callable[[Placement], None] | None = None,
) -> Placement:
    """The direction and offset of the second model under which a short search ends earliest.

    All places that differ are searched briefly, the best few and the paper's (reversed, no offset)
    once more and longer; among equals the paper's is taken. Deterministic in `seed`.

    Raises:
        ValueError: as `share_blocks`, `Problem` and `fuse`.
    """
    blocks = share_blocks(first, second)

    def attempt(reverse: bool, offset: int, rounds: int) -> Placement:
        problem = block_problem(
            first,
            second,
            reverse=reverse,
            offset=offset,
            memory_cap=memory_cap,
            link_latency=link_latency,
        )
        found = fuse(problem, iterations=rounds, seed=seed, split_weight=split_weight)
        tried = Placement(blocks, problem, reverse, offset, makespan(found))
        if on_try is not None:
            on_try(tried)
        return tried

    places = [(way, offset) for way in (True, False) for offset in _offsets(first, second, blocks)]
    brief = {place: attempt(*place, rounds).makespan for place in places}
    final = dict.fromkeys([(True, 0), *sorted(brief, key=lambda p: brief[p])[:FINALISTS]])
    best: Placement | None = None
    for reverse, offset in final:
        tried = attempt(reverse, offset, LONGER * rounds)
        if best is None or tried.makespan < best.makespan * (1 - 1e-6):
            best = tried
    assert best is not None
    return best


def _offsets(first: ModelLayout, second: ModelLayout, blocks: Blocks) -> range:
    """Offsets that give different problems: shifts that only swap equal pipelines are left out."""
    period = ranks = blocks.ranks_per_block
    for model, count in zip((first, second), blocks.factors, strict=True):
        if count * model.pp == ranks:
            period = gcd(period, model.pp)
    return range(0, period, -(-period // MOST_OFFSETS))
