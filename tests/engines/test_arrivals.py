"""What came with a request is loaded once, after what the prefix cache has, and counted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse.engines.vllm_arrivals import Arrivals
from rlhfuse.engines.vllm_cache import Blocks, header_of

BLOCK = 4


def _blocks(num_tokens: int) -> Blocks:
    cache = torch.zeros(-(-num_tokens // BLOCK), 2)
    header = header_of({"layer": cache}, np.arange(num_tokens, dtype=np.int32), 0)
    return Blocks(header, (cache,))


@given(num_tokens=st.integers(1, 40), had=st.integers(0, 40), more=st.integers(0, 3))
def test_what_is_offered_is_what_is_loaded(num_tokens: int, had: int, more: int) -> None:
    had = min(had, num_tokens) // BLOCK * BLOCK  # a prefix cache has whole blocks
    arrivals, blocks = Arrivals(BLOCK), _blocks(num_tokens)
    arrivals.arrive("a", blocks)
    assert arrivals.offer("a", had) == num_tokens - had
    paged = list(range(100, 100 + len(blocks.layers[0]) + more))  # also room for what follows
    load = arrivals.admit("a", paged)
    assert load is not None
    assert load.first == had // BLOCK
    assert load.block_ids == paged[load.first : len(blocks.layers[0])]
    assert arrivals.loaded_tokens == num_tokens - had
    assert arrivals.admit("a", paged) is None
    assert arrivals.offer("a", had) == 0


@pytest.mark.parametrize("asked", [True, False])
def test_nothing_is_loaded_for_a_request_that_is_over_or_came_alone(asked: bool) -> None:
    arrivals = Arrivals(BLOCK)
    arrivals.arrive("a", _blocks(9))
    if asked:
        assert arrivals.offer("a", 0) == 9
    arrivals.forget("a")
    for request in ("a", "b"):
        assert arrivals.offer(request, 0) == 0
        assert arrivals.admit(request, [1, 2, 3]) is None
    assert arrivals.loaded_tokens == 0


def test_half_a_block_in_the_prefix_cache_is_not_continued() -> None:
    arrivals = Arrivals(BLOCK)
    arrivals.arrive("a", _blocks(9))
    assert arrivals.offer("a", BLOCK + 1) == 0
    assert arrivals.admit("a", [1, 2, 3]) is None
