"""Mini- and micro-batches: every id once, whatever the input order, and balanced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse.packing import balanced, microbatches, minibatches

samples_of = st.dictionaries(st.integers(0, 10_000), st.integers(1, 2000), min_size=1, max_size=60)


def _sums(parts: tuple[tuple[int, ...], ...], lengths: dict[int, int]) -> list[int]:
    return [sum(lengths[s] for s in part) for part in parts]


@given(samples_of, st.integers(1, 12))
def test_number_given(lengths: dict[int, int], number: int) -> None:
    number = min(number, len(lengths))
    parts = microbatches(list(lengths.items()), num_microbatches=number)
    assert sorted(s for part in parts for s in part) == sorted(lengths)
    assert len(parts) == number
    assert all(parts)
    # No better than what a part must hold, no worse than longest-first's guarantee.
    ideal = max(max(lengths.values()), sum(lengths.values()) / number)
    assert max(_sums(parts, lengths)) <= 4 / 3 * ideal + 1e-9


@given(samples_of, st.integers(1, 4000))
def test_budget_given(lengths: dict[int, int], budget: int) -> None:
    parts = microbatches(list(lengths.items()), token_budget=budget)
    assert sorted(s for part in parts for s in part) == sorted(lengths)
    for part, total in zip(parts, _sums(parts, lengths), strict=True):
        assert part
        assert total <= budget or len(part) == 1


@given(samples_of, st.permutations(range(60)), st.integers(1, 8))
def test_input_order_never_matters(lengths: dict[int, int], order: list[int], n: int) -> None:
    pairs = sorted(lengths.items())
    shuffled = [pairs[i] for i in order if i < len(pairs)]
    n = min(n, len(pairs))
    assert microbatches(pairs, num_microbatches=n) == microbatches(shuffled, num_microbatches=n)
    assert microbatches(pairs, token_budget=900) == microbatches(shuffled, token_budget=900)
    by_group = [(s, s % 4) for s, _ in pairs]
    by_group_shuffled = [(s, s % 4) for s, _ in shuffled]
    number = len({g for _, g in by_group})
    assert minibatches(by_group, prompts_per_minibatch=number, seed=3) == minibatches(
        by_group_shuffled, prompts_per_minibatch=number, seed=3
    )


def test_small_ones_stand_at_both_ends() -> None:
    lengths = {i: 10 * i + 1 for i in range(6)}
    sums = _sums(microbatches(list(lengths.items()), num_microbatches=6), lengths)
    top = sums.index(max(sums))
    assert sums[: top + 1] == sorted(sums[: top + 1])
    assert sums[top:] == sorted(sums[top:], reverse=True)


def test_differencing_finds_an_even_cut() -> None:
    lengths = {0: 8, 1: 7, 2: 6, 3: 5, 4: 4}  # the known example: difference 2, greedy's is 4
    assert sorted(_sums(balanced(list(lengths.items()), 2), lengths)) == [14, 16]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(0, 9))
def test_minibatches_keep_groups_whole(k: int, per: int, n: int, seed: int | None) -> None:
    pairs = [(group * n + i, group) for group in range(k * per) for i in range(n)]
    cut = minibatches(pairs, prompts_per_minibatch=per, seed=seed)
    assert sorted(s for batch in cut for s in batch) == list(range(k * per * n))
    assert [len(batch) for batch in cut] == [per * n] * k
    groups = [{s // n for s in batch} for batch in cut]
    assert sum(len(g) for g in groups) == k * per


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="cannot fill 3 micro-batches"):
        microbatches([(0, 5), (1, 5)], num_microbatches=3)
    with pytest.raises(ValueError, match="give one of"):
        microbatches([(0, 5)], num_microbatches=1, token_budget=8)
    with pytest.raises(ValueError, match="choose a divisor"):
        minibatches([(0, 0), (1, 1), (2, 2)], prompts_per_minibatch=2)
    with pytest.raises(ValueError, match="distinct"):
        microbatches([(7, 5), (7, 6)], num_microbatches=1)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=24), st.integers(1, 800))
def test_padded_microbatches_keep_to_the_budget(sizes: list[int], budget: int) -> None:
    samples = list(enumerate(sizes))
    cut = microbatches(samples, token_budget=budget, padded=True)
    assert sorted(i for ids in cut for i in ids) == list(range(len(sizes)))
    assert all(len(ids) == 1 or len(ids) * max(sizes[i] for i in ids) <= budget for ids in cut)
