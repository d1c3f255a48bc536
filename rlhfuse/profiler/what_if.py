"""The same training rounds under other conditions, replayed with the measured costs.

Every replay adds the measured median delays between tasks, so that predictions compare with what
was measured and not with an ideal machine; only "no delays" leaves them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rlhfuse.profiler import recovery
from rlhfuse.profiler.recovery import Recovered
from rlhfuse.profiler.summary import ScheduleSummary, WhatIf
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.compiled import encode_schedule
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import REL_TOL, Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import end_times

Cost = Callable[[Task], float]
_ROUNDS = 12  # of search per fused schedule
_TOLERANCE = 0.03
_STRAGGLES = 1.15  # times the median of the same operation
_COUNTS = (0.5, 2.0, 4.0)  # times the micro-batches that ran
_ROOMS = (1.0, 1.25, 1.5, 2.0)  # of activation memory, tried in this order


def replay(schedule: Schedule, cost: Cost, *, gap_s: float = 0.0, lag_s: float = 0.0) -> float:
    """Makespan of a schedule whose tasks take `cost` seconds, and delays as measured."""
    delayed = replace(schedule, problem=replace(schedule.problem, link_latency=lag_s))
    coded, rows = encode_schedule(delayed)
    duration = coded.duration.copy()
    for position, (_, _, task) in enumerate(delayed.tasks()):
        duration[rows.tasks[position]] = cost(task) + gap_s
    end, _ = end_times(coded._replace(duration=duration), rows)
    return float(end[rows.tasks].max(initial=0.0)) - gap_s


def describe(rounds: Sequence[Recovered]) -> ScheduleSummary:
    """The last round's schedule; measured and ideal makespan over all rounds.

    The ideal is the schedule that ran, with even micro-batches and no delays.
    """
    last = rounds[-1].schedule
    pipes = last.problem.pipelines
    return ScheduleSummary(
        name=recovery.schedule_name(last),
        rounds=len(rounds),
        pipelines=[pipe.name for pipe in pipes],
        stages=[pipe.num_stages for pipe in pipes],
        microbatches=[pipe.num_microbatches for pipe in pipes],
        split_weight=any(task.op is Op.W for row in last.rows for task in row),
        makespan_s=sum(x.makespan_s for x in rounds),
        ideal_makespan_s=sum(replay(x.schedule, _even(x.problem)) for x in rounds),
        stragglers=recovery.stragglers(rounds),
    )


def what_ifs(
    rounds: Sequence[Recovered], wall_s: float, *, critic: "Critic | None" = None
) -> tuple[list[WhatIf], list[str]]:
    """Predicted times of the whole step, and what to think of them.

    Args:
        rounds: all training rounds of the step, in time order.
        wall_s: of the step; what is not training stays as it was.
        critic: that single-model runs are fused with; by default one of the model's own costs.
    """
    critic = critic or Critic()
    measured = sum(x.makespan_s for x in rounds)
    rest = wall_s - measured
    replayed = sum(_with_delays(x, x.schedule, x.durations.__getitem__) for x in rounds)
    found = [
        _what("as it ran, replayed", rest + replayed, wall_s),
        _what("no delays between tasks", rest + _each(rounds, _no_delays), wall_s),
        _what("stragglers removed", rest + _each(rounds, _no_stragglers), wall_s),
        _what("even micro-batches", rest + _each(rounds, _even_microbatches), wall_s),
        _what("even stages", rest + _each(rounds, _even_stages), wall_s),
    ]
    warnings = []
    if abs(replayed - measured) > _TOLERANCE * measured:
        warnings.append(
            f"the replay of what ran is {replayed / measured - 1:+.1%} off the measured training "
            "time: take the what-if figures with care"
        )
    pairs = _serial_pairs(rounds)
    if pairs:
        predicted = [_fused(a, b) for a, b in pairs]
        before = sum(a.makespan_s + b.makespan_s for a, b in pairs)
        room = max(room for _, room in predicted)
        saved = before - sum(seconds for seconds, _ in predicted)
        found.append(_what(f"both models fused ({_within(room)})", wall_s - saved, wall_s))
    mixed = [x for x in rounds if recovery.schedule_name(x.schedule) == "fused"]
    if mixed:
        lost = sum(_one_after_the_other(x) - x.makespan_s for x in mixed)
        found.append(_what("both models one after the other (1F1B)", wall_s + lost, wall_s))
    single = [x for x in rounds if len(x.problem.pipelines) == 1]
    if single and not pairs:
        found += _single_model(single, wall_s, critic)
        assumed = (
            "its costs are the given ones"
            if critic.given is not None
            else f"it is assumed to cost {critic.scale:g} times the model"
        )
        warnings.append(
            "the weight gradient is taken as half of each backward; fused with a critic: "
            f"{assumed}, serial training of both is the comparison"
        )
    return found, warnings


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs of tasks of one problem, by operation and stage."""

    problem: Problem

    def __call__(self, task: Task) -> float:
        return self.problem.pipeline(task.pipeline).duration(task.op, task.pp_stage)


def _even(problem: Problem) -> Cost:
    return _Costs(problem)


def _with_delays(like: Recovered, schedule: Schedule, cost: Cost) -> float:
    return replay(schedule, cost, gap_s=like.gap_s, lag_s=like.lag_s)


def _each(rounds: Sequence[Recovered], predict: Callable[[Recovered], float]) -> float:
    return sum(predict(x) for x in rounds)


def _no_delays(x: Recovered) -> float:
    return replay(x.schedule, x.durations.__getitem__)


def _no_stragglers(x: Recovered) -> float:
    """Tasks that took clearly longer than others of their operation take the median, on every
    stage; stages that are slow throughout, as long as the median stage."""
    typical = {
        (pipe.name, op): median(pipe.duration(op, s) for s in range(pipe.num_stages))
        for pipe in x.problem.pipelines
        for op in Op
    }

    def cost(task: Task) -> float:
        seconds, usual = x.durations[task], typical[task.pipeline, task.op]
        return usual if seconds > _STRAGGLES * usual else seconds

    return _with_delays(x, x.schedule, cost)


def _even_microbatches(x: Recovered) -> float:
    return _with_delays(x, x.schedule, _even(x.problem))


def _even_stages(x: Recovered) -> float:
    pipes = tuple(_leveled(pipe) for pipe in x.problem.pipelines)
    return _with_delays(x, x.schedule, _even(replace(x.problem, pipelines=pipes)))


def _leveled(pipe: Pipeline) -> Pipeline:
    """The same work, spread evenly over the stages."""

    def mean(values: Sequence[float]) -> tuple[float, ...]:
        return (sum(values) / len(values),) * len(values)

    return replace(
        pipe, forward=mean(pipe.forward), backward=mean(pipe.backward), weight=mean(pipe.weight)
    )


def _serial_pairs(rounds: Sequence[Recovered]) -> list[tuple[Recovered, Recovered]]:
    """Rounds of two different models that followed each other on the same ranks."""
    pairs, at = [], 0
    while at + 1 < len(rounds):
        one, other = rounds[at].problem.pipelines, rounds[at + 1].problem.pipelines
        alone = len(one) == len(other) == 1 and one[0].name != other[0].name
        if alone and set(one[0].stages) & set(other[0].stages):
            pairs.append((rounds[at], rounds[at + 1]))
            at += 1
        at += 1
    return pairs


def _fused(one: Recovered, other: Recovered) -> tuple[float, float]:
    """Predicted time of both models in one fused round, and its memory over the serial one."""
    pipes = (*one.problem.pipelines, *other.problem.pipelines)
    ranks = max(one.problem.num_ranks, other.problem.num_ranks)
    cap = max(*peak_memory(one.schedule), *peak_memory(other.schedule))
    schedule, room = _search(Problem(ranks, pipes), cap)
    durations = {**one.durations, **other.durations}
    gap_s = (one.gap_s + other.gap_s) / 2
    lag_s = max(one.lag_s, other.lag_s)
    return replay(schedule, durations.__getitem__, gap_s=gap_s, lag_s=lag_s), room


def _one_after_the_other(x: Recovered) -> float:
    """Predicted time of a fused round's models, each alone under 1F1B."""
    alone = (replace(x.problem, pipelines=(pipe,)) for pipe in x.problem.pipelines)
    return sum(_predict(x, one_f_one_b(problem)) for problem in alone)


def _search(problem: Problem, cap: float, split_weight: bool = False) -> tuple[Schedule, float]:
    """A good schedule within the activation memory of what ran, or, where none is found, within
    as little more as one needs; and how much more that is."""
    for room in _ROOMS:
        try:
            found = fuse(
                problem, memory_cap=cap * room, iterations=_ROUNDS, split_weight=split_weight
            )
        except ValueError:
            continue
        return found, room
    free = fuse(problem, iterations=_ROUNDS, split_weight=split_weight)
    return free, max(peak_memory(free)) / cap


def _within(room: float) -> str:
    return (
        "same activation memory"
        if room < 1 + REL_TOL
        else f"{room:.2g} times the activation memory"
    )


def _single_model(rounds: Sequence[Recovered], wall_s: float, critic: "Critic") -> list[WhatIf]:
    measured = sum(x.makespan_s for x in rounds)
    rest = wall_s - measured
    plain, zero, serial, fused = (0.0,) * 4
    zero_room = fused_room = 1.0
    counts = dict.fromkeys(_COUNTS, 0.0)
    rooms = dict.fromkeys(_COUNTS, 1.0)
    for x in rounds:
        (pipe,) = x.problem.pipelines
        plain += _predict(x, one_f_one_b(x.problem))
        halved = replace(pipe, weight=tuple(b / 2 for b in pipe.backward))
        split = replace(x.problem, pipelines=(halved,))
        cap = max(peak_memory(x.schedule))
        schedule, room = _search(split, cap, split_weight=True)
        zero, zero_room = zero + _predict(x, schedule), max(zero_room, room)
        for times in _COUNTS:
            cut = replace(x.problem, pipelines=(_recut(pipe, times),))
            recut = one_f_one_b(cut)
            counts[times] += _predict(x, recut)
            rooms[times] = max(rooms[times], max(peak_memory(recut)) / cap)
        other = critic.beside(pipe)
        both = Problem(x.problem.num_ranks, (pipe, other))
        alone = _predict(x, one_f_one_b(Problem(x.problem.num_ranks, (other,))))
        serial += x.makespan_s + (alone if critic.given else critic.scale * x.makespan_s)
        schedule, room = _search(both, cap)
        fused, fused_room = fused + _predict(x, schedule), max(fused_room, room)
    found = [_what("1F1B", rest + plain, wall_s)]
    for times, seconds in counts.items():
        if all(x.problem.pipelines[0].num_microbatches * times >= 1 for x in rounds):
            name = f"1F1B, {times:g} times the micro-batches ({_within(rooms[times])})"
            found.append(_what(name, rest + seconds, wall_s))
    return [
        *found,
        _what(f"weight gradient split off ({_within(zero_room)})", rest + zero, wall_s),
        _what(f"fused with a critic ({_within(fused_room)})", rest + fused, rest + serial),
    ]


@dataclass(frozen=True, slots=True)
class Critic:
    """The critic that a single model is fused with: given, or the model's own costs, scaled."""

    scale: float = 1.0
    given: Pipeline | None = None

    def beside(self, pipe: Pipeline) -> Pipeline:
        """The critic as a pipeline on the ranks of `pipe`, in the opposite direction.

        Raises:
            ValueError: the given critic uses ranks that the model does not.
        """
        if self.given is None:
            return _critic(pipe, self.scale)
        if not set(self.given.stages) <= set(pipe.stages):
            raise ValueError(
                f"--critic: stages on ranks {sorted(set(self.given.stages))}, but the model runs "
                f"on {sorted(set(pipe.stages))}"
            )
        name = self.given.name if self.given.name != pipe.name else f"{pipe.name}-critic"
        return replace(self.given, name=name)


def _predict(like: Recovered, schedule: Schedule) -> float:
    return _with_delays(like, schedule, _even(schedule.problem))


def _recut(pipe: Pipeline, times: float) -> Pipeline:
    """As many `times` micro-batches, of the same work in all."""
    count = max(1, round(times * pipe.num_microbatches))
    share = pipe.num_microbatches / count

    def cut(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(value * share for value in values)

    return replace(
        pipe,
        num_microbatches=count,
        forward=cut(pipe.forward),
        backward=cut(pipe.backward),
        weight=cut(pipe.weight),
        activation=cut(pipe.activation),
        activation_after_input=cut(pipe.activation_after_input),
        microbatch_weights=(1.0,) * count,
    )


def _critic(pipe: Pipeline, scale: float) -> Pipeline:
    """The same pipeline in the opposite direction, at `scale` times its cost."""
    return replace(
        pipe,
        name="critic" if pipe.name != "critic" else "actor",
        stages=pipe.stages[::-1],
        forward=tuple(x * scale for x in pipe.forward),
        backward=tuple(x * scale for x in pipe.backward),
        weight=tuple(x * scale for x in pipe.weight),
    )


def _what(name: str, makespan_s: float, before_s: float) -> WhatIf:
    return WhatIf(name, makespan_s, 1 - makespan_s / before_s if before_s > 0 else 0.0)
