"""Scores from a user's function, in processes that can be killed."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path

from rlhfuse import reward_process
from rlhfuse.config import RewardConfig, RewardFunctionConfig
from rlhfuse.reward_desk import Desk, RewardInput, ThreadedSource, call_of
from rlhfuse.reward_process import Answer

_START_LIMIT_S = 120.0  # for a reward file's imports


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
            self._connection.send(call_of(sample))
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


class RewardPool(ThreadedSource):
    """`compute_score` in `config.num_workers` processes, one sample at a time in each.

    A call that exceeds `config.timeout_s` costs that one sample: the process group is killed and
    replaced. Where a process dies, its sample is given to `config.retries` others before it counts
    as one that cannot be scored. No process outlives `close`, the interpreter, or this
    process. Raises `ValueError` where the function does not load.
    """

    def __init__(self, function: RewardFunctionConfig, config: RewardConfig) -> None:
        crew = _Crew(function)
        super().__init__(config, crew.stop_all)
        started: queue.SimpleQueue[str] = queue.SimpleQueue()
        shared = (self._desk, crew, config)
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


def _serve(
    desk: Desk,
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
