"""Samples that wait for a score, and scores that wait to be fetched.

A result that could not be had ends the run or gets the configured score; either way the sample is
named.
"""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhfuse.config import RewardConfig
from rlhfuse.reward_process import Answer, Call

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


def call_of(sample: RewardInput) -> Call:
    """What `compute_score` is called with."""
    return {
        "data_source": sample.data_source,
        "solution_str": sample.solution_str,
        "ground_truth": sample.ground_truth,
        "extra_info": dict(sample.extra_info),
    }


class Desk:
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


class ThreadedSource:
    """A desk whose samples are answered by threads (see `rewards.RewardSource`)."""

    def __init__(self, config: RewardConfig, end: Callable[[], object]) -> None:
        """`end`: breaks off what the threads are at; called by `close`, or when the source is
        gone."""
        self._desk = Desk(config)
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, end)

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
