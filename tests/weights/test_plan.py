"""Every tensor is sent once, from a rank that has it, and what arrives is what was sent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse import messages as m
from rlhfuse.payloads import PayloadStore
from rlhfuse.transport import PeerClient, PeerServer, make_keys
from rlhfuse.weights.plan import RankTensors, combined_digest, make_plan
from rlhfuse.weights.send import Inbox, Outbox

names = st.sets(st.text("abc.", min_size=1, max_size=4), max_size=12)


@given(st.lists(names, min_size=1, max_size=5))
def test_each_tensor_once_and_none_missing(owned: list[set[str]]) -> None:
    ranks = [
        RankTensors(f"rank{i}", {name: f"d-{name}" for name in sorted(mine)})
        for i, mine in enumerate(owned)
    ]
    plan = make_plan(ranks)
    sent = [name for _, group in plan.sources for name in group]
    assert len(sent) == len(set(sent))
    assert set(sent) == set().union(*owned)
    for endpoint, group in plan.sources:
        assert set(group) <= owned[int(endpoint.removeprefix("rank"))]


@given(st.permutations([("a", "1"), ("b", "2"), ("c", "3")]))
def test_the_digest_does_not_depend_on_order(items: list[tuple[str, str]]) -> None:
    assert combined_digest(dict(items)) == combined_digest({"a": "1", "b": "2", "c": "3"})


def test_what_arrives_is_what_was_sent_and_a_stale_version_is_refused() -> None:
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(5, 3),
        "strided": torch.randn(6, 4).t(),
        "half": torch.randn(7).bfloat16(),
    }
    outbox = Outbox()
    digests = outbox.offer("actor", 3, tensors)
    keys = make_keys(curve=False)
    server = PeerServer(PayloadStore(outbox.answer).answer, keys)
    plan = make_plan([RankTensors(server.endpoint, digests)])
    sources = tuple(m.TensorSource(endpoint, names) for endpoint, names in plan.sources)
    with PeerClient(5.0, keys) as client:
        inbox = Inbox(client, "actor", 3)
        received = dict(inbox.tensors(sources))
        assert inbox.digest() == plan.digest
        for name, tensor in tensors.items():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor)
        stale = Inbox(client, "actor", 4)
        with pytest.raises(ConnectionError, match="version 3"):
            list(stale.tensors(sources))
    server.close()
