"""One schedule in numbers, and all policies for one problem side by side."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec

from rlhfuse.schedules.bidirectional import chimera, dualpipe
from rlhfuse.schedules.bounds import latency_bound, memory_bound
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.critical import critical_path, rank_times, total_bubbles
from rlhfuse.schedules.interleaved import interleaved
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.robust import noise_loss
from rlhfuse.schedules.standard import gpipe, one_f_one_b, serial, serial_makespan, zb_h1
from rlhfuse.schedules.timing import makespan
from rlhfuse.schedules.zero_bubble import zb_v


class Summary(msgspec.Struct, frozen=True):
    """The object that ``rlhfuse schedule --json`` prints; the problem's units, `seconds` apart."""

    makespan: float
    lower_bound: float
    peak_memory: float
    memory_lower_bound: float
    proven_optimal: bool
    bubble_fraction: float
    serial_makespan: float
    seconds: float


class RankSummary(msgspec.Struct, frozen=True):
    """One rank: its busy and idle time, and idle time by cause; together the makespan."""

    rank: int
    busy: float
    idle: float
    bubbles: dict[str, float]


class PathSummary(msgspec.Struct, frozen=True):
    """A critical path: its tasks in order, and what its length is made of."""

    tasks: list[str]
    pipelines: dict[str, float]  # time in the tasks of each
    waits: float  # link latency and release


class NoiseSummary(msgspec.Struct, frozen=True):
    """Makespan under noisy durations; `loss` is the mean's excess over the plan, as a share."""

    noise: float
    mean: float
    p95: float
    loss: float


class Explained(Summary, frozen=True):
    """`Summary`, and where the time goes."""

    policy: str
    bubbles: dict[str, float]  # by cause, summed over ranks
    per_rank: list[RankSummary]
    critical_path: PathSummary
    noise: NoiseSummary


@dataclass(frozen=True, slots=True)
class Policy:
    """A named way to schedule; `split` where it uses I and W.

    Policies on chunks (interleaved, ZB-V) answer a problem of their own, with the stages cut.
    """

    name: str
    make: Callable[[Problem], Schedule]
    split: bool = False


def standard_policies() -> tuple[Policy, ...]:
    """The policies that need no search."""
    return (
        Policy("serial", serial),
        Policy("1f1b", one_f_one_b),
        Policy("gpipe", gpipe),
        Policy("interleaved", interleaved),
        Policy("interleaved-4", partial(interleaved, chunks=4)),
        Policy("zb-h1", zb_h1, split=True),
        Policy("zb-v", zb_v, split=True),
        Policy("chimera", chimera),
        Policy("dualpipe", dualpipe, split=True),
    )


def summarize(
    schedule: Schedule, *, split_weight: bool, seconds: float, problem: Problem | None = None
) -> Summary:
    """The summary of a schedule that took `seconds` to find.

    `problem` is what was asked, where the schedule answers a chunked one: serial means its serial.
    """
    length = makespan(schedule)
    bound = latency_bound(schedule.problem, split_weight=split_weight)
    busy = sum(
        schedule.problem.pipeline(task.pipeline).duration(task.op, task.pp_stage, task.microbatch)
        for _, _, task in schedule.tasks()
    )
    area = schedule.problem.num_ranks * length
    return Summary(
        makespan=length,
        lower_bound=bound,
        peak_memory=max(peak_memory(schedule), default=0.0),
        memory_lower_bound=memory_bound(schedule.problem, length),
        proven_optimal=length <= bound * (1 + REL_TOL),
        bubble_fraction=1.0 - busy / area if area > 0 else 0.0,
        serial_makespan=serial_makespan(replace(problem or schedule.problem, memory_cap=None)),
        seconds=seconds,
    )


def explain(schedule: Schedule, summary: Summary, policy: str, noise: float) -> Explained:
    """`summary` of `schedule` with causes of idle time, its critical path and noise."""
    times, path = rank_times(schedule), critical_path(schedule)
    shares = {pipe.name: 0.0 for pipe in schedule.problem.pipelines}
    for step in path:
        shares[step.task.pipeline] += step.end - step.start
    noisy = noise_loss(schedule, noise)
    return Explained(
        **msgspec.structs.asdict(summary),
        policy=policy,
        bubbles=total_bubbles(times),
        per_rank=[
            RankSummary(t.rank, t.busy, t.idle, {c.value: s for c, s in t.bubbles.items()})
            for t in times
        ],
        critical_path=PathSummary(
            [str(step.task) for step in path], shares, sum(step.wait for step in path)
        ),
        noise=NoiseSummary(noise, noisy.mean, noisy.p95, noisy.loss),
    )
