"""The live loop of generation and early inference: wire messages to events, commands to workers.

All decisions are the scheduler's; the simulator drives the same scheduler. The loop keeps what
the scheduler must not see: token ids, seeds, scores, and who holds which per-token numbers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rlhfuse import messages as m
from rlhfuse.data import Row
from rlhfuse.fleet import Fleet, WorkerFailed
from rlhfuse.progress import Progress
from rlhfuse.rewards import RewardInput, RewardSource
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.sample import Sample

TokenIds = npt.NDArray[np.int32]
_POLL_S = 0.25
_ROLES: dict[str, m.Role] = {
    "actor": "actor",
    "critic": "critic",
    "reference": "reference",
    "reward": "reward",
}
_TICK_S = 1.0
_PROGRESS_S = 0.2


@dataclass(slots=True)
class Record:
    """One sample as the controller knows it. `group`: index of its prompt in the batch; `row`:
    the data row it came from; `endpoints`: who holds its per-token scores."""

    sample_id: int
    group: int
    prompt: TokenIds
    seed: int
    row: Row
    response: bytearray = field(default_factory=bytearray)
    score: float = 0.0
    reward_metrics: dict[str, float] = field(default_factory=dict)
    endpoints: dict[str, str] = field(default_factory=dict)
    rollout_endpoint: str = ""
    left_from: str = ""  # endpoint of the worker that it left last
    finish_reason: str = ""

    @property
    def response_ids(self) -> TokenIds:
        return np.frombuffer(bytes(self.response), dtype=np.int32)

    @property
    def tokens(self) -> m.SampleTokens:
        return m.SampleTokens(self.sample_id, self.prompt.tobytes(), bytes(self.response))


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """`generated_s` and `done_s`: when the last response and the last score were there, in
    seconds from the start."""

    records: tuple[Record, ...]
    generated_s: float
    done_s: float
    moved: int
    decisions: tuple[str, ...]


class RolloutLoop:
    """Runs one batch of samples from prompt to score."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: RolloutScheduler,
        rewards: RewardSource | None,
        progress: Progress,
        decode: Callable[[TokenIds], str],
        *,
        timeout_s: float,
        score_clip: float | None = None,
        show: bool = True,
    ) -> None:
        """`score_clip`: limit of a reward model's scores, either way."""
        self._fleet = fleet
        self._scheduler = scheduler
        self._rewards = rewards
        self._progress = progress
        self._decode = decode
        self._timeout_s = timeout_s
        self._score_clip = score_clip
        self._show = show
        self._records: dict[int, Record] = {}
        self._moving: dict[int, int] = {}  # sample -> destination instance
        self._with_reward_model = False
        self._finished = 0
        self._scored = 0
        self._moved = 0
        self._tokens = 0
        self._decisions: list[str] = []
        self._sampling: m.Sampling | None = None
        self._shown_s = 0.0
        self._scores_wanted = 0

    def run(
        self, records: Sequence[Record], sampling: m.Sampling, policy_version: int, roles: int
    ) -> RolloutResult:
        """Generate and score `records`; `roles` is the number of scorers each sample needs.

        Raises:
            WorkerFailed: a worker failed, or nothing happened within the time limit.
        """
        self._sampling = sampling
        self._records = {record.sample_id: record for record in records}
        self._scores_wanted = len(records) * roles
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
        start_s = quiet_since = ticked = time.monotonic()
        generated_s = 0.0
        self._execute(self._scheduler.handle(ev.Started(start_s, samples)))
        while not self._scheduler.done:
            heard = self._listen()
            now = time.monotonic()
            if heard:
                quiet_since = now
                if not generated_s and self._finished == len(records):
                    generated_s = now - start_s
            elif now - quiet_since > self._timeout_s:
                raise WorkerFailed(
                    f"nothing happened for {self._timeout_s:g} s (trainer.wait_timeout_s); "
                    f"waiting for {self._scheduler.waiting_for()}"
                )
            if now - ticked > _TICK_S:
                ticked = now
                self._execute(self._scheduler.handle(ev.Tick(now)))
        self._scheduler.validate()
        done_s = time.monotonic() - start_s
        return RolloutResult(
            records=tuple(records),
            generated_s=generated_s or done_s,
            done_s=done_s,
            moved=self._moved,
            decisions=tuple(self._decisions),
        )

    # --- events ----------------------------------------------------------------------------

    def _listen(self) -> bool:
        """Handle what has come in; whether anything did."""
        waiting_reward = self._rewards is not None and self._rewards.outstanding > 0
        received = self._fleet.receive(0.02 if waiting_reward else _POLL_S)
        for worker, event in received:
            self._absorb(worker, event)
        answered = self._absorb_rewards() if waiting_reward else False
        self._show_progress()
        return bool(received) or answered

    def _absorb(self, worker: str, event: m.Event) -> None:
        instance = self._fleet.rollout.index(worker)
        match event:
            case m.Grown():
                self._absorb_growth(worker, instance, event.growths)
            case m.Exported():
                for growth in event.growths:
                    self._absorb_left(worker, instance, growth)
                for sample_id in event.requested:
                    # What did not leave had finished, and was reported as such before.
                    self._moving.pop(sample_id, None)
            case m.Scored():
                self._absorb_scores(worker, instance, event)
            case m.Ack():
                pass
            case _:
                raise AssertionError(f"{worker} said {event} during the rollout")

    def _absorb_growth(self, worker: str, instance: int, growths: Sequence[m.Growth]) -> None:
        now = time.monotonic()
        running: list[tuple[int, int]] = []
        finished: list[ev.Finished] = []
        for growth in growths:
            record = self._take(growth)
            if growth.finish_reason:
                record.finish_reason = growth.finish_reason
                record.rollout_endpoint = self._fleet.endpoint(worker)
                finished.append(ev.Finished(now, instance, growth.sample_id, growth.length))
            else:
                running.append((growth.sample_id, growth.length))
        if running:
            self._execute(self._scheduler.handle(ev.Progress(now, instance, tuple(running))))
        for event in finished:
            self._finished += 1
            self._execute(self._scheduler.handle(event))

    def _absorb_left(self, worker: str, instance: int, growth: m.Growth) -> None:
        record = self._take(growth)
        record.left_from = self._fleet.endpoint(worker)
        destination = self._moving.pop(growth.sample_id)
        left = ev.Left(time.monotonic(), instance, growth.sample_id, growth.length)
        commands = self._scheduler.handle(left)
        self._moved += 1
        redirected = any(
            isinstance(c, ev.Generate) and growth.sample_id in c.sample_ids for c in commands
        )
        if not redirected:
            commands = [ev.Generate(destination, (growth.sample_id,)), *commands]
        self._execute(commands)

    def _absorb_scores(self, worker: str, instance: int, event: m.Scored) -> None:
        for sample_id, score in zip(event.sample_ids, event.scores, strict=True):
            record = self._records[sample_id]
            if event.role == "reward":
                limit = self._score_clip
                record.score = score if limit is None else max(-limit, min(limit, score))
            else:
                record.endpoints[event.role] = self._fleet.endpoint(worker)
        self._scored += len(event.sample_ids)
        self._execute(
            self._scheduler.handle(
                ev.Scored(time.monotonic(), instance, event.role, event.sample_ids)
            )
        )

    def _absorb_rewards(self) -> bool:
        assert self._rewards is not None
        results = self._rewards.poll(0.0)
        for result in results:
            if result.error:
                self._progress.note(f"reward: {result.error}")
            record = self._records[result.sample_id]
            record.score = result.score
            record.reward_metrics = dict(result.metrics)
            self._execute(self._scheduler.handle(ev.Rewarded(time.monotonic(), result.sample_id)))
        return bool(results)

    def _take(self, growth: m.Growth) -> Record:
        record = self._records[growth.sample_id]
        record.response.extend(growth.tokens)
        self._tokens += len(growth.tokens) // 4
        assert len(record.response) == 4 * growth.length, (
            f"sample {growth.sample_id}: {len(record.response) // 4} tokens here, "
            f"{growth.length} at its instance"
        )
        return record

    # --- commands --------------------------------------------------------------------------

    def _execute(self, commands: Sequence[ev.Command]) -> None:
        for command in commands:
            match command:
                case ev.Generate():
                    self._generate(command.instance, command.sample_ids)
                case ev.Migrate():
                    self._migrate(command)
                case ev.Score():
                    self._score(command)
                case ev.Sleep():
                    self._fleet.send(self._fleet.rollout[command.instance], m.Sleep())
                case ev.Wake():
                    self._fleet.send(self._fleet.rollout[command.instance], m.Wake())
                case ev.Reward():
                    self._reward(command.sample_ids)
                case ev.Decision():
                    self._decisions.append(command.text)

    def _generate(self, instance: int, sample_ids: Sequence[int]) -> None:
        assert self._sampling is not None
        items = []
        for sample_id in sample_ids:
            record = self._records[sample_id]
            items.append(m.GenerateItem(record.tokens, record.seed, record.left_from))
            record.left_from = ""
        self._fleet.send(
            self._fleet.rollout[instance],
            m.Generate(items=tuple(items), sampling=self._sampling),
        )

    def _migrate(self, command: ev.Migrate) -> None:
        for sample_id in command.sample_ids:
            self._moving[sample_id] = command.destination
        self._fleet.send(
            self._fleet.rollout[command.source],
            m.Export(sample_ids=command.sample_ids, with_cache=command.with_cache),
        )

    def _score(self, command: ev.Score) -> None:
        assert self._sampling is not None
        samples = tuple(self._records[i].tokens for i in command.sample_ids)
        self._fleet.send(
            self._fleet.rollout[command.worker],
            m.Score(
                role=_ROLES[command.role], samples=samples, temperature=self._sampling.temperature
            ),
        )

    def _reward(self, sample_ids: Sequence[int]) -> None:
        assert self._rewards is not None, "a reward was asked for, but there is no reward source"
        self._rewards.submit([self._reward_input(self._records[i]) for i in sample_ids])

    def _reward_input(self, record: Record) -> RewardInput:
        row = record.row
        return RewardInput(
            sample_id=record.sample_id,
            data_source=row.data_source,
            solution_str=self._decode(record.response_ids),
            ground_truth=row.ground_truth,
            extra_info=row.extra_info,
        )

    def _show_progress(self) -> None:
        now = time.monotonic()
        if not self._show or now - self._shown_s < _PROGRESS_S:
            return
        self._shown_s = now
        self._progress.generation(self._finished, len(self._records), self._tokens, self._moved)
        if self._scored:
            self._progress.scoring(self._scored, self._scores_wanted)
