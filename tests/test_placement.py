"""Every device has a seat, neighbours sit together, and no core is given twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse.placement import NodeInfo, seats


def _nodes(cores: list[int], gpus: list[int], shared: bool) -> list[NodeInfo]:
    return [
        NodeInfo(f"n{i}", f"10.0.0.{i}", "m" if shared else f"m{i}", tuple(range(c)), g)
        for i, (c, g) in enumerate(zip(cores, gpus, strict=True))
    ]


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@given(st.integers(1, 12), SIZES, st.booleans(), st.booleans())
def test_seats(num_devices: int, cores: list[int], shared: bool, pin: bool) -> None:
    nodes = _nodes(cores, [0] * len(cores), shared)
    found = seats(num_devices, nodes, gpus=False, pin=pin)
    assert len(found) == num_devices
    homes = [nodes.index(seat.node) for seat in found]
    assert homes == sorted(homes)
    for node in nodes:
        mine = [seat.local_index for seat in found if seat.node == node]
        assert mine == list(range(len(mine)))
    pinned = [(seat.node.machine, seat.core) for seat in found if seat.core is not None]
    assert len(pinned) == len(set(pinned))
    assert pin or not pinned


@given(st.integers(1, 12), SIZES)
def test_gpus_are_not_given_twice(num_devices: int, gpus: list[int]) -> None:
    nodes = _nodes([1] * len(gpus), gpus, shared=False)
    if sum(gpus) < num_devices:
        with pytest.raises(ValueError, match=f"has {sum(gpus)} GPUs"):
            seats(num_devices, nodes, gpus=True, pin=False)
        return
    found = [
        (s.node.node_id, s.local_index) for s in seats(num_devices, nodes, gpus=True, pin=False)
    ]
    assert len(set(found)) == num_devices
    assert all(index < gpus[int(name[1:])] for name, index in found)
