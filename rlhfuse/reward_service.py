"""Scores from a service: one POST per batch, retries, a limit on every wait.

Request: ``{"samples": [{"id", "data_source", "solution_str", "ground_truth", "extra_info"}]}``.
Reply: ``{"results": [{"id", "score", ...}]}`` in any order; further numbers are metrics. A sample
keeps its id over all attempts, so a service can answer a repeated request without computing twice;
the header ``Idempotency-Key`` says the same of the batch as a whole.
"""

import contextlib
import hashlib
import http.client
import os
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Sequence

import msgspec

from rlhfuse.config import RewardConfig
from rlhfuse.reward_desk import Desk, RewardInput, ThreadedSource, call_of
from rlhfuse.reward_process import Answer, Call, read_result

_LONGEST_WAIT_S = 8.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class _Refused(Exception):
    """An attempt failed; `again`: another one may succeed."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class ServiceClient:
    """Asks the service at `config.url`; may be used by many threads at once.

    Raises `ValueError` where `config.auth_env` names a variable that is not set.
    """

    def __init__(self, config: RewardConfig, *, backoff_s: float = 0.5) -> None:
        self._config = config
        self._url = urllib.parse.urlsplit(config.url)
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"reward.url: {config.url!r} is no http:// or https:// address")
        token = os.environ.get(config.auth_env, "") if config.auth_env else ""
        if config.auth_env and not token:
            raise ValueError(f"reward.auth_env: the variable {config.auth_env} is not set")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._backoff_s = backoff_s
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def score(self, calls: Sequence[Call]) -> list[Answer]:
        """One answer per call, in order; each call has an ``id``."""
        body = msgspec.json.encode({"samples": calls})
        key = hashlib.sha256("\n".join(str(call["id"]) for call in calls).encode()).hexdigest()
        attempts = self._config.retries + 1
        reason = "closed"
        for attempt in range(attempts):
            if self._closed.wait(self._pause_s(attempt)):
                break
            try:
                return _read(calls, self._post(body, key))
            except _Refused as error:
                reason = f"service {self._config.url} {error}"
                if not error.again:
                    break
        else:
            reason += f", {attempts} attempts"
        return [(None, {}, reason)] * len(calls)

    def close(self) -> None:
        """Break off all requests and waits."""
        self._closed.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_RDWR)

    def _pause_s(self, attempt: int) -> float:
        doubled = self._backoff_s * 2.0 ** (attempt - 1)
        return min(doubled, _LONGEST_WAIT_S) if attempt else 0.0

    def _post(self, body: bytes, key: str) -> bytes:
        deadline = time.monotonic() + self._config.timeout_s
        secure = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._url.hostname is not None
        connection = kind(self._url.hostname, self._url.port, timeout=self._config.timeout_s)
        sock: socket.socket | None = None
        path = urllib.parse.urlunsplit(("", "", self._url.path or "/", self._url.query, ""))
        try:
            connection.connect()
            sock = connection.sock
            with self._lock:
                self._open.add(sock)
            connection.request("POST", path, body, {**self._headers, "Idempotency-Key": key})
            return self._reply(connection, sock, deadline)
        except TimeoutError as error:
            limit = f"{self._config.timeout_s:g} s (reward.timeout_s)"
            raise _Refused(f"did not answer within {limit}", again=True) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            what = f"dropped the connection ({type(error).__name__}: {error})"
            raise _Refused(what, again=True) from error
        finally:
            if sock is not None:
                with self._lock:
                    self._open.discard(sock)
            connection.close()

    def _reply(
        self, connection: http.client.HTTPConnection, sock: socket.socket, deadline: float
    ) -> bytes:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        response = connection.getresponse()
        parts = []
        # The socket's limit is per read: a service that trickles must not outlast the deadline.
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = response.read1(65536)
            if not part:
                break
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        self._check_status(response)
        return b"".join(parts)

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        if response.status == 200:
            return
        hint = ""
        if response.status in (401, 403):
            variable = self._config.auth_env
            hint = f"; check the token in {variable}" if variable else "; set reward.auth_env"
        status = f"answered {response.status} {response.reason}{hint}"
        raise _Refused(status, again=response.status in _RETRIED)


def _read(calls: Sequence[Call], body: bytes) -> list[Answer]:
    try:
        reply = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise _Refused(f"answered no JSON: {error}", again=False) from error
    results = reply.get("results") if isinstance(reply, dict) else None
    if not isinstance(results, list):
        raise _Refused('answered JSON without a list of "results"', again=False)
    found = {str(item.get("id")): item for item in results if isinstance(item, dict)}
    return [_answer(found.get(str(call["id"]))) for call in calls]


def _answer(item: dict[str, object] | None) -> Answer:
    if item is None:
        return None, {}, "service left it out of its answer"
    values = {key: value for key, value in item.items() if key != "id"}
    score, metrics, error = read_result(values)
    return score, metrics, error and f"service {error}"


class RewardService(ThreadedSource):
    """The service at `config.url`: up to `config.batch_size` samples a request and
    `config.max_concurrency` requests at a time. Raises `ValueError` where its token is not set."""

    def __init__(self, config: RewardConfig, *, backoff_s: float = 0.5) -> None:
        client = ServiceClient(config, backoff_s=backoff_s)
        super().__init__(config, client.close)
        shared = (self._desk, client, config.batch_size)
        self._threads = [
            threading.Thread(target=_request, args=shared, daemon=True)
            for _ in range(config.max_concurrency)
        ]
        for thread in self._threads:
            thread.start()


def _request(desk: Desk, client: ServiceClient, batch_size: int) -> None:
    """One thread's life: gather what waits, ask, hand out the answers."""
    while (sample := desk.waiting.get()) is not None:
        batch = [sample]
        ended = False
        with contextlib.suppress(queue.Empty):
            while len(batch) < batch_size and not ended:
                more = desk.waiting.get_nowait()
                ended = more is None
                batch += [] if more is None else [more]
        try:
            answers = client.score([{"id": _key(one), **call_of(one)} for one in batch])
        except TypeError as error:  # a value that JSON has no word for
            answers = [(None, {}, f"service cannot be given the row: {error}")] * len(batch)
        for one, answer in zip(batch, answers, strict=True):
            desk.answer(one, answer)
        if ended:
            return


def _key(sample: RewardInput) -> str:
    """The sample's id and what is scored: validation asks for the same ids again and again."""
    text = msgspec.json.encode(call_of(sample))
    return f"{sample.sample_id}-{hashlib.sha256(text).hexdigest()[:16]}"
