"""Every sample gets exactly one answer, whatever a service does, and no request is left behind."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhfuse.config import RewardConfig
from rlhfuse.reward_desk import RewardFailed
from rlhfuse.reward_service import RewardService
from rlhfuse.rewards import open_rewards
from tests.reward_cases import collect, config, inputs


class _Server(http.server.ThreadingHTTPServer):
    """A reward service that misbehaves by the list `moods`, one mood per request, then serves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moods: list[str] = []
        self.requests: list[tuple[str, list[str]]] = []
        self.tokens: set[str] = set()
        self.busy = 0
        self.most_busy = 0
        self.lock = threading.Lock()
        self.free = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score?v=1"

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        yield
        with self.lock:
            self.busy -= 1


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        samples = json.loads(body)["samples"]
        with self.server.lock:
            mood = self.server.moods.pop(0) if self.server.moods else "serve"
            key = self.headers["Idempotency-Key"]
            self.server.requests.append((key, [sample["id"] for sample in samples]))
            self.server.tokens.add(self.headers.get("Authorization", ""))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            self._serve(mood, samples)

    def _serve(self, mood: str, samples: list[dict[str, Any]]) -> None:
        if mood == "hang":
            self.server.free.wait(20)
        elif mood == "trickle":
            self._head(200, 10_000)
            while not self.server.free.wait(0.1):
                self.wfile.write(b" ")
        elif mood == "drop":
            self.connection.close()
        elif mood == "cut":
            self._head(200, 10_000)
            self.wfile.write(b'{"results": [')
            self.connection.close()
        elif mood.isdecimal():
            self._reply(int(mood), b"{}")
        elif mood == "nonsense":
            self._reply(200, b"<html>")
        else:
            with self.server.working():  # ends before the reply: the next request may follow it
                reply = _scored(samples, mood)
            self._reply(200, reply)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _reply(self, status: int, body: bytes) -> None:
        self._head(status, len(body))
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _scored(samples: list[dict[str, Any]], mood: str) -> bytes:
    time.sleep(0.02)
    results = [
        {"id": s["id"], "score": s["extra_info"]["bonus"] + (s["solution_str"] == "right")}
        for s in samples
    ]
    if mood == "forget":
        results.pop(0)
    if mood == "null":
        results[0]["score"] = None
    return json.dumps({"results": results[::-1]}).encode()


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield found
        found.free.set()
        found.shutdown()
        thread.join()


@pytest.fixture
def service(server: _Server) -> Iterator[Callable[..., RewardService]]:
    opened: list[RewardService] = []

    def open_service(**changes: Any) -> RewardService:
        changes = {"url": server.url, "timeout_s": 0.6, "max_concurrency": 1, **changes}
        opened.append(RewardService(config(**changes), backoff_s=0.01))
        return opened[-1]

    yield open_service
    for one in opened:
        one.close()


def test_samples_go_in_batches_and_each_comes_back_once(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    source = service(batch_size=4, max_concurrency=3)
    source.submit(inputs(*["right"] * 40))
    results = collect(source, 40)
    assert {i: r.score for i, r in results.items()} == {i: i + 1.0 for i in range(40)}
    assert all(len(ids) <= 4 for _, ids in server.requests)
    assert len(server.requests) < 30
    assert server.most_busy <= 3


@pytest.mark.parametrize("moods", [["500", "503"], ["drop", "cut"], ["hang", "429"], ["trickle"]])
def test_passing_trouble_is_retried_with_the_same_ids(
    server: _Server, service: Callable[..., RewardService], moods: list[str]
) -> None:
    server.moods = list(moods)
    source = service()
    source.submit(inputs("right"))
    (result,) = collect(source, 1).values()
    assert (result.score, result.error) == (1.0, "")
    assert len(server.requests) == len(moods) + 1
    assert len({(key, *ids) for key, ids in server.requests}) == 1
    assert server.requests[0][1][0].startswith("0-")


def test_the_same_sample_with_another_response_is_another_request(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    source = service()
    for solution in ("right", "wrong", "right"):
        source.submit(inputs(solution))
        collect(source, 1)
    first, second, third = (ids[0] for _, ids in server.requests)
    assert first == third != second


@pytest.mark.parametrize(
    ("moods", "attempts", "part"),
    [
        (["500"] * 9, 3, "answered 500 Internal Server Error, 3 attempts"),
        (["drop"] * 9, 3, "dropped the connection"),
        (["hang"] * 9, 3, "did not answer within 0.6 s"),
        (["404"], 1, "answered 404"),
        (["401"], 1, "set reward.auth_env"),
        (["nonsense"], 1, "answered no JSON"),
        (["forget"], 1, "left it out"),
        (["null"], 1, "returned score None"),
    ],
)
def test_lasting_trouble_names_the_sample(
    server: _Server,
    service: Callable[..., RewardService],
    moods: list[str],
    attempts: int,
    part: str,
) -> None:
    server.moods = list(moods)
    source = service(retries=2, error_score=-1.0)
    source.submit(inputs("right"))
    (result,) = collect(source, 1).values()
    assert result.score == -1.0
    assert result.error.startswith("sample 0 (math): the reward service")
    assert part in result.error
    assert len(server.requests) == attempts


def test_the_token_comes_from_the_environment(
    server: _Server, service: Callable[..., RewardService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc")
    source = service(auth_env="MY_TOKEN")
    source.submit(inputs("right"))
    collect(source, 1)
    assert server.tokens == {"Bearer abc"}
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ValueError, match=r"reward\.auth_env: the variable MY_TOKEN is not set"):
        service(auth_env="MY_TOKEN")


def test_a_service_that_is_not_there(service: Callable[..., RewardService]) -> None:
    source = service(url="http://127.0.0.1:9/", retries=1, on_error="fail")
    source.submit(inputs("right"))
    with pytest.raises(RewardFailed, match=r"sample 0 \(math\).*127\.0\.0\.1:9.*2 attempts"):
        source.poll(10)


def test_closing_breaks_off_requests(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    server.moods = ["hang", "trickle"]
    source = service(timeout_s=500.0, max_concurrency=2, batch_size=1)
    source.submit(inputs("a", "b"))
    while len(server.requests) < 2:
        time.sleep(0.01)
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 3


def test_the_configuration_chooses_a_service(server: _Server) -> None:
    source = open_rewards(RewardConfig(url=server.url))
    assert source is not None
    source.submit(inputs("right"))
    assert collect(source, 1)[0].score == 1.0
    source.close()
