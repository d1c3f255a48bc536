"""Weights arrive as they were sent, whatever their size, and a mistake shows in the digest."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from rlhfuse.messages import TensorSource
from rlhfuse.payloads import PayloadStore
from rlhfuse.peer_messages import PeerReply, PeerRequest, TensorBytes
from rlhfuse.transport import PeerClient, PeerServer, make_keys
from rlhfuse.weights import send
from rlhfuse.weights.plan import combined_digest
from rlhfuse.weights.send import Inbox, Outbox

TENSORS = {
    "embedding": torch.randn(37, 16),
    "transposed": torch.randn(8, 5).T,
    "scalar": torch.tensor(2.5),
    "narrow": torch.randn(3, 7).to(torch.bfloat16),
    "one": torch.ones(1),
}


@dataclass
class Wire:
    """An outbox behind a socket. `most`: bytes of the largest reply; `damage`: flip a bit."""

    outbox: Outbox
    most: int = 0
    damage: bool = False

    def answer(self, request: PeerRequest) -> PeerReply:
        reply = PayloadStore(self.outbox.answer).answer(request)
        if isinstance(reply, TensorBytes):
            self.most = max(self.most, len(reply.data))
            if self.damage:
                data = bytes([reply.data[0] ^ 1]) + reply.data[1:]
                return TensorBytes(name=reply.name, dtype=reply.dtype, shape=reply.shape, data=data)
        return reply


@pytest.fixture
def peers() -> Iterator[tuple[Wire, PeerServer, PeerClient]]:
    wire, keys = Wire(Outbox()), make_keys(curve=False)
    server, client = PeerServer(wire.answer, keys), PeerClient(10.0, keys)
    yield wire, server, client
    client.close()
    server.close()


@pytest.mark.parametrize("bucket", [1, 7, 64, 1 << 25])
def test_tensors_arrive_in_bounded_pieces(
    peers: tuple[Wire, PeerServer, PeerClient], bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send, "BUCKET_BYTES", bucket)
    wire, server, client = peers
    digests = wire.outbox.offer("actor", 3, TENSORS)
    inbox = Inbox(client, "actor", 3)
    arrived = dict(inbox.tensors([TensorSource(server.endpoint, tuple(TENSORS))]))
    assert list(arrived) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)
    assert inbox.digest() == combined_digest(digests)
    assert wire.most <= bucket


def test_what_is_damaged_or_stale_shows(peers: tuple[Wire, PeerServer, PeerClient]) -> None:
    wire, server, client = peers
    digests = wire.outbox.offer("actor", 3, TENSORS)
    source = [TensorSource(server.endpoint, tuple(TENSORS))]
    with pytest.raises(ConnectionError, match="version 2: have version 3"):
        list(Inbox(client, "actor", 2).tensors(source))
    wire.damage = True
    damaged = Inbox(client, "actor", 3)
    list(damaged.tensors(source))
    assert damaged.digest() != combined_digest(digests)
    wire.outbox.withdraw()
    with pytest.raises(ConnectionError, match="have nothing"):
        list(damaged.tensors(source))


def test_a_digest_tells_types_and_shapes_apart() -> None:
    base = torch.zeros(2, 3)
    others = [base.reshape(3, 2), base.to(torch.int32), base + 1]
    assert len({send.tensor_digest(tensor) for tensor in [base, *others]}) == 4
