"""The live loop of generation and early inference: wire messages to events for the scheduler.

All decisions are the scheduler's; the simulator drives the same scheduler. The loop keeps what
the scheduler must not see: token ids, seeds, scores, and who holds which per-token numbers. What
dies with a worker is generated, or computed, again by another: results do not change.
"""

import time
from collections.abc import Callable, Sequence

from rlhfuse import messages as m
from rlhfuse.members import WorkerFailed
from rlhfuse.progress import Progress
from rlhfuse.rewards import RewardSource
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.again import Again
from rlhfuse.rollout.ahead import Ahead, PlanGroup
from rlhfuse.rollout.orders import Orders
from rlhfuse.rollout.records import Record, RolloutResult, TokenIds
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.serving import Serving
from rlhfuse.rollout.tally import Display, Tally
from rlhfuse.rollout.whereabouts import Whereabouts
from rlhfuse.rollout.workers import Workers
from rlhfuse.sample import Sample

_POLL_S = 0.25
_TICK_S = 1.0
_QUIET_S = 5.0  # then the loop says what it waits for


class RolloutLoop:
    """Runs one batch of samples from prompt to score."""

    def __init__(
        self,
        fleet: Workers,
        scheduler: RolloutScheduler,
        rewards: RewardSource | None,
        progress: Progress,
        decode: Callable[[TokenIds], str],
        *,
        timeout_s: float,
        score_clip: float | None = None,
        show: bool = True,
        needs_logprobs: bool = False,
        plan_group: PlanGroup | None = None,
    ) -> None:
        """`score_clip`: limit of a reward model's scores, either way. `needs_logprobs`: the
        engine's log-probabilities enter the loss, so that those which die with a worker are made
        again; else they are only missing from metrics. `plan_group`: where the scheduler has groups
        trained."""
        self._fleet = fleet
        self._scheduler = scheduler
        self._rewards = rewards
        self._progress = progress
        self._timeout_s = timeout_s
        self._score_clip = score_clip
        self._show = show
        self._needs_logprobs = needs_logprobs
        self._records: dict[int, Record] = {}
        self._serving = Serving(fleet)
        self._where = Whereabouts()
        self._again = Again()
        self._ahead = Ahead(plan_group, needs_logprobs=needs_logprobs)
        self._orders = Orders(fleet, self._serving, self._where, self._ahead, rewards, decode)
        self._turns = self._orders.turns
        self._tally = Tally()
        self._display: Display | None = None
        self._waking: set[int] = set()  # told to sleep, and not known to

    def run(
        self, records: Sequence[Record], sampling: m.Sampling, policy_version: int, scores: int
    ) -> None:
        """Generate and score `records`; `scores`: how many they need of all models together.

        Raises:
            WorkerFailed: a worker failed, or nothing happened within the time limit.
        """
        self._records = {record.sample_id: record for record in records}
        self._orders.begin(self._records, sampling)
        if self._show:
            groups = len({record.group for record in records})
            self._display = Display(self._progress, len(records), groups, scores)
        samples = tuple(
            Sample(
                id=record.sample_id,
                group=record.group,
                prompt_tokens=len(record.prompt),
                seed=record.seed,
                policy_version=policy_version,
                source=record.row.data_source,
            )
            for record in records
        )
        self._tally.start_s = start_s = time.monotonic()
        for instance in self._serving.take_absent():
            self._tell(ev.InstanceLost(start_s, instance))
        self._tell(ev.Started(start_s, samples))
        self.finish()

    def result(self) -> RolloutResult:
        """What has come of the batch, and when."""
        return self._tally.result(
            self._records.values(), self._orders.decisions, self._ahead.trained
        )

    @property
    def done_at_s(self) -> float:
        """When the last score was there."""
        return self._tally.done_at_s

    def finish(self) -> None:
        """Go on until every sample has all that it needs; also after a worker that held some of it
        has died since."""
        ticked = quiet_since = time.monotonic()
        say_after_s = _QUIET_S
        self._reconcile()
        while self._to_generate_again() or not self._scheduler.done:
            heard = self._listen()
            now = time.monotonic()
            if heard:
                quiet_since, say_after_s = now, _QUIET_S
            elif now - quiet_since > self._timeout_s:
                raise WorkerFailed(
                    f"nothing happened for {self._timeout_s:g} s (trainer.wait_timeout_s); "
                    f"waiting for {self._waiting_for()}"
                )
            elif now - quiet_since > say_after_s:
                say_after_s *= 2
                self._progress.note(f"waiting for {self._waiting_for()}")
            if now - ticked > _TICK_S:
                ticked = now
                self._tell(ev.Tick(now))
        self._tally.all_scored(self._scheduler.all_scored)
        self._scheduler.validate()

    def rest(self) -> None:
        """Let every instance give back its key-value memory, and wait until they have.

        Raises:
            WorkerFailed: one neither did nor died within the time limit.
        """
        self._waking = set(self._serving.instances)
        for instance in sorted(self._waking):
            self._turns.tell(instance, m.Sleep())
        deadline = time.monotonic() + self._timeout_s
        while self._waking.intersection(self._serving.instances):
            if time.monotonic() > deadline:
                names = ", ".join(self._fleet.rollout[i] for i in sorted(self._waking))
                raise WorkerFailed(f"{names}: not asleep within {self._timeout_s:g} s")
            self._listen()

    def _waiting_for(self) -> str:
        return str(self._again) or self._scheduler.waiting_for()

    # --- workers that die and come back ----------------------------------------------------

    def _reconcile(self) -> bool:
        """Tell the scheduler whose process is gone and who takes part again."""
        # All at once: what the first loss has the scheduler send to another of them must not reach
        # the process that has taken its place.
        gone = self._serving.take_gone()
        for instance, endpoint in gone.items():
            self._lose(instance, endpoint)
        joined = self._serving.take_joined()
        for instance in joined:
            self._tell(ev.InstanceReady(time.monotonic(), instance))
        return bool(gone or joined)

    def _lose(self, instance: int, endpoint: str) -> None:
        """What the worker had is gone: tokens not yet reported, log-probabilities, scores. The
        device's training worker lives on."""
        self._tally.lost += 1
        self._waking.discard(instance)
        running = self._where.lose(instance)
        for record in self._records.values():
            record.forget(endpoint)
            if record.sample_id in running:
                if self._needs_logprobs:
                    record.response.clear()
                self._tally.rescue(record)
        self._again.lose(instance)
        self._turns.lose(instance)
        lost = ev.InstanceLost(time.monotonic(), instance, trains_on=True)
        self._tell(lost)

    def _to_generate_again(self) -> bool:
        """Whether log-probabilities that the loss needs are missing; their samples are generated
        again, from the start, and give the same tokens. At the end, or when a group is to be
        trained: groups that had to wait for that go on."""
        for command in self._ahead.take_held():
            self._train_if_scored(command)
        awaited = self._ahead.awaited
        if not self._needs_logprobs or not (awaited or self._scheduler.done):
            return False
        missing = [
            r
            for r in self._records.values()
            if not r.rollout_endpoint
            and r.sample_id not in self._ahead.trained
            and (not awaited or r.sample_id in awaited)
        ]
        for instance, items in self._again.begin(missing, self._serving.instances):
            self._orders.generate(instance, items)
        return bool(missing)

    def _train_if_scored(self, command: ev.Train) -> None:
        """A group that had to wait, whose scores may have died meanwhile."""
        roles = {*self._scheduler.roles} - {"reward"}
        if all(roles <= self._records[i].endpoints.keys() for i in command.sample_ids):
            self._orders.execute([command])
            return
        gone = ev.NotTrained(time.monotonic(), command.worker, command.sample_ids)
        self._tell(gone)

    # --- events ----------------------------------------------------------------------------

    def _listen(self) -> bool:
        """Handle what has come in; whether anything did."""
        waiting_reward = self._rewards is not None and self._rewards.outstanding > 0
        received = self._fleet.receive(0.02 if waiting_reward else _POLL_S)
        for worker, event in received:
            self._absorb(worker, event)
        changed = self._reconcile()
        answered = self._absorb_rewards() if waiting_reward else False
        self._tally.all_scored(self._scheduler.all_scored)
        if self._display is not None:
            self._display.show(self._tally, self._scheduler.groups_trained)
        return bool(received) or answered or changed

    def _absorb(self, worker: str, event: m.Event) -> None:
        if isinstance(event, m.GroupTrained):
            device = self._fleet.training.index(worker)
            self._turns.trained(device)
            self._tell(self._ahead.heard(device, event))
            return
        instance = self._fleet.rollout.index(worker)
        match event:
            case m.Grown():
                self._absorb_growth(instance, event.growths)
            case m.Exported():
                # What did not leave had finished, and was reported as such before. First, because
                # a sample that has just arrived may be told to move again at once.
                for sample_id in set(event.requested) - {g.sample_id for g in event.growths}:
                    self._where.stay(sample_id)
                for growth in event.growths:
                    self._absorb_left(instance, growth)
            case m.Scored():
                self._turns.answered(instance)
                self._absorb_scores(instance, event)
            case m.Ack(command="Sleep"):
                self._turns.answered(instance)
                self._waking.discard(instance)
            case m.Ack():
                pass
            case _:
                raise AssertionError(f"{worker} said {event} during the rollout")

    def _absorb_growth(self, instance: int, growths: Sequence[m.Growth]) -> None:
        now = time.monotonic()
        running: list[tuple[int, int]] = []
        finished: list[ev.Finished] = []
        for growth in growths:
            record = self._records[growth.sample_id]
            if growth.sample_id in self._again:
                if self._again.take(record, growth):
                    record.rollout_endpoint = self._serving.holder(instance)
                continue
            self._take(growth)
            if growth.finish_reason:
                record.finish_reason = growth.finish_reason
                self._where.end(growth.sample_id)
                if growth.whole or not self._needs_logprobs:
                    record.rollout_endpoint = self._serving.holder(instance)
                finished.append(ev.Finished(now, instance, growth.sample_id, growth.length))
            else:
                running.append((growth.sample_id, growth.length))
        if running:
            self._tell(ev.Progress(now, instance, tuple(running)))
        for event in finished:
            self._tally.finished += 1
            self._tally.generated_at_s = now
            self._tally.trained_ahead = self._scheduler.groups_trained
            self._tell(event)

    def _absorb_left(self, instance: int, growth: m.Growth) -> None:
        record = self._take(growth)
        record.left_from = self._serving.holder(instance)
        destination = self._where.leave(growth.sample_id)
        left = ev.Left(time.monotonic(), instance, growth.sample_id, growth.length)
        commands = self._scheduler.handle(left)
        self._tally.moved += 1
        redirected = any(
            isinstance(c, ev.Generate) and growth.sample_id in c.sample_ids for c in commands
        )
        if not redirected and destination in self._serving:
            commands = [ev.Generate(destination, (growth.sample_id,)), *commands]
        self._orders.execute(commands)

    def _absorb_scores(self, instance: int, event: m.Scored) -> None:
        for sample_id, score in zip(event.sample_ids, event.scores, strict=True):
            record = self._records[sample_id]
            if event.role == "reward":
                limit = self._score_clip
                record.score = score if limit is None else max(-limit, min(limit, score))
            else:
                record.endpoints[event.role] = self._serving.holder(instance)
        self._tally.scored += len(event.sample_ids)
        self._tell(ev.Scored(time.monotonic(), instance, event.role, event.sample_ids))

    def _absorb_rewards(self) -> bool:
        assert self._rewards is not None
        results = self._rewards.poll(0.0)
        for result in results:
            if result.error:
                self._progress.note(f"reward: {result.error}")
            record = self._records[result.sample_id]
            record.score = result.score
            record.reward_metrics = dict(result.metrics)
            self._tell(ev.Rewarded(time.monotonic(), result.sample_id))
        return bool(results)

    def _take(self, growth: m.Growth) -> Record:
        record = self._records[growth.sample_id]
        record.response.extend(growth.tokens)
        self._tally.tokens += len(growth.tokens) // 4
        assert len(record.response) == 4 * growth.length, (
            f"sample {growth.sample_id}: {len(record.response) // 4} tokens here, "
            f"{growth.length} at its instance"
        )
        return record

    def _tell(self, event: ev.Event) -> None:
        """Tell the scheduler, and do what it says."""
        self._orders.execute(self._scheduler.handle(event))
