"""ZMQ and msgpack: nothing else in rlhfuse knows sockets.

A *hub* (controller) and its *links* (workers) carry commands and events; a *peer server* answers
requests for data from other workers. Sockets bind to loopback unless told otherwise. A message
that does not decode, or is larger than `MAX_MESSAGE_BYTES`, is dropped and logged: it can neither
crash a worker nor reach `pickle`, which is used nowhere.
"""

import logging
import socket as sockets
import threading
import time
from collections.abc import Callable
from types import TracebackType

import msgspec
import zmq

from rlhfuse.messages import Command, Event, PeerReply, PeerRequest, Refused

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 30
_LINGER_MS = 1000

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_requests: msgspec.msgpack.Decoder[PeerRequest] = msgspec.msgpack.Decoder(PeerRequest)
_replies: msgspec.msgpack.Decoder[PeerReply] = msgspec.msgpack.Decoder(PeerReply)


class Hub:
    """The controller's end: sends commands to named workers, receives their events."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # A command to an unknown worker is our own mistake: fail instead of dropping it.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"

    def send(self, worker: str, command: Command) -> None:
        """Queue a command.

        Raises:
            ConnectionError: `worker` has not said hello, or is gone.
        """
        try:
            self._socket.send_multipart([worker.encode(), _encoder.encode(command)])
        except zmq.ZMQError as error:
            raise ConnectionError(f"worker {worker!r} cannot be reached: {error}") from error

    def receive(self, timeout_s: float) -> list[tuple[str, Event]]:
        """All events at hand; waits up to `timeout_s` for the first."""
        received: list[tuple[str, Event]] = []
        wait_ms = int(timeout_s * 1000)
        while self._socket.poll(wait_ms):
            frames = self._socket.recv_multipart()
            wait_ms = 0
            try:
                received.append((frames[0].decode(), _events.decode(frames[-1])))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                logger.warning("dropped a malformed event from %r: %s", frames[0][:80], error)
        return received

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Link:
    """A worker's end of the hub."""

    def __init__(self, endpoint: str, worker: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, worker.encode())
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)

    def send(self, event: Event) -> None:
        self._socket.send(_encoder.encode(event))

    def receive(self, timeout_s: float) -> list[Command]:
        """All commands at hand; waits up to `timeout_s` for the first."""
        received: list[Command] = []
        wait_ms = int(timeout_s * 1000)
        while self._socket.poll(wait_ms):
            frame = self._socket.recv()
            wait_ms = 0
            try:
                received.append(_commands.decode(frame))
            except msgspec.DecodeError as error:
                logger.warning("dropped a malformed command: %s", error)
        return received

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class PeerServer:
    """Answers other workers' requests on a thread of its own."""

    def __init__(self, answer: Callable[[PeerRequest], PeerReply], host: str = "127.0.0.1") -> None:
        self._answer = answer
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        port = socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._serve, args=(socket,), name="peer-server", daemon=True
        )
        self._thread.start()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        while not self._stop.is_set():
            if not socket.poll(200):
                continue
            frames = socket.recv_multipart()
            reply = self._reply(frames[-1])
            socket.send_multipart([*frames[:-1], _encoder.encode(reply)])
        socket.close()

    def _reply(self, frame: bytes) -> PeerReply:
        try:
            request = _requests.decode(frame)
        except msgspec.DecodeError as error:
            logger.warning("refused a malformed request: %s", error)
            return Refused(reason=f"malformed request: {error}")
        return self._answer(request)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.term()


class PeerClient:
    """Asks other workers for data; one connection per endpoint, kept open."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def ask(self, endpoint: str, request: PeerRequest) -> PeerReply:
        """The answer of the worker at `endpoint`.

        Raises:
            ConnectionError: no answer within the time limit, or the peer refused.
        """
        socket = self._socket(endpoint)
        socket.send_multipart([b"", _encoder.encode(request)])
        deadline = time.monotonic() + self._timeout_s
        if not socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            self._forget(endpoint)
            raise ConnectionError(
                f"no answer from {endpoint} within {self._timeout_s:g} s to "
                f"{type(request).__name__}"
            )
        reply = _replies.decode(socket.recv_multipart()[-1])
        if isinstance(reply, Refused):
            raise ConnectionError(f"{endpoint} refused {type(request).__name__}: {reply.reason}")
        return reply

    def _socket(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint not in self._sockets:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.connect(endpoint)
            self._sockets[endpoint] = socket
        return self._sockets[endpoint]

    def _forget(self, endpoint: str) -> None:
        # A late answer must not be taken for the answer to the next request.
        self._sockets.pop(endpoint).close()

    def close(self) -> None:
        for endpoint in list(self._sockets):
            self._forget(endpoint)
        self._context.term()

    def __enter__(self) -> "PeerClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def free_port() -> int:
    """A port on this machine that nobody uses at the moment."""
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
