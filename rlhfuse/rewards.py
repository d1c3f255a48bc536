"""Scores from a user's function or from a service, one small interface for both.

`submit` samples, `poll` results as they come, `close` at the end. A result that could not be had
ends the run or gets the configured score; either way the sample is named.
"""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import msgspec

from rlhfuse import reward_process
from rlhfuse.config import RewardConfig, RewardFunctionConfig
from rlhfuse.reward_process import Answer, Call
from rlhfuse.reward_service import ServiceClient

_START_LIMIT_S = 120.0  # for a reward file's imports
_END_LIMIT_S = 5.0


class RewardFailed(ValueError):
    """A sample has no score, and `reward.on_error` is ``fail``."""


@dataclass(frozen=True, slots=True)
class RewardInput:
    """What `compute_score` gets, for one sample. `ground_truth`: any JSON value."""

    sample_id: int
    data_source: str
    solution_str: str
    ground_truth: object = None
    extra_info: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """`error` tells why `score` is not the function's own but `reward.error_score`."""

    sample_id: int
    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class RewardSource(Protocol):
    """A reward function or service in use."""

    @property
    def outstanding(self) -> int:
        """Samples submitted and not yet returned by `poll`."""

    def submit(self, samples: Sequence[RewardInput]) -> None:
        """Ask for scores; returns at once."""

    def poll(self, timeout_s: float) -> list[RewardResult]:
        """The results that are there; waits up to `timeout_s` for the first.

        Raises:
            RewardFailed: a sample could not be scored and `reward.on_error` is ``fail``.
        """

    def close(self) -> None:
        """End all processes and requests; what is outstanding is lost."""


def open_rewards(config: RewardConfig) -> RewardSource | None:
    """The function or service of `config`; None where a reward model scores.

    Raises:
        ValueError: the function does not load, or the service's token is not set.
    """
    if config.function is not None:
        return RewardPool(config.function, config)
    return RewardService(config) if config.url else None


class _Desk:
    """Where samples wait and answers are collected; counts what is outstanding."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.waiting: queue.SimpleQueue[RewardInput | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[tuple[RewardInput, Answer]] = queue.SimpleQueue()
        self.outstanding = 0

    def submit(self, samples: Sequence[RewardInput]) -> None:
        self.outstanding += len(samples)
        for sample in samples:
            self.waiting.put(sample)

    def answer(self, sample: RewardInput, answer: Answer) -> None:
        self._answered.put((sample, answer))

    def release(self, threads: Sequence[threading.Thread]) -> None:
        """Let the threads that wait for samples end, and wait for them (but not for a host name
        that does not resolve)."""
        for _ in threads:
            self.waiting.put(None)
        for thread in threads:
            if thread.is_alive():
                thread.join(timeout=_END_LIMIT_S)

    def poll(self, timeout_s: float) -> list[RewardResult]:
        results: list[RewardResult] = []
        wait_s = timeout_s if self.outstanding else 0.0
        with contextlib.suppress(queue.Empty):
            results.append(self._result(*self._answered.get(timeout=max(wait_s, 1e-9))))
            while True:
                results.append(self._result(*self._answered.get_nowait()))
        return results

    def _result(self, sample: RewardInput, answer: Answer) -> RewardResult:
        self.outstanding -= 1
        score, metrics, error = answer
        if score is None:
            where = f"sample {sample.sample_id} ({sample.data_source}): the reward {error}"
            if self._config.on_error == "fail":
                raise RewardFailed(
                    f"{where}; mend it, or score such samples with reward.on_error=score"
                )
            return RewardResult(sample.sample_id, self._config.error_score, {}, where)
        limit = self._config.clip
        clipped = score if limit is None else min(max(score, -limit), limit)
        return RewardResult(sample.sample_id, clipped, metrics)


# --- functions -----------------------------------------------------------------------------


class _After(Enum):
    """What to do with a process after a call. One that died may have been killed for somebody
    else's sake: its sample is worth another attempt."""

    KEEP = 0
    REPLACE = 1
    REPLACE_AND_ASK_AGAIN = 2


class _Worker:
    """One killable process that runs the function, and whatever that starts."""

    def __init__(self, function: RewardFunctionConfig) -> None:
        ours, theirs = multiprocessing.Pipe()
        script = str(Path(reward_process.__file__).resolve())
        arguments = [str(theirs.fileno()), str(os.getpid()), function.path, function.name]
        # -P: the script's folder must not shadow modules that the function imports. What the
        # function prints goes to stderr: stdout may be for JSON. Its own session: kill() reaches
        # its children, too.
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        self._connection: Connection = ours

    def ready(self) -> str:
        """Wait until the function is loaded; why it is not, or an empty text."""
        try:
            if not self._connection.poll(_START_LIMIT_S):
                return f"reward.function: not imported within {_START_LIMIT_S:g} s"
            return str(self._connection.recv())
        except (EOFError, OSError):
            return f"reward.function: its process ended while importing ({self._ending()})"

    def ask(self, sample: RewardInput, timeout_s: float) -> tuple[Answer, "_After"]:
        """The answer for one sample, and what is to be done with the process."""
        try:
            self._connection.send(_call(sample))
            if not self._connection.poll(timeout_s):
                why = f"function took longer than {timeout_s:g} s (reward.timeout_s)"
                return (None, {}, why), _After.REPLACE
            score, metrics, trouble = self._connection.recv()
        except (EOFError, OSError):
            why = f"function's process ended ({self._ending()})"
            return (None, {}, why), _After.REPLACE_AND_ASK_AGAIN
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            return (None, {}, f"function cannot be given the row: {error}"), _After.REPLACE
        return (score, metrics, trouble and f"function {trouble}"), _After.KEEP

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "connection closed"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def stop(self) -> None:
        """Kill the process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Kill the process group and wait until the process is gone."""
        self.stop()
        self._process.wait()
        self._connection.close()


class _Crew:
    """The workers that are alive; after `stop_all` there will be no more."""

    def __init__(self, function: RewardFunctionConfig) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self.closed = False

    def hire(self) -> tuple[_Worker | None, str]:
        """A worker that is ready, or None and the reason."""
        with self._lock:
            if self.closed:
                return None, "closed"
            try:
                worker = _Worker(self._function)
            except OSError as error:
                return None, f"reward.function: no process can be started: {error}"
            self._alive.add(worker)
        reason = worker.ready()
        if reason:
            self.dismiss(worker)
            return None, reason
        return worker, ""

    def dismiss(self, worker: _Worker) -> None:
        with self._lock:
            self._alive.discard(worker)
            worker.bury()

    def stop_all(self) -> None:
        with self._lock:
            self.closed = True
            for worker in self._alive:
                worker.stop()


class RewardPool:
    """`compute_score` in `config.num_workers` processes, one sample at a time in each.

    A call that exceeds `config.timeout_s` costs that one sample: the process group is killed and
    replaced. Where a process dies, its sample is given to `config.retries` others before it counts
    as one that cannot be scored. No process outlives `close`, the interpreter, or this
    process. Raises `ValueError` where the function does not load.
    """

    def __init__(self, function: RewardFunctionConfig, config: RewardConfig) -> None:
        self._desk = _Desk(config)
        self._crew = _Crew(function)
        self._end = weakref.finalize(self, self._crew.stop_all)
        started: queue.SimpleQueue[str] = queue.SimpleQueue()
        shared = (self._desk, self._crew, config)
        self._threads = [threading.Thread(target=_serve, args=(*shared, started), daemon=True)]
        for _ in range(config.num_workers - 1):
            self._threads.append(threading.Thread(target=_serve, args=shared, daemon=True))
        self._threads[0].start()
        error = started.get()
        if error:
            self._end()
            raise ValueError(error)
        for thread in self._threads[1:]:
            thread.start()

    @property
    def outstanding(self) -> int:
        return self._desk.outstanding

    def submit(self, samples: Sequence[RewardInput]) -> None:
        self._desk.submit(samples)

    def poll(self, timeout_s: float) -> list[RewardResult]:
        return self._desk.poll(timeout_s)

    def close(self) -> None:
        self._end()
        self._desk.release(self._threads)


def _serve(
    desk: _Desk,
    crew: _Crew,
    config: RewardConfig,
    started: queue.SimpleQueue[str] | None = None,
) -> None:
    """One thread's life: a process at hand, a sample, its answer. Where `started` is given, it
    gets why the function does not load, or an empty text."""
    worker: _Worker | None = None
    error = ""
    if started is not None:
        worker, error = crew.hire()
        started.put(error)
    while not error and not crew.closed and (sample := desk.waiting.get()) is not None:
        worker, answer = _attempts(crew, config, worker, sample)
        desk.answer(sample, answer)
    if worker is not None:
        crew.dismiss(worker)


def _attempts(
    crew: _Crew, config: RewardConfig, worker: _Worker | None, sample: RewardInput
) -> tuple[_Worker | None, Answer]:
    """The answer for one sample, and the process that is left."""
    answer: Answer = (None, {}, "was not computed")
    for _ in range(config.retries + 1):
        if worker is None:
            worker, error = crew.hire()
        if worker is None:
            return None, (None, {}, f"cannot be computed: {error}")
        answer, after = worker.ask(sample, config.timeout_s)
        if after is not _After.KEEP:
            crew.dismiss(worker)
            worker = None
        if after is not _After.REPLACE_AND_ASK_AGAIN or crew.closed:
            break
    return worker, answer


# --- services ------------------------------------------------------------------------------


class RewardService:
    """The service at `config.url`: up to `config.batch_size` samples a request and
    `config.max_concurrency` requests at a time. Raises `ValueError` where its token is not set."""

    def __init__(self, config: RewardConfig, *, backoff_s: float = 0.5) -> None:
        self._desk = _Desk(config)
        self._client = ServiceClient(config, backoff_s=backoff_s)
        self._end = weakref.finalize(self, self._client.close)
        shared = (self._desk, self._client, config.batch_size)
        self._threads = [
            threading.Thread(target=_request, args=shared, daemon=True)
            for _ in range(config.max_concurrency)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def outstanding(self) -> int:
        return self._desk.outstanding

    def submit(self, samples: Sequence[RewardInput]) -> None:
        self._desk.submit(samples)

    def poll(self, timeout_s: float) -> list[RewardResult]:
        return self._desk.poll(timeout_s)

    def close(self) -> None:
        self._end()
        self._desk.release(self._threads)


def _request(desk: _Desk, client: ServiceClient, batch_size: int) -> None:
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
            answers = client.score([{"id": _key(one), **_call(one)} for one in batch])
        except TypeError as error:  # a value that JSON has no word for
            answers = [(None, {}, f"service cannot be given the row: {error}")] * len(batch)
        for one, answer in zip(batch, answers, strict=True):
            desk.answer(one, answer)
        if ended:
            return


def _call(sample: RewardInput) -> Call:
    return {
        "data_source": sample.data_source,
        "solution_str": sample.solution_str,
        "ground_truth": sample.ground_truth,
        "extra_info": dict(sample.extra_info),
    }


def _key(sample: RewardInput) -> str:
    """The sample's id and what is scored: validation asks for the same ids again and again."""
    text = msgspec.json.encode(_call(sample))
    return f"{sample.sample_id}-{hashlib.sha256(text).hexdigest()[:16]}"
