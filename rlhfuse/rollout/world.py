"""Simulated workers, driven by the same scheduler code as the live loop.

Event-driven at sample granularity. Between two events an instance's batch is constant, so its
samples advance at one rate. A worker does what it is told in order and one thing at a time:
scoring calls and prefills hold its engine up, and what moves shares the links of both ends.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.engine_model import EngineModel
from rlhfuse.rollout.groups import TRAIN
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.sample import Sample
from rlhfuse.timeline import ArgValue, Kind, Span, Timeline

_COMPLETE, _EVENT, _CALL, _LEFT = range(4)


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
        self._scheduler, self._cost, self._lengths = scheduler, cost, lengths
        self._samples = samples
        self._prompts = [sample.prompt_tokens for sample in samples]
        self._totals = [p + n for p, n in zip(self._prompts, lengths, strict=False)]
        slow = tuple(slowdown) or (1.0,) * instances
        self._engines = _engines(cost, scheduler.policy, slow)
        self._block = scheduler.policy.block
        self._tokens = [0] * len(samples)  # at the last arrival on an instance
        self._progress_s, self._reward_s = progress_s, reward_s
        self._record = record
        self._spans: list[Span] = []
        self._heap: list[tuple[float, int, int, ev.Event | int, int]] = []
        self._counter = 0
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
        next_report_s = self._progress_s
        while not scheduler.done:
            assert heap, f"stuck: {scheduler.waiting_for()}"
            if heap[0][0] > next_report_s and scheduler.num_generating:
                pause_s = max(self._progress_s, 0.2 * next_report_s)
                self._now_s = next_report_s
                self._report(0.5 * pause_s)
                next_report_s += pause_s
                continue
            self._now_s, _, kind, what, number = heapq.heappop(heap)
            self._num_events += 1
            if kind == _COMPLETE:
                assert isinstance(what, int)
                self._complete(what, number)
            else:
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
            engine = self._engines[event.instance]
            engine.alive, engine.at_s, engine.blocked_s = True, self._now_s, self._now_s
        elif isinstance(event, ev.InstanceLost):
            self._catch_up(event.instance)
            for sample_id in self._engines[event.instance].running:
                self._tokens[sample_id] = self._so_far(event.instance, sample_id)
            self._engines[event.instance].lose()
            gone = [s for s, (source, _, _) in self._moving.items() if source == event.instance]
            for sample_id in gone:
                del self._moving[sample_id]

    def _answer(self, index: int, epoch: int) -> None:
        engine = self._engines[index]
        if epoch != engine.epoch:
            return
        role, sample_ids = engine.calls.popleft()
        self._next_call(index)  # what it was given ahead, before it hears anything new
        if role == TRAIN:
            self._tell(ev.Trained(self._now_s, index, sample_ids))
        else:
            self._tell(ev.Scored(self._now_s, index, role, sample_ids))
        if engine.running:
            self._plan(index)

    def _leave(self, sample_id: int, epoch: int) -> None:
        """The sample reaches its destination, which prefills where no cache came along."""
        if sample_id not in self._moving:
            return
        source, destination, cached = self._moving[sample_id]
        if epoch != self._engines[source].epoch:
            return
        del self._moving[sample_id]
        left = ev.Left(self._now_s, source, sample_id, self._tokens[sample_id])
        commands = self._scheduler.handle(left)
        if self._engines[destination].alive:  # else the answer was to generate elsewhere
            self._add(destination, (sample_id,), prefill=not cached)
        for command in commands:
            self._execute(command)

    def _complete(self, index: int, version: int) -> None:
        """The next sample of an instance is done (unless plans have changed)."""
        engine = self._engines[index]
        if version != engine.version:
            return
        engine.planned_s = inf
        self._catch_up(index)
        now_s = self._now_s
        for sample_id in engine.pop_completed():
            self._generated_s = now_s
            engine.context -= self._totals[sample_id]
            self._tell(ev.Finished(now_s, index, sample_id, self._lengths[sample_id]))
        self._plan(index)

    def _report(self, quiet_s: float) -> None:
        """Instances that have not been heard of for so long say how far one sample is."""
        for index, engine in enumerate(self._engines):
            if engine.running and self._now_s - engine.at_s > quiet_s:
                self._catch_up(index)
                sample_id = next(iter(engine.running))
                tokens = self._so_far(index, sample_id)
                self._tell(ev.Progress(self._now_s, index, ((sample_id, tokens),)))
                self._plan(index)

    def _so_far(self, index: int, sample_id: int) -> int:
        engine, length = self._engines[index], self._lengths[sample_id]
        return min(int(length - engine.running[sample_id] + engine.steps + 1e-6), length - 1)

    # --- the engine ------------------------------------------------------------------------

    def _catch_up(self, index: int) -> None:
        engine = self._engines[index]
        if engine.catch_up(self._now_s) and self._record:
            start_s, steps, batch, context = engine.last
            args: dict[str, ArgValue] = {"steps": steps, "batch": batch, "context_tokens": context}
            self._span(index, start_s, self._now_s, Kind.GENERATE, "decode", args)

    def _plan(self, index: int) -> None:
        """Put the instance's next completion on the heap. One that has only been put off stays
        where it is: the instance is looked at, and planned again, when its old time comes."""
        engine = self._engines[index]
        at_s = engine.next_completion_s(self._now_s)
        if at_s is not None and at_s < engine.planned_s:
            engine.version += 1
            engine.planned_s = at_s
            self._push(at_s, _COMPLETE, index, engine.version)

    def _add(self, index: int, sample_ids: Sequence[int], *, prefill: bool = True) -> None:
        engine = self._engines[index]
        self._catch_up(index)
        tokens = 0
        for sample_id in sample_ids:
            done = self._tokens[sample_id]
            held = self._prompts[sample_id] + done
            engine.add(sample_id, self._lengths[sample_id] - done, held)
            if prefill:
                tokens += held if self._is_new(engine, sample_id) else done
        if prefill:
            start_s = engine.block(self._now_s, self._cost.prefill_s(tokens))
            args: dict[str, ArgValue] = {"tokens": float(tokens)}
            self._span(index, start_s, engine.blocked_s, Kind.PREFILL, "prefill", args)
        self._plan(index)

    def _is_new(self, engine: EngineModel, sample_id: int) -> bool:
        """Whether the sample's prompt must be computed: no sibling's cache can be shared."""
        if not self._scheduler.policy.shared_prefix:
            return True
        group = self._samples[sample_id].group
        known = group in engine.prefixes
        engine.prefixes.add(group)
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
        source, destination = self._engines[command.source], self._engines[command.destination]
        self._catch_up(command.source)
        for sample_id in command.sample_ids:
            if sample_id not in source.running:
                continue
            tokens = self._so_far(command.source, sample_id)
            self._tokens[sample_id] = tokens
            held = self._prompts[sample_id] + tokens
            source.context -= held
            del source.running[sample_id]
            self._moving[sample_id] = (command.source, command.destination, command.with_cache)
            self._moved += 1
            at_s = max(self._now_s, source.blocked_s) + self._cost.migrate_call_s * source.slow
            if command.with_cache:
                sent_s = self._cost.migrate_token_s * held * source.slow
                at_s = max(at_s, source.link_s, destination.link_s) + sent_s
                source.link_s = destination.link_s = at_s
            self._push(at_s, _LEFT, sample_id, source.epoch)
        if not source.running:
            source.context = 0.0
        self._plan(command.source)

    def _enqueue(self, index: int, role: str, sample_ids: tuple[int, ...]) -> None:
        calls = self._engines[index].calls
        calls.append((role, sample_ids))
        if len(calls) == 1:
            self._next_call(index)

    def _next_call(self, index: int) -> None:
        """Start the oldest scoring call that the worker was given; its whole block is at it."""
        engine = self._engines[index]
        if not engine.calls:
            return
        role, sample_ids = engine.calls[0]
        totals = self._totals
        tokens = float(sum([totals[s] for s in sample_ids]))
        seconds = self._cost.score_s(role, tokens)
        if engine.role != role:
            seconds += self._cost.swap_s
        engine.role = role
        block = self._engines[index : index + self._block]
        start_s = (
            max(self._now_s, *(e.blocked_s for e in block)) if self._block > 1 else self._now_s
        )
        kind = Kind.F if role == TRAIN else Kind.SCORE
        for number, member in enumerate(block, index):
            self._catch_up(number)
            start_s = member.block(start_s, seconds * engine.slow / member.slow)
            args: dict[str, ArgValue] = {"tokens": tokens, "role": role}
            self._span(number, start_s, member.blocked_s, kind, role, args)
        self._score_s += engine.blocked_s - start_s
        self._push(engine.blocked_s, _CALL, index, engine.epoch)

    def _push(self, at_s: float, kind: int, what: ev.Event | int, number: int = 0) -> None:
        self._counter += 1
        heapq.heappush(self._heap, (at_s, self._counter, kind, what, number))

    def _span(
        self, index: int, start_s: float, end_s: float, kind: Kind, name: str,
        args: Mapping[str, ArgValue],
    ) -> None:  # fmt: skip
        if self._record:
            self._spans.append(Span(f"rank{index}", start_s, end_s, kind, name, {**args}))


def _engines(cost: CostModel, policy: Policy, slow: Sequence[float]) -> list[EngineModel]:
    """One per worker; those of one speed share their table."""
    table = cost.step_table(policy.max_running)
    beyond_s = cost.step_s(policy.max_running + 1) - cost.step_s(policy.max_running)
    tables = {s: (s * table).tolist() for s in set(slow)}
    return [EngineModel(tables[s], s * beyond_s, s * cost.decode_context_s, slow=s) for s in slow]
