"""Layers on stages: contiguous, complete, and as even as can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.models.partition import partition, stage_costs


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_partition_is_the_best_of_all_cuts(
    costs: list[int], num_stages: int, embed: int, head: int
) -> None:
    num_layers = len(costs)
    if num_stages > num_layers:
        with pytest.raises(ValueError, match="cannot be cut"):
            partition(num_layers, num_stages, layer_cost=costs)
        return
    ranges = partition(num_layers, num_stages, layer_cost=costs, embed_cost=embed, head_cost=head)
    assert [i for layers in ranges for i in layers] == list(range(num_layers))
    full = [float(c) for c in costs]
    full[0] += embed
    full[-1] += head

    def worth(edges: tuple[int, ...]) -> tuple[float, float]:
        sums = [sum(full[a:b]) for a, b in pairwise(edges)]
        return max(sums), sum(s * s for s in sums)

    best = min(
        worth((0, *cut, num_layers)) for cut in combinations(range(1, num_layers), num_stages - 1)
    )
    assert worth((0, *(r.stop for r in ranges))) == pytest.approx(best)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert partition(8, 2, layer_cost=1.0, head_cost=4.0) == (range(6), range(6, 8))


def test_costs_follow_the_parameter_counts() -> None:
    class Shape:
        hidden_size, intermediate_size, vocab_size = 8, 20, 100
        num_attention_heads, num_key_value_heads = 4, 2

    costs = stage_costs(Shape(), head_rows=100)
    assert costs.layer == 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 20
    assert costs.head == 800
    assert stage_costs(Shape(), head_rows=1, context_tokens=10).layer == costs.layer + 2 * 8 * 10
