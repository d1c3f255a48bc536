"""Messages arrive as they were sent; what is not a message harms nobody."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse import messages as m
from rlhfuse import peer_messages as peer
from rlhfuse.transport import Hub, Link, PeerClient, PeerServer, make_keys

KEYS = make_keys(curve=False)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(KEYS)
    yield hub
    hub.close()


@pytest.fixture
def link(hub: Hub) -> Iterator[Link]:
    link = Link(hub.endpoint, "rollout-0#0", KEYS)
    link.send(m.Ack(command="hello"))
    assert _events(hub, 1) == [("rollout-0#0", m.Ack(command="hello"))]
    yield link
    link.close()


def test_commands_and_events_arrive_in_order(hub: Hub, link: Link) -> None:
    commands: list[m.Command] = [m.BeginStep(step=i, policy_version=i) for i in range(20)]
    for command in commands:
        hub.send("rollout-0#0", command)
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
        hub.send("rollout-7#0", m.Sleep())


@pytest.mark.slow
def test_a_link_says_that_it_lives_and_what_it_is_at(hub: Hub, link: Link) -> None:
    hub.send("rollout-0#0", m.Sleep())
    while not link.receive(5.0):
        pass
    # The worker is at its command now, until it asks for the next one.
    pulses: list[m.Pulse] = []
    deadline = time.monotonic() + 10.0
    while len(pulses) < 2 and time.monotonic() < deadline:
        pulses += [e for w, e in hub.receive(0.5) if isinstance(e, m.Pulse) and w == "rollout-0#0"]
    assert [pulse.doing for pulse in pulses] == ["Sleep", "Sleep"]
    assert pulses[1].busy_s > pulses[0].busy_s > 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=64), min_size=1, max_size=3), min_size=1, max_size=5))
def test_garbage_is_dropped_and_the_next_message_arrives(garbage: list[list[bytes]]) -> None:
    hub = Hub(KEYS)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(hub.endpoint)
        for frames in garbage:
            stranger.send_multipart(frames)
        link = Link(hub.endpoint, "w#0", KEYS)
        link.send(m.Ack(command="still here"))
        assert _events(hub, 1)[-1] == ("w#0", m.Ack(command="still here"))
        link.close()
    hub.close()


def test_a_peer_answers_refuses_and_times_out() -> None:
    def answer(request: peer.PeerRequest) -> peer.PeerReply:
        assert isinstance(request, peer.FetchFloats)
        if request.kind == "slow":
            time.sleep(1.0)
        if request.kind == "missing":
            return peer.Refused(reason="not here")
        if request.kind == "broken":
            raise KeyError("a fault of ours")
        return peer.Floats(values=tuple(bytes([i] * 4) for i in request.sample_ids))

    server = PeerServer(answer, KEYS)
    with PeerClient(0.3, KEYS) as client:
        reply = client.ask(server.endpoint, peer.FetchFloats(kind="actor", sample_ids=(1, 2)))
        assert reply == peer.Floats(values=(b"\x01" * 4, b"\x02" * 4))
        with pytest.raises(ConnectionError, match="not here"):
            client.ask(server.endpoint, peer.FetchFloats(kind="missing", sample_ids=(1,)))
        with pytest.raises(ConnectionError, match="a fault of ours"):
            client.ask(server.endpoint, peer.FetchFloats(kind="broken", sample_ids=(1,)))
        with pytest.raises(ConnectionError, match="within"):
            client.ask(server.endpoint, peer.FetchFloats(kind="slow", sample_ids=(3,)))
        time.sleep(1.0)
        # The late answer must not be taken for this one's.
        reply = client.ask(server.endpoint, peer.FetchFloats(kind="actor", sample_ids=(9,)))
        assert reply == peer.Floats(values=(b"\x09" * 4,))
    server.close()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=64), min_size=1, max_size=3))
def test_a_peer_server_outlives_garbage(frames: list[bytes]) -> None:
    server = PeerServer(lambda request: peer.Floats(values=()), KEYS)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(server.endpoint)
        stranger.send_multipart(frames)
        with PeerClient(5.0, KEYS) as client:
            question = peer.FetchFloats(kind="actor", sample_ids=())
            assert client.ask(server.endpoint, question) == peer.Floats(values=())
    server.close()


def test_a_peer_that_dies_is_noticed_at_once() -> None:
    """Whoever waits for it must be free for what comes next, not at the end of a long limit."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def accept_and_drop() -> None:
            accepted, _ = listener.accept()
            time.sleep(0.3)
            accepted.close()

        dying = threading.Thread(target=accept_and_drop)
        dying.start()
        start_s = time.monotonic()
        with PeerClient(60.0, KEYS) as client, pytest.raises(ConnectionError, match="is gone"):
            client.ask(f"tcp://127.0.0.1:{port}", peer.FetchCache(sample_id=1))
        dying.join()
    with PeerClient(60.0, KEYS) as client, pytest.raises(ConnectionError, match="is gone"):
        client.ask(f"tcp://127.0.0.1:{port}", peer.FetchCache(sample_id=1))  # nobody listens
    assert time.monotonic() - start_s < 10.0


@pytest.mark.slow
def test_across_machines_only_holders_of_the_key_get_in() -> None:
    keys = make_keys(curve=True)
    server = PeerServer(lambda request: peer.Floats(values=()), keys)
    hub = Hub(keys)
    question = peer.FetchFloats(kind="actor", sample_ids=())
    with PeerClient(5.0, keys) as client:
        assert client.ask(server.endpoint, question) == peer.Floats(values=())
    stolen = make_keys(curve=True)
    known_token = type(keys)(keys.token, stolen.public, stolen.secret)
    no_curve = type(keys)(keys.token)
    for wrong in (stolen, known_token, no_curve):
        with PeerClient(0.5, wrong) as client, pytest.raises(ConnectionError):
            client.ask(server.endpoint, question)
        intruder = Link(hub.endpoint, "rollout-0#0", wrong)
        intruder.send(m.Ack(command="let me in"))
        assert hub.receive(0.3) == []
        intruder.close()
    # The key of the server alone, which CURVE clients know, does not let one in.
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.curve_serverkey = keys.public.encode()
        stranger.connect(hub.endpoint)
        stranger.send(b"anything")
        assert hub.receive(0.3) == []
    link = Link(hub.endpoint, "rollout-0#0", keys)
    link.send(m.Ack(command="hello"))
    assert _events(hub, 1) == [("rollout-0#0", m.Ack(command="hello"))]
    link.close()
    server.close()
    hub.close()


@pytest.mark.parametrize("size", [1100, 10_000])  # a little too large, and far too large
def test_an_oversized_message_is_dropped_and_the_next_one_arrives(size: int) -> None:
    hub = Hub(KEYS, most_bytes=1000)
    link = Link(hub.endpoint, "w#0", KEYS)
    link.send(m.Ack(command="x" * size))
    deadline = time.monotonic() + 10.0
    heard: list[tuple[str, m.Event]] = []
    while not heard and time.monotonic() < deadline:
        link.send(m.Ack(command="still here"))
        heard = [(w, e) for w, e in hub.receive(0.5) if not isinstance(e, m.Pulse)]
    assert heard
    assert set(heard) == {("w#0", m.Ack(command="still here"))}
    link.close()
    hub.close()


def test_sockets_are_bound_to_loopback_unless_there_are_keys() -> None:
    hub = Hub(KEYS)
    assert hub.endpoint.startswith("tcp://127.0.0.1:")
    hub.close()
    with pytest.raises(AssertionError, match="keys are needed"):
        Hub(KEYS, "0.0.0.0")


def _events(hub: Hub, count: int) -> list[tuple[str, m.Event]]:
    received: list[tuple[str, m.Event]] = []
    deadline = time.monotonic() + 10.0
    while len(received) < count and time.monotonic() < deadline:
        received += [(w, e) for w, e in hub.receive(0.5) if not isinstance(e, m.Pulse)]
    return received
