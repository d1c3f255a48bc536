"""The rollout, simulated: the same scheduler code as the live loop, costs in, timeline out.

Event-driven at sample granularity. Between two events an instance's batch is constant, so its
samples advance at one rate. A worker does what it is told in order and one thing at a time:
scoring calls and prefills hold its engine up.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.sample import Sample
from rlhfuse.timeline import Kind, Span, Timeline


@dataclass(frozen=True, slots=True)
class Stats:
    """`generation_s`: last response complete; `end_s`: all scored; seconds from the start."""

    generation_s: float
    end_s: float
    num_moved: int
    num_events: int
    decisions: tuple[str, ...]


@dataclass(slots=True)
class _Instance:
    """`steps` counts engine steps (fractions included) and only grows; a sample is complete when
    it reaches its own `due`. `context` is the sum of tokens held."""

    steps: float = 0.0
    at_s: float = 0.0  # `steps` and `context` are of this moment
    context: float = 0.0
    running: dict[int, float] = field(default_factory=dict)  # sample -> due
    due: list[tuple[float, int]] = field(default_factory=list)  # heap; may hold samples that left
    calls: deque[tuple[str, tuple[int, ...]]] = field(default_factory=deque)
    role: str = ""  # scored last
    blocked_s: float = 0.0  # the engine stands still until then
    version: int = 0  # completions planned before are void


class Simulator:
    """Runs one iteration. `lengths[id]` are the true response lengths.

    `progress_s`: how often an instance reports the tokens of its samples (more rarely once the
    rollout lasts long); `reward_s`: how long the
    reward function takes; `slowdown[i]` multiplies everything that worker i does.
    """

    def __init__(
        self,
        scheduler: RolloutScheduler,
        cost: CostModel,
        lengths: Sequence[int],
        prompts: Sequence[int],
        instances: int,
        *,
        groups: Sequence[int] | None = None,
        progress_s: float = 0.05,
        reward_s: float = 0.0,
        slowdown: Sequence[float] = (),
        record: bool = True,
    ) -> None:
        self._scheduler, self._cost, self._lengths = scheduler, cost, lengths
        self._instances = [_Instance() for _ in range(instances)]
        self._slow = tuple(slowdown) or (1.0,) * instances
        self._table = cost.step_table(1024).tolist()
        group_of = groups or range(len(lengths))
        self._samples = {
            i: Sample(id=i, group=g, prompt_tokens=p, seed=i, policy_version=0)
            for i, (p, g) in enumerate(zip(prompts, group_of, strict=True))
        }
        self._tokens = dict.fromkeys(self._samples, 0)  # at the last arrival on an instance
        self._progress_s, self._reward_s = progress_s, reward_s
        self._record = record
        self._spans: list[Span] = []
        self._heap: list[tuple[float, int, ev.Event | tuple[int, int]]] = []
        self._counter = 0
        self._now_s = self._generated_s = 0.0
        self._moved = 0
        self._decisions: list[str] = []
        self._moving: dict[int, tuple[int, bool]] = {}  # destination, with its cache

    def run(self) -> tuple[Timeline, Stats]:
        """From the first dispatch to the last score."""
        num_events = 0
        self._tell(ev.Started(0.0, tuple(self._samples.values())))
        next_report_s = self._progress_s
        while not self._scheduler.done:
            assert self._heap, f"stuck: {self._scheduler.waiting_for()}"
            if self._heap[0][0] > next_report_s and self._scheduler.num_generating:
                self._now_s = next_report_s
                self._report()
                next_report_s = self._now_s + max(self._progress_s, 0.2 * self._now_s)
                continue
            self._now_s, _, what = heapq.heappop(self._heap)
            num_events += 1
            if isinstance(what, tuple):
                self._complete(*what)
            else:
                self._deliver(what)
        stats = Stats(
            self._generated_s, self._now_s, self._moved, num_events, tuple(self._decisions)
        )
        return Timeline(tuple(self._spans)), stats

    # --- what happens ----------------------------------------------------------------------

    def _tell(self, event: ev.Event) -> None:
        for command in self._scheduler.handle(event):
            self._execute(command)

    def _deliver(self, event: ev.Event) -> None:
        if isinstance(event, ev.Scored):
            instance = self._instances[event.worker]
            instance.calls.popleft()
            self._tell(event)
            self._next_call(event.worker)
            self._plan(event.worker)
            return
        self._tell(event)
        if isinstance(event, ev.Left):
            self._arrive(event)

    def _arrive(self, event: ev.Left) -> None:
        """The sample reaches its destination, which prefills where no cache came along."""
        destination, cached = self._moving.pop(event.sample_id)
        self._add(destination, (event.sample_id,), prefill=not cached)

    def _complete(self, index: int, version: int) -> None:
        """The next sample of an instance is done (unless plans have changed)."""
        instance = self._instances[index]
        if version != instance.version:
            return
        self._catch_up(index)
        finished = []
        while instance.due and instance.due[0][0] <= instance.steps + 1e-6:
            due, sample_id = heapq.heappop(instance.due)
            if instance.running.get(sample_id) == due:
                del instance.running[sample_id]
                instance.context -= self._held(sample_id, self._lengths[sample_id])
                finished.append(sample_id)
        self._generated_s = self._now_s
        for sample_id in finished:
            self._tell(ev.Finished(self._now_s, index, sample_id, self._lengths[sample_id]))
        self._plan(index)

    def _held(self, sample_id: int, response_tokens: float) -> float:
        return self._samples[sample_id].prompt_tokens + response_tokens

    def _report(self) -> None:
        for index, instance in enumerate(self._instances):
            if instance.running:
                self._catch_up(index)
                true, done = self._lengths, instance.steps + 1e-6
                lengths = tuple(
                    (s, min(int(true[s] - due + done), true[s] - 1))
                    for s, due in instance.running.items()
                )
                self._tell(ev.Progress(self._now_s, index, lengths))
                self._plan(index)

    def _so_far(self, index: int, sample_id: int) -> int:
        instance = self._instances[index]
        left = instance.running[sample_id] - instance.steps
        return min(int(self._lengths[sample_id] - left + 1e-6), self._lengths[sample_id] - 1)

    # --- the engine ------------------------------------------------------------------------

    def _rate_s(self, index: int, steps: float) -> float:
        """Mean seconds per step over the next `steps` steps."""
        instance = self._instances[index]
        batch = len(instance.running)
        base = self._table[batch] if batch < len(self._table) else self._cost.step_s(batch)
        context = instance.context + 0.5 * steps * batch
        return float(self._slow[index] * (base + self._cost.decode_context_s * context))

    def _catch_up(self, index: int) -> None:
        """Bring `steps` to the present."""
        instance = self._instances[index]
        start_s = max(instance.at_s, instance.blocked_s)
        if instance.running and self._now_s > start_s:
            elapsed = self._now_s - start_s
            steps = elapsed / self._rate_s(index, elapsed / self._rate_s(index, 0.0))
            batch = len(instance.running)
            self._span(
                index, start_s, Kind.GENERATE, "decode",
                steps=steps, batch=batch, context_tokens=instance.context + 0.5 * steps * batch,
            )  # fmt: skip
            instance.steps += steps
            instance.context += steps * batch
        instance.at_s = self._now_s

    def _plan(self, index: int) -> None:
        """Put the instance's next completion on the heap."""
        instance = self._instances[index]
        instance.version += 1
        while instance.due and instance.running.get(instance.due[0][1]) != instance.due[0][0]:
            heapq.heappop(instance.due)
        if instance.due:
            steps = max(instance.due[0][0] - instance.steps, 0.0)
            start_s = max(self._now_s, instance.blocked_s)
            at_s = start_s + steps * self._rate_s(index, steps)
            self._push(at_s, (index, instance.version))

    def _block(self, index: int, seconds: float, kind: Kind, name: str, tokens: float) -> None:
        """The worker does something that holds its engine up."""
        instance = self._instances[index]
        self._catch_up(index)
        start_s = max(self._now_s, instance.blocked_s)
        instance.blocked_s = start_s + seconds * self._slow[index]
        if self._record:
            self._spans.append(
                Span(f"rank{index}", start_s, instance.blocked_s, kind, name, {"tokens": tokens})
            )

    def _add(self, index: int, sample_ids: Sequence[int], *, prefill: bool = True) -> None:
        instance = self._instances[index]
        self._catch_up(index)
        tokens = 0.0
        for sample_id in sample_ids:
            done = self._tokens[sample_id]
            due = instance.steps + self._lengths[sample_id] - done
            instance.running[sample_id] = due
            heapq.heappush(instance.due, (due, sample_id))
            held = self._held(sample_id, done)
            instance.context += held
            tokens += held if prefill else 0.0
        if tokens:
            self._block(index, self._cost.prefill_s(tokens), Kind.PREFILL, "prefill", tokens)
        self._plan(index)

    # --- commands --------------------------------------------------------------------------

    def _execute(self, command: ev.Command) -> None:
        match command:
            case ev.Score():
                instance = self._instances[command.worker]
                instance.calls.append((command.role, command.sample_ids))
                if len(instance.calls) == 1:
                    self._next_call(command.worker)
            case ev.Generate():
                self._add(command.instance, command.sample_ids)
            case ev.Migrate():
                self._migrate(command)
            case ev.Reward():
                for sample_id in command.sample_ids:
                    at_s = self._now_s + self._reward_s
                    self._push(at_s, ev.Rewarded(at_s, sample_id))
            case ev.Decision():
                self._decisions.append(f"{self._now_s:.3f} s: {command.text}")
            case _:
                pass

    def _migrate(self, command: ev.Migrate) -> None:
        source = self._instances[command.source]
        self._catch_up(command.source)
        for sample_id in command.sample_ids:
            if sample_id not in source.running:
                continue
            tokens = self._so_far(command.source, sample_id)
            self._tokens[sample_id] = tokens
            del source.running[sample_id]
            self._moving[sample_id] = (command.destination, command.with_cache)
            self._moved += 1
            transit_s = self._cost.migrate_call_s
            if command.with_cache:
                transit_s += self._cost.migrate_token_s * self._held(sample_id, tokens)
            at_s = self._now_s + transit_s * self._slow[command.source]
            self._push(at_s, ev.Left(at_s, command.source, sample_id, tokens))
        source.context = sum(self._held(s, self._so_far(command.source, s)) for s in source.running)
        self._plan(command.source)

    def _next_call(self, index: int) -> None:
        """Start the oldest scoring call that the worker was given."""
        instance = self._instances[index]
        if not instance.calls:
            return
        role, sample_ids = instance.calls[0]
        tokens = sum(self._held(s, self._lengths[s]) for s in sample_ids)
        self._catch_up(index)
        seconds = self._cost.score_s(role, tokens)
        if instance.role not in ("", role):
            seconds += self._cost.swap_s
        instance.role = role
        self._block(index, seconds, Kind.SCORE, role, tokens)
        at_s = instance.blocked_s
        self._push(at_s, ev.Scored(at_s, index, role, sample_ids))

    def _push(self, at_s: float, what: ev.Event | tuple[int, int]) -> None:
        self._counter += 1
        heapq.heappush(self._heap, (at_s, self._counter, what))

    def _span(self, index: int, start_s: float, kind: Kind, name: str, **args: float) -> None:
        if self._record:
            self._spans.append(Span(f"rank{index}", start_s, self._now_s, kind, name, dict(args)))


def simulate(
    cost: CostModel,
    policy: Policy,
    lengths: Sequence[int],
    prompts: Sequence[int],
    instances: int,
    roles: tuple[str, ...],
    *,
    history: Sequence[int] = (),
    believed: CostModel | None = None,
    slowdown: Sequence[float] = (),
    record: bool = True,
) -> tuple[Timeline, Stats]:
    """One iteration from costs, policy and true lengths. `history`: complete lengths that the
    scheduler has seen before; `believed`: its cost model, where it differs from the truth."""
    predictor = LengthModel(policy.max_response_tokens, history)
    scheduler = RolloutScheduler(instances, roles, believed or cost, policy, lengths=predictor)
    world = Simulator(
        scheduler, cost, lengths, prompts, instances, slowdown=slowdown, record=record
    )
    return world.run()


def clairvoyant(
    cost: CostModel,
    policy: Policy,
    lengths: Sequence[int],
    prompts: Sequence[int],
    instances: int,
    roles: tuple[str, ...],
) -> tuple[float, int]:
    """Seconds with the best single move over all moments (numbers of samples that remain) and
    sizes, lengths known; and the remaining samples at that moment (0: no move is best)."""
    never = replace(policy, migration=Migration.OFF, inter_stage=InterStage.ON)
    _, stats = simulate(cost, never, lengths, prompts, instances, roles, record=False)
    best, best_at = stats.end_s, 0
    sizes = sorted({1, 2, 3, *(max(1, i * instances // 8) for i in range(1, 8))})
    for at_count in sorted({max(1, round(len(lengths) * i / 40)) for i in range(1, 40)}):
        for size in (s for s in sizes if s < instances):
            forced = replace(
                never, migration=Migration.FORCED, forced_count=at_count, forced_keep=size
            )
            _, stats = simulate(cost, forced, lengths, prompts, instances, roles, record=False)
            if stats.end_s < best:
                best, best_at = stats.end_s, at_count
    return best, best_at
