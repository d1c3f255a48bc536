"""Messages arrive as they were sent; what is not a message harms nobody."""

import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse import messages as m
from rlhfuse.transport import Hub, Link, PeerClient, PeerServer


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def link(hub: Hub) -> Iterator[Link]:
    link = Link(hub.endpoint, "rollout-0")
    link.send(m.Ack(command="hello"))
    assert _events(hub, 1) == [("rollout-0", m.Ack(command="hello"))]
    yield link
    link.close()


def test_commands_and_events_arrive_in_order(hub: Hub, link: Link) -> None:
    commands: list[m.Command] = [m.BeginStep(step=i, policy_version=i) for i in range(20)]
    for command in commands:
        hub.send("rollout-0", command)
    received: list[m.Command] = []
    while len(received) < len(commands):
        received += link.receive(5.0)
    assert received == commands
    events: list[m.Event] = [m.Ack(command=str(i)) for i in range(20)]
    for event in events:
        link.send(event)
    assert [event for _, event in _events(hub, 20)] == events


def test_a_command_to_an_unknown_worker_fails(hub: Hub) -> None:
    with pytest.raises(ConnectionError, match="rollout-7"):
        hub.send("rollout-7", m.Sleep())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=64), min_size=1, max_size=5))
def test_garbage_is_dropped_and_the_next_message_arrives(garbage: list[bytes]) -> None:
    hub = Hub()
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(hub.endpoint)
    for data in garbage:
        stranger.send(data)
    link = Link(hub.endpoint, "w")
    link.send(m.Ack(command="still here"))
    assert _events(hub, 1)[-1] == ("w", m.Ack(command="still here"))
    stranger.close()
    context.term()
    link.close()
    hub.close()


def test_a_peer_answers_refuses_and_times_out() -> None:
    def answer(request: m.PeerRequest) -> m.PeerReply:
        assert isinstance(request, m.FetchFloats)
        if request.kind == "slow":
            time.sleep(1.0)
        if request.kind == "missing":
            return m.Refused(reason="not here")
        return m.Floats(values=tuple(bytes([i]) for i in request.sample_ids))

    server = PeerServer(answer)
    with PeerClient(timeout_s=0.3) as client:
        reply = client.ask(server.endpoint, m.FetchFloats(kind="actor", sample_ids=(1, 2)))
        assert reply == m.Floats(values=(b"\x01", b"\x02"))
        with pytest.raises(ConnectionError, match="not here"):
            client.ask(server.endpoint, m.FetchFloats(kind="missing", sample_ids=(1,)))
        with pytest.raises(ConnectionError, match="within"):
            client.ask(server.endpoint, m.FetchFloats(kind="slow", sample_ids=(3,)))
        time.sleep(1.0)
        # The late answer must not be taken for this one's.
        reply = client.ask(server.endpoint, m.FetchFloats(kind="actor", sample_ids=(9,)))
        assert reply == m.Floats(values=(b"\x09",))
    server.close()


def _events(hub: Hub, count: int) -> list[tuple[str, m.Event]]:
    received: list[tuple[str, m.Event]] = []
    deadline = time.monotonic() + 10.0
    while len(received) < count and time.monotonic() < deadline:
        received += hub.receive(0.5)
    return received
