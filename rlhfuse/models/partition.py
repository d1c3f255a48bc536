"""Which layers go on which pipeline stage. Pure Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TransformerShape(Protocol):
    """The sizes that decide a layer's cost, under their Hugging Face names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int

    @property
    def num_key_value_heads(self) -> int | None:
        """None: as many as attention heads."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Multiply-adds per token, forward: of one decoder layer, the embedding, the head."""

    layer: float
    embed: float
    head: float


def stage_costs(config: TransformerShape, *, head_rows: int, context_tokens: int = 0) -> Costs:
    """Costs from a Hugging Face config. `head_rows` is the vocabulary size for a language model,
    1 for a scalar head; `context_tokens` is the mean context that attention reads."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    query_size = config.num_attention_heads * head_dim
    kv_size = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    projections = config.hidden_size * (2 * query_size + 2 * kv_size)
    attention = 2 * query_size * context_tokens
    mlp = 3 * config.hidden_size * config.intermediate_size
    return Costs(
        layer=float(projections + attention + mlp),
        embed=float(config.hidden_size),  # a row copied: no product
        head=float(config.hidden_size * head_rows),
    )


def partition(
    num_layers: int,
    num_stages: int,
    *,
    layer_cost: float | Sequence[float],
    embed_cost: float = 0.0,
    head_cost: float = 0.0,
) -> tuple[range, ...]:
    """Contiguous ranges of layers, one per stage: the dearest stage as cheap as it can be, then
    the costs as even as they can be (least sum of squares). Every stage has at least one layer.

    Raises ValueError where there are fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"pipeline: {num_layers} layers cannot be cut into {num_stages} stages; "
            "use at most as many stages as layers"
        )
    costs = [layer_cost] * num_layers if isinstance(layer_cost, (int, float)) else [*layer_cost]
    assert len(costs) == num_layers, f"{len(costs)} layer costs for {num_layers} layers"
    costs[0] += embed_cost
    costs[-1] += head_cost
    # Stage sums as differences of prefix sums would round; sums over slices do not need to.
    total = [[sum(costs[i:j]) for j in range(num_layers + 1)] for i in range(num_layers)]
    dearest = _best_cut(total, num_stages, limit=float("inf"), squares=False)[0]
    cuts = _best_cut(total, num_stages, limit=dearest * (1 + 1e-9), squares=True)[1]
    edges = (0, *cuts, num_layers)
    return tuple(range(edges[s], edges[s + 1]) for s in range(num_stages))


def _best_cut(
    total: list[list[float]], num_stages: int, *, limit: float, squares: bool
) -> tuple[float, tuple[int, ...]]:
    """Dynamic program over (stage, layers used): the least maximum, or the least sum of squares,
    of stage costs that are all within `limit`. Ties go to the earliest cut."""
    num_layers = len(total)
    # best[i]: (value, cuts) for the first i layers on the stages so far.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
            for start, (value, cuts) in best.items():
                if start >= end or total[start][end] > limit:
                    continue
                cost = total[start][end]
                new = value + cost * cost if squares else max(value, cost)
                if end not in following or new < following[end][0]:
                    following[end] = (new, (*cuts, end))
        best = following
    value, cuts = best[num_layers]
    return value, cuts[:-1]
