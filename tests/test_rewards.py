"""Every sample gets exactly one answer, whatever a function or a service does, and no process or
thread is left behind."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from rlhfuse.config import RewardConfig, RewardFunctionConfig
from rlhfuse.rewards import (
    RewardFailed,
    RewardInput,
    RewardPool,
    RewardResult,
    RewardService,
    RewardSource,
    open_rewards,
)

FUNCTIONS = """
import asyncio, os, re, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    print("noise on stdout")
    if solution_str == "raise": raise RuntimeError("boom")
    if solution_str == "hang": time.sleep(1000)
    if solution_str == "hang in C": re.match(r"(a+)+$", "a" * 60 + "b")
    if solution_str == "hang with a child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])
    if solution_str == "crash": os._exit(7)
    if solution_str == "nan": return float("nan")
    if solution_str == "inf": return {"score": float("inf")}
    if solution_str == "none": return None
    if solution_str == "text": return "1.0"
    if solution_str == "dict": return {"score": True, "words": 3, "comment": "fine"}
    return float(solution_str == ground_truth) + extra_info.get("bonus", 0)

async def in_async(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    return {"score": 2.0}
"""


def _config(**changes: Any) -> RewardConfig:
    return msgspec.structs.replace(RewardConfig(timeout_s=1.5, on_error="score"), **changes)


@pytest.fixture
def function(tmp_path: Path) -> RewardFunctionConfig:
    path = tmp_path / "my_reward.py"
    path.write_text(FUNCTIONS)
    return RewardFunctionConfig(path=str(path))


def _inputs(*solutions: str) -> list[RewardInput]:
    return [
        RewardInput(number, "math", solution, "right", {"bonus": number})
        for number, solution in enumerate(solutions)
    ]


def _collect(source: RewardSource, count: int, limit_s: float = 30) -> dict[int, RewardResult]:
    results: list[RewardResult] = []
    end = time.monotonic() + limit_s
    while len(results) < count and time.monotonic() < end:
        results += source.poll(0.2)
    assert len(results) == count
    assert len({result.sample_id for result in results}) == count
    assert source.outstanding == 0
    assert source.poll(5) == []  # nothing is outstanding: does not wait
    return {result.sample_id: result for result in results}


def _gone(pids: set[int], limit_s: float = 5) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if not any(_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


# --- functions -----------------------------------------------------------------------------


def test_what_a_function_returns_or_does_becomes_one_result_each(
    function: RewardFunctionConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _children()
    asked = ["right", "wrong", "raise", "crash", "nan", "inf", "none", "text", "dict", "right"]
    pool = RewardPool(function, _config(error_score=-9.0))
    try:
        pool.submit(_inputs(*asked))
        results = _collect(pool, len(asked))
    finally:
        pool.close()
    assert _gone(_children() - before)
    assert [results[i].score for i in (0, 1, 8, 9)] == [1.0, 1.0, 1.0, 10.0]
    assert results[8].metrics == {"words": 3.0}
    for index, part in {
        2: "RuntimeError: boom",
        3: "exit code 7",
        4: "returned nan",
        5: "returned score inf",
        6: "returned None",
        7: "returned '1.0'",
    }.items():
        assert results[index].score == -9.0
        assert results[index].error.startswith(f"sample {index} (math): the reward function")
        assert part in results[index].error
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_hung_call_costs_its_own_sample_only(function: RewardFunctionConfig) -> None:
    before = _children()
    asked = ["hang", "hang in C", "hang with a child", *["right"] * 20]
    pool = RewardPool(function, _config(num_workers=3))
    try:
        pool.submit(_inputs(*asked))
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            children = _children() - before
        results = _collect(pool, len(asked))
        assert all("took longer than 1.5 s" in results[i].error for i in range(3))
        assert [results[i].score for i in range(3, 23)] == [1.0 + i for i in range(3, 23)]
        assert _gone(children)  # the three that hung, and the child of one of them
    finally:
        pool.close()
    assert _gone(_children() - before)


def test_async_functions_are_awaited_and_scores_clipped(function: RewardFunctionConfig) -> None:
    pool = RewardPool(msgspec.structs.replace(function, name="in_async"), _config(clip=1.5))
    try:
        pool.submit(_inputs("a", "b"))
        assert [result.score for result in _collect(pool, 2).values()] == [1.5, 1.5]
    finally:
        pool.close()


def test_the_policy_fail_names_the_sample(function: RewardFunctionConfig) -> None:
    pool = RewardPool(function, _config(on_error="fail"))
    try:
        pool.submit(_inputs("raise"))
        with pytest.raises(RewardFailed, match=r"sample 0 \(math\).*boom.*reward\.on_error"):
            pool.poll(10)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("import no_such_module", "compute_score", "ModuleNotFoundError"),
        ("x = 1", "compute_score", "has no function 'compute_score'"),
        ("def f(: pass", "f", "SyntaxError"),
        ("import os; os._exit(3)", "f", "exit code 3"),
        (None, "f", "there is no Python file"),
    ],
)
def test_a_function_that_does_not_load_is_told_at_once(
    tmp_path: Path, text: str | None, name: str, part: str
) -> None:
    before = _children()
    path = tmp_path / "f.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"reward\.function") as caught:
        RewardPool(RewardFunctionConfig(path=str(path), name=name), _config())
    assert part in str(caught.value)
    assert _gone(_children() - before)


def test_closing_in_the_middle_of_a_call_is_quick(function: RewardFunctionConfig) -> None:
    before = _children()
    pool = RewardPool(function, _config(timeout_s=500.0))
    pool.submit(_inputs("hang", "hang with a child", "right"))
    time.sleep(0.5)
    children = _children() - before
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 3
    assert children
    assert _gone(children)


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), 9)", "1 / 0"])
def test_no_process_outlives_the_interpreter(
    function: RewardFunctionConfig, tmp_path: Path, ending: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time, psutil\n"
        "from rlhfuse.config import RewardConfig, RewardFunctionConfig\n"
        "from rlhfuse.rewards import RewardInput, RewardPool\n"
        f"pool = RewardPool(RewardFunctionConfig(path={function.path!r}), RewardConfig())\n"
        "pool.submit([RewardInput(0, 's', 'hang in C'), RewardInput(1, 's', 'hang')])\n"
        "time.sleep(0.6)\n"
        "print(*[c.pid for c in psutil.Process().children()], flush=True)\n"
        f"{ending}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=30
    )
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) == 2
    assert _gone(pids)


# --- services ------------------------------------------------------------------------------


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
        opened.append(RewardService(_config(**changes), backoff_s=0.01))
        return opened[-1]

    yield open_service
    for one in opened:
        one.close()


def test_samples_go_in_batches_and_each_comes_back_once(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    source = service(batch_size=4, max_concurrency=3)
    source.submit(_inputs(*["right"] * 40))
    results = _collect(source, 40)
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
    source.submit(_inputs("right"))
    (result,) = _collect(source, 1).values()
    assert (result.score, result.error) == (1.0, "")
    assert len(server.requests) == len(moods) + 1
    assert len({(key, *ids) for key, ids in server.requests}) == 1
    assert server.requests[0][1][0].startswith("0-")


def test_the_same_sample_with_another_response_is_another_request(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    source = service()
    for solution in ("right", "wrong", "right"):
        source.submit(_inputs(solution))
        _collect(source, 1)
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
    source.submit(_inputs("right"))
    (result,) = _collect(source, 1).values()
    assert result.score == -1.0
    assert result.error.startswith("sample 0 (math): the reward service")
    assert part in result.error
    assert len(server.requests) == attempts


def test_the_token_comes_from_the_environment(
    server: _Server, service: Callable[..., RewardService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc")
    source = service(auth_env="MY_TOKEN")
    source.submit(_inputs("right"))
    _collect(source, 1)
    assert server.tokens == {"Bearer abc"}
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(ValueError, match=r"reward\.auth_env: the variable MY_TOKEN is not set"):
        service(auth_env="MY_TOKEN")


def test_a_service_that_is_not_there(service: Callable[..., RewardService]) -> None:
    source = service(url="http://127.0.0.1:9/", retries=1, on_error="fail")
    source.submit(_inputs("right"))
    with pytest.raises(RewardFailed, match=r"sample 0 \(math\).*127\.0\.0\.1:9.*2 attempts"):
        source.poll(10)


def test_closing_breaks_off_requests(
    server: _Server, service: Callable[..., RewardService]
) -> None:
    server.moods = ["hang", "trickle"]
    source = service(timeout_s=500.0, max_concurrency=2, batch_size=1)
    source.submit(_inputs("a", "b"))
    while len(server.requests) < 2:
        time.sleep(0.01)
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 3


def test_the_configuration_chooses(function: RewardFunctionConfig, server: _Server) -> None:
    assert open_rewards(RewardConfig(path="models/reward")) is None
    for config in (RewardConfig(function=function), RewardConfig(url=server.url)):
        source = open_rewards(config)
        assert source is not None
        source.submit(_inputs("right"))
        assert _collect(source, 1)[0].score == 1.0
        source.close()
