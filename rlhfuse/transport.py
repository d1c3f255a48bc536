"""ZMQ and msgpack: nothing else in rlhfuse knows sockets.

A *hub* (controller) and its *links* (workers) carry commands and events; a *peer server* answers
requests for data from other workers. Sockets bind to loopback unless told otherwise; across
machines every connection is CURVE, with a key pair made for the run, and whoever lacks it is
refused. What is no message of this run (see `rlhfuse.wire`) is dropped and logged: it can neither
crash a worker nor reach `pickle`, which no module on its way imports.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from rlhfuse.messages import Command, Event, Pulse
from rlhfuse.peer_messages import PeerReply, PeerRequest, Refused
from rlhfuse.placement import RunKeys
from rlhfuse.wire import MAX_CONTROL_BYTES, MAX_PAYLOAD_BYTES, Codec, NotAMessage

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PULSE_S = 1.0
_PULSE_MARK = "~"  # ends the identity of a worker's pulse
_LINGER_MS = 1000
_MOST_AT_ONCE = 4096  # a flood must not keep its receiver from anything else
_TOKEN_BYTES = 16
_GONE = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED


def make_keys(*, curve: bool) -> RunKeys:
    """Fresh keys for one run; `curve` where it spans machines."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    if not curve:
        return RunKeys(token)
    public, secret = zmq.curve_keypair()
    return RunKeys(token, public.decode(), secret.decode())


class _Context:
    """A ZMQ context with the run's keys: makes sockets that only the run can talk to."""

    def __init__(self, keys: RunKeys) -> None:
        self._keys = keys
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._door: ThreadAuthenticator | None = None

    def socket(
        self, kind: int, most_bytes: int, *, linger_ms: int = _LINGER_MS
    ) -> zmq.Socket[bytes]:
        socket = self._zmq.socket(kind)
        socket.setsockopt(zmq.LINGER, linger_ms)
        # ZMQ drops without a word: what is little too large is left to the codec, which logs it.
        socket.setsockopt(zmq.MAXMSGSIZE, 4 * most_bytes)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        return socket

    def bind(self, socket: zmq.Socket[bytes], host: str) -> str:
        """Bind to a free port; the endpoint."""
        assert self._keys.secret or host == LOOPBACK, "beyond this machine keys are needed"
        if self._keys.secret:
            if self._door is None:
                self._door = ThreadAuthenticator(self._zmq)
                self._door.start()
                self._door.configure_curve_callback("*", _Guests(self._keys.public))
            socket.curve_secretkey = self._keys.secret.encode()
            socket.curve_server = True
        return f"tcp://{host}:{socket.bind_to_random_port(f'tcp://{host}')}"

    def connect(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        if self._keys.secret:
            socket.curve_publickey = socket.curve_serverkey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        socket.connect(endpoint)

    def close(self) -> None:
        if self._door is not None:
            self._door.stop()
        self._zmq.term()


class _Guests:
    """Lets in who holds the run's key."""

    def __init__(self, public: str) -> None:
        self._public = public.encode()

    def callback(self, _domain: str, key: bytes) -> bool:
        return secrets.compare_digest(key, self._public)


class Hub:
    """The controller's end: sends commands to workers by identity, receives their events."""

    def __init__(
        self, keys: RunKeys, host: str = LOOPBACK, *, most_bytes: int = MAX_CONTROL_BYTES
    ) -> None:
        self.keys = keys
        self._context = _Context(keys)
        self._commands: Codec[Command] = Codec(Command, keys)
        self._events: Codec[Event] = Codec(Event, keys, most_bytes)
        self._socket = self._context.socket(zmq.ROUTER, most_bytes)
        # A command to an unknown worker is our own mistake: fail instead of dropping it.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.endpoint = self._context.bind(self._socket, host)

    def send(self, identity: str, command: Command) -> None:
        """Queue a command.

        Raises:
            ConnectionError: the worker has not said hello, or is gone.
        """
        try:
            self._socket.send_multipart([identity.encode(), self._commands.encode(command)])
        except zmq.ZMQError as error:
            raise ConnectionError(f"worker {identity!r} cannot be reached: {error}") from error

    def receive(self, timeout_s: float) -> list[tuple[str, Event]]:
        """The events at hand; waits up to `timeout_s` for the first. A pulse comes under the
        identity of its worker."""
        received: list[tuple[str, Event]] = []
        for frames in _frames(self._socket, timeout_s):
            try:
                identity = frames[0].decode().removesuffix(_PULSE_MARK)
                received.append((identity, self._events.decode(frames[-1])))
            except ValueError as error:
                logger.warning("dropped a malformed event from %r: %s", frames[0][:80], error)
        return received

    def close(self) -> None:
        self._socket.close()
        self._context.close()


class Link:
    """A worker's end of the hub. A thread tells the hub every second that the process lives, and
    for how long the worker has not come back to `receive`."""

    def __init__(self, endpoint: str, identity: str, keys: RunKeys) -> None:
        self._context = _Context(keys)
        self._commands: Codec[Command] = Codec(Command, keys)
        self._events: Codec[Event] = Codec(Event, keys)
        self._socket = self._connect(endpoint, identity)
        self._doing = "starting"
        self._since_s: float | None = time.monotonic()  # None: waiting for commands
        self._stop = threading.Event()
        self._pulse = threading.Thread(
            target=self._beat, args=(endpoint, identity), name="pulse", daemon=True
        )
        self._pulse.start()

    def send(self, event: Event) -> None:
        self._socket.send(self._events.encode(event))

    def receive(self, timeout_s: float) -> list[Command]:
        """All commands at hand; waits up to `timeout_s` for the first."""
        received: list[Command] = []
        self._since_s = None
        for frames in _frames(self._socket, timeout_s):
            try:
                received.append(self._commands.decode(frames[-1]))
            except NotAMessage as error:
                logger.warning("dropped a malformed command: %s", error)
        if received:
            self._doing = type(received[-1]).__name__
        self._since_s = time.monotonic()
        return received

    def close(self) -> None:
        self._stop.set()
        self._pulse.join()
        self._socket.close()
        self._context.close()

    def _connect(self, endpoint: str, identity: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER, MAX_CONTROL_BYTES)
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._context.connect(socket, endpoint)
        return socket

    def _beat(self, endpoint: str, identity: str) -> None:
        socket = self._connect(endpoint, identity + _PULSE_MARK)
        while not self._stop.wait(PULSE_S):
            since_s = self._since_s
            busy_s = 0.0 if since_s is None else time.monotonic() - since_s
            socket.send(self._events.encode(Pulse(doing=self._doing, busy_s=busy_s)))
        socket.close(linger=0)


class PeerServer:
    """Answers other workers' requests on a thread of its own."""

    def __init__(
        self,
        answer: Callable[[PeerRequest], PeerReply],
        keys: RunKeys,
        host: str = LOOPBACK,
    ) -> None:
        self._answer = answer
        self._context = _Context(keys)
        self._requests: Codec[PeerRequest] = Codec(PeerRequest, keys)
        self._replies: Codec[PeerReply] = Codec(PeerReply, keys, MAX_PAYLOAD_BYTES)
        socket = self._context.socket(zmq.ROUTER, MAX_CONTROL_BYTES)
        self.endpoint = self._context.bind(socket, host)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._serve, args=(socket,), name="peer-server", daemon=True
        )
        self._thread.start()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        while not self._stop.is_set():
            for frames in _frames(socket, 0.2):
                socket.send_multipart([*frames[:-1], self._reply(frames[-1])])
        socket.close()

    def _reply(self, frame: bytes) -> bytes:
        try:
            return self._replies.encode(self._answer(self._requests.decode(frame)))
        except NotAMessage as error:
            logger.warning("refused a malformed request: %s", error)
            reason = f"malformed request: {error}"
        except Exception as error:  # whoever asks must hear of it, and others be answered
            logger.exception("a request could not be answered")
            reason = f"{type(error).__name__}: {error}"
        return self._replies.encode(Refused(reason=reason))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.close()


class _Peer:
    """One connection, and whether the other end is still there."""

    def __init__(self, context: _Context, endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER, MAX_PAYLOAD_BYTES, linger_ms=0)
        self._monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(_GONE)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        context.connect(self.socket, endpoint)

    def lost(self) -> bool:
        """Whether the connection has broken, or none came about."""
        found = False
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            found = True
        return found

    def wait(self, timeout_s: float) -> bool:
        """Whether an answer is there; False: the peer is gone, or time is up."""
        self._poller.poll(max(0, int(timeout_s * 1000)))
        return bool(self.socket.poll(0))

    def close(self) -> None:
        self.socket.disable_monitor()
        self.socket.close()


class PeerClient:
    """Asks other workers for data; one connection per endpoint, kept open."""

    def __init__(self, timeout_s: float, keys: RunKeys) -> None:
        self._timeout_s = timeout_s
        self._context = _Context(keys)
        self._requests: Codec[PeerRequest] = Codec(PeerRequest, keys)
        self._replies: Codec[PeerReply] = Codec(PeerReply, keys, MAX_PAYLOAD_BYTES)
        self._peers: dict[str, _Peer] = {}

    def ask(self, endpoint: str, request: PeerRequest) -> PeerReply:
        """The answer of the worker at `endpoint`.

        Raises:
            ConnectionError: the peer is gone, does not answer within the time limit, or refused.
        """
        peer = self._peer(endpoint)
        name = type(request).__name__
        peer.socket.send_multipart([b"", self._requests.encode(request)])
        if not peer.wait(self._timeout_s):
            gone = peer.lost()
            self._forget(endpoint)
            why = "is gone" if gone else f"did not answer within {self._timeout_s:g} s"
            raise ConnectionError(f"the worker at {endpoint} {why} ({name})")
        try:
            reply = self._replies.decode(peer.socket.recv_multipart()[-1])
        except NotAMessage as error:
            raise ConnectionError(f"{endpoint} answered {name} with no message: {error}") from error
        if isinstance(reply, Refused):
            raise ConnectionError(f"{endpoint} refused {name}: {reply.reason}")
        return reply

    def _peer(self, endpoint: str) -> _Peer:
        known = self._peers.get(endpoint)
        if known is not None and known.lost():
            self._forget(endpoint)
            known = None
        if known is None:
            known = self._peers[endpoint] = _Peer(self._context, endpoint)
        return known

    def _forget(self, endpoint: str) -> None:
        # A late answer must not be taken for the answer to the next request.
        self._peers.pop(endpoint).close()

    def close(self) -> None:
        for endpoint in list(self._peers):
            self._forget(endpoint)
        self._context.close()

    def __enter__(self) -> "PeerClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _frames(socket: zmq.Socket[bytes], timeout_s: float) -> Iterator[list[bytes]]:
    """What is at hand, a bounded number of messages; waits up to `timeout_s` for the first."""
    if timeout_s > 0:
        socket.poll(int(timeout_s * 1000))
    for _ in range(_MOST_AT_ONCE):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        yield frames
