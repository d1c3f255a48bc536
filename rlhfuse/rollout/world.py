"""Simulated workers, driven by the same scheduler code as the live loop.

Event-driven at sample granularity. A worker does what it is told in order and one thing at a
time: scoring calls and prefills hold its engine up, and what moves shares the links of both ends.
Completions that the scheduler would not answer (it says so: `RolloutScheduler.quiet`) are
computed together, and told together.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout import engine_model as model
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.groups import TRAIN
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.sample import Sample
from rlhfuse.timeline import ArgValue, Kind, Span, Timeline

_EVENT, _CALL, _LEFT = range(3)
_LAST = 2**62  # after all entries of its moment


@dataclass(frozen=True, slots=True)
class Stats:
    """`generation_s`: last response complete; `end_s`: all scored (and trained, where groups
    are); seconds from the start. `score_s`: worker seconds spent on scoring and training."""

    generation_s: float
    end_s: float
    num_moved: int
    num_events: int
    decisions: tuple[str, ...]
    score_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """An instance is lost at `at_s` and back, empty, at `back_s`."""

    at_s: float
    instance: int
    back_s: float


@dataclass(slots=True)
class _Worker:
    """What a simulated worker does besides stepping its engine."""

    slow: float
    alive: bool = True
    calls: deque[tuple[str, tuple[int, ...]]] = field(default_factory=deque)
    role: str = ""  # the model loaded for scoring
    link_s: float = 0.0  # its link is busy until then
    epoch: int = 0  # calls and departures from before a loss are void
    prefixes: set[int] = field(default_factory=set)  # groups whose prompt is in the cache


class Simulator:
    """Runs one iteration. `lengths[id]` are the true response lengths of `samples`.

    `progress_s`: how often an instance that has not been heard of reports how far it is (more
    rarely once the rollout lasts long); `reward_s`: how long the reward function takes;
    `slowdown[i]` multiplies everything that worker i does.
    """

    def __init__(
        self,
        scheduler: RolloutScheduler,
        cost: CostModel,
        lengths: Sequence[int],
        samples: Sequence[Sample],
        instances: int,
        *,
        progress_s: float = 0.05,
        reward_s: float = 0.0,
        slowdown: Sequence[float] = (),
        losses: Sequence[Loss] = (),
        record: bool = True,
    ) -> None:
        self._scheduler, self._cost = scheduler, cost
        self._samples = samples
        self._prompts = [sample.prompt_tokens for sample in samples]
        self._totals = [p + n for p, n in zip(self._prompts, lengths, strict=False)]
        slow = tuple(slowdown) or (1.0,) * instances
        self._workers = [_Worker(s) for s in slow]
        self._engines = model.make_engines(
            cost, scheduler.policy.max_running, slow, lengths, self._prompts, record=record
        )
        self._count, self._blocked_s, self._at_s = (
            self._engines.engines[name] for name in ("count", "blocked_s", "at_s")
        )
        self._sizes, self._look_s = self._engines.sizes, self._engines.looks["at_s"]
        self._done = self._engines.samples["done"]
        self._block = scheduler.policy.block
        self._progress_s, self._reward_s = progress_s, reward_s
        self._record = record
        self._spans: list[Span] = []
        self._heap: list[tuple[float, int, int, ev.Event | int, int]] = []
        self._now_s = self._generated_s = self._score_s = 0.0
        self._moved = self._num_events = 0
        self._decisions: list[str] = []
        self._moving: dict[int, tuple[int, int, bool]] = {}  # source, destination, with its cache
        for loss in losses:
            self._push(loss.at_s, _EVENT, ev.InstanceLost(loss.at_s, loss.instance))
            self._push(loss.back_s, _EVENT, ev.InstanceReady(loss.back_s, loss.instance))

    def run(self) -> tuple[Timeline, Stats]:
        """From the first dispatch to the last score."""
        scheduler, heap = self._scheduler, self._heap
        self._tell(ev.Started(0.0, tuple(self._samples)))
        report_s = self._progress_s
        while not scheduler.done:
            assert heap or self._sizes[0], f"stuck: {scheduler.waiting_for()}"
            at_s, number = heap[0][:2] if heap else (inf, _LAST)
            reports = at_s > report_s and scheduler.num_generating > 0
            if self._completions(*((report_s, _LAST) if reports else (at_s, number))):
                continue
            if reports:
                pause_s = max(self._progress_s, 0.2 * report_s)
                self._now_s = report_s
                self._report(0.5 * pause_s)
                report_s += pause_s
                continue
            self._now_s, _, kind, what, number = heapq.heappop(heap)
            self._num_events += 1
            self._deliver(kind, what, number)
        stats = Stats(
            self._generated_s,
            self._now_s,
            self._moved,
            self._num_events,
            tuple(self._decisions),
            self._score_s,
        )
        return Timeline(tuple(self._spans)), stats

    # --- what happens ----------------------------------------------------------------------

    def _tell(self, event: ev.Event) -> None:
        commands = self._scheduler.handle(event)
        if commands:
            for command in commands:
                self._execute(command)

    def _deliver(self, kind: int, what: ev.Event | int, number: int) -> None:
        if kind == _CALL:
            assert isinstance(what, int)
            self._answer(what, number)
        elif kind == _LEFT:
            assert isinstance(what, int)
            self._leave(what, number)
        else:
            assert not isinstance(what, int)
            self._fault(what)
            self._tell(what)

    def _fault(self, event: ev.Event) -> None:
        if isinstance(event, ev.InstanceReady):
            self._workers[event.instance].alive = True
            self._at_s[event.instance] = self._blocked_s[event.instance] = self._now_s
        elif isinstance(event, ev.InstanceLost):
            worker = self._workers[event.instance]
            model.lose(self._engines, event.instance, self._now_s)
            self._flush()
            worker.alive, worker.role = False, ""
            worker.calls.clear()
            worker.prefixes.clear()
            worker.epoch += 1
            gone = [s for s, (source, _, _) in self._moving.items() if source == event.instance]
            for sample_id in gone:
                del self._moving[sample_id]

    def _answer(self, index: int, epoch: int) -> None:
        worker = self._workers[index]
        if epoch != worker.epoch:
            return
        role, sample_ids = worker.calls.popleft()
        self._next_call(index)  # what it was given ahead, before it hears anything new
        if role == TRAIN:
            self._tell(ev.Trained(self._now_s, index, sample_ids))
        else:
            self._tell(ev.Scored(self._now_s, index, role, sample_ids))
        if self._count[index]:
            model.plan(self._engines, index, self._now_s)

    def _leave(self, sample_id: int, epoch: int) -> None:
        """The sample reaches its destination, which prefills where no cache came along."""
        if sample_id not in self._moving:
            return
        source, destination, cached = self._moving[sample_id]
        if epoch != self._workers[source].epoch:
            return
        del self._moving[sample_id]
        left = ev.Left(self._now_s, source, sample_id, int(self._done[sample_id]))
        commands = self._scheduler.handle(left)
        if self._workers[destination].alive:  # else the answer was to generate elsewhere
            self._add(destination, (sample_id,), prefill=not cached)
        for command in commands:
            self._execute(command)

    def _completions(self, bound_s: float, bound: int) -> bool:
        """Samples that are complete before the entry (`bound_s`, `bound`), up to the first that
        the scheduler may answer; whether any engine was looked at."""
        engines = self._engines
        if not self._sizes[0] or self._look_s[0] > bound_s:
            return False
        quiet, until_s = self._scheduler.quiet()
        found, first, taken = model.run(engines, bound_s, bound, quiet + 1, until_s)
        self._num_events += taken
        if not found:
            return bool(taken)
        self._flush()
        ended = engines.ended[:found]
        times, where, ids = (ended[name].tolist() for name in ("at_s", "engine", "sample"))
        self._generated_s = self._now_s = times[-1]
        tokens = engines.samples["length"][ended["sample"]].tolist()
        end = first + 1
        done = ev.Completed(times[first], times[:end], where[:end], ids[:end], tokens[:end])
        self._tell(done)
        # The last engine looked at may have ended more than one, and the first been answered.
        for k in range(end, found):
            self._tell(ev.Finished(times[k], where[k], ids[k], tokens[k]))
        model.plan(engines, where[-1], self._now_s)
        return True

    def _report(self, quiet_s: float) -> None:
        """Instances that have not been heard of for so long say how far one sample is."""
        now_s, at_s = self._now_s, self._at_s
        for index in np.flatnonzero((self._count > 0) & (now_s - at_s > quiet_s)).tolist():
            if self._count[index] and now_s - at_s[index] > quiet_s:
                sample_id, tokens = model.report(self._engines, index, now_s)
                self._flush()
                self._tell(ev.Progress(now_s, index, ((sample_id, tokens),)))
                model.plan(self._engines, index, now_s)

    # --- the engine ------------------------------------------------------------------------

    def _flush(self) -> None:
        """The engines' log becomes spans."""
        engines = self._engines
        if not self._record or not engines.sizes[2]:
            return
        for index, start_s, end_s, steps, batch, context in engines.log[
            : engines.sizes[2]
        ].tolist():
            args = {"steps": steps, "batch": int(batch), "context_tokens": context}
            self._span(int(index), start_s, end_s, Kind.GENERATE, "decode", args)
        engines.sizes[2] = 0

    def _add(self, index: int, sample_ids: Sequence[int], *, prefill: bool = True) -> None:
        worker, tokens = self._workers[index], 0
        if prefill:
            for sample_id in sample_ids:
                tokens += int(self._done[sample_id])
                if self._is_new(worker, sample_id):
                    tokens += self._prompts[sample_id]
        seconds = self._cost.prefill_s(tokens) if prefill else -1.0
        engines, now_s = self._engines, self._now_s
        if len(sample_ids) == 1:
            start_s = model.arrive(engines, index, now_s, sample_ids[0], seconds)
        else:
            start_s = model.arrive_all(engines, index, now_s, np.array(sample_ids), seconds)
        self._flush()
        if prefill and self._record:
            args: dict[str, ArgValue] = {"tokens": float(tokens)}
            end_s = float(self._blocked_s[index])
            self._span(index, start_s, end_s, Kind.PREFILL, "prefill", args)

    def _is_new(self, worker: _Worker, sample_id: int) -> bool:
        """Whether the sample's prompt must be computed: no sibling's cache can be shared."""
        if not self._scheduler.policy.shared_prefix:
            return True
        group = self._samples[sample_id].group
        known = group in worker.prefixes
        worker.prefixes.add(group)
        return not known

    # --- commands --------------------------------------------------------------------------

    def _execute(self, command: ev.Command) -> None:
        match command:
            case ev.Score():
                self._enqueue(command.worker, command.role, command.sample_ids)
            case ev.Train():
                self._enqueue(command.worker, TRAIN, command.sample_ids)
            case ev.Generate():
                self._add(command.instance, command.sample_ids)
            case ev.Migrate():
                self._migrate(command)
            case ev.Reward():
                for sample_id in command.sample_ids:
                    at_s = self._now_s + self._reward_s
                    self._push(at_s, _EVENT, ev.Rewarded(at_s, sample_id))
            case ev.Decision():
                self._decisions.append(f"{self._now_s:.3f} s: {command.text}")
            case _:
                pass

    def _migrate(self, command: ev.Migrate) -> None:
        index = command.source
        source, destination = self._workers[index], self._workers[command.destination]
        here = command.sample_ids
        if len(here) == 1:
            here = here if model.depart(self._engines, index, self._now_s, here[0]) else ()
        else:
            gone = model.depart_all(self._engines, index, self._now_s, np.array(here))
            here = tuple(s for s, is_gone in zip(here, gone.tolist(), strict=True) if is_gone)
        self._moved += len(here)
        self._flush()
        blocked_s = max(self._now_s, float(self._blocked_s[index]))
        for sample_id in here:
            self._moving[sample_id] = (index, command.destination, command.with_cache)
            at_s = blocked_s + self._cost.migrate_call_s * source.slow
            if command.with_cache:
                held = self._prompts[sample_id] + int(self._done[sample_id])
                sent_s = self._cost.migrate_token_s * held * source.slow
                at_s = max(at_s, source.link_s, destination.link_s) + sent_s
                source.link_s = destination.link_s = at_s
            self._push(at_s, _LEFT, sample_id, source.epoch)

    def _enqueue(self, index: int, role: str, sample_ids: tuple[int, ...]) -> None:
        calls = self._workers[index].calls
        calls.append((role, sample_ids))
        if len(calls) == 1:
            self._next_call(index)

    def _next_call(self, index: int) -> None:
        """Start the oldest scoring call that the worker was given; its whole block is at it."""
        worker = self._workers[index]
        if not worker.calls:
            return
        role, sample_ids = worker.calls[0]
        totals = self._totals
        tokens = float(sum([totals[s] for s in sample_ids]))
        seconds = self._cost.score_s(role, tokens)
        if worker.role != role:
            seconds += self._cost.swap_s
        worker.role = role
        members = range(index, min(index + self._block, len(self._workers)))
        start_s = self._now_s
        if self._block > 1:
            start_s = max(start_s, float(self._blocked_s[index : members.stop].max()))
        kind = Kind.F if role == TRAIN else Kind.SCORE
        for number in members:
            mine_s = seconds * worker.slow / self._workers[number].slow
            start_s = model.block(self._engines, number, self._now_s, start_s, mine_s)
            if self._record:
                self._flush()
                end_s = float(self._blocked_s[number])
                args: dict[str, ArgValue] = {"tokens": tokens, "role": role}
                self._span(number, start_s, end_s, kind, role, args)
        end_s = float(self._blocked_s[index])
        self._score_s += end_s - start_s
        self._push(end_s, _CALL, index, worker.epoch)

    def _push(self, at_s: float, kind: int, what: ev.Event | int, number: int = 0) -> None:
        count = int(self._engines.sizes[1])
        self._engines.sizes[1] = count + 1
        heapq.heappush(self._heap, (at_s, count, kind, what, number))

    def _span(
        self, index: int, start_s: float, end_s: float, kind: Kind, name: str,
        args: Mapping[str, ArgValue],
    ) -> None:  # fmt: skip
        if self._record:
            self._spans.append(Span(f"rank{index}", start_s, end_s, kind, name, {**args}))
