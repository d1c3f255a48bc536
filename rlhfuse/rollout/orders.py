"""The scheduler's commands, as wire commands to workers and requests to the reward source."""

from collections.abc import Callable, Mapping, Sequence

from rlhfuse import messages as m
from rlhfuse.reward_desk import RewardInput
from rlhfuse.rewards import RewardSource
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.ahead import Ahead
from rlhfuse.rollout.records import Record, TokenIds
from rlhfuse.rollout.serving import Serving
from rlhfuse.rollout.turns import Turns
from rlhfuse.rollout.whereabouts import Whereabouts
from rlhfuse.rollout.workers import Workers

_ROLES: dict[str, m.Role] = {
    "actor": "actor",
    "critic": "critic",
    "reference": "reference",
    "reward": "reward",
}


class Orders:
    """Carries out commands for one batch, with what the scheduler does not see of its samples.
    `turns`: of the commands that wait; `decisions`: what the scheduler says of itself."""

    def __init__(
        self,
        fleet: Workers,
        serving: Serving,
        where: Whereabouts,
        ahead: Ahead,
        rewards: RewardSource | None,
        decode: Callable[[TokenIds], str],
    ) -> None:
        self.turns = Turns(self._send)
        self.decisions: list[str] = []
        self._fleet = fleet
        self._serving = serving
        self._where = where
        self._ahead = ahead
        self._rewards = rewards
        self._decode = decode
        self._records: Mapping[int, Record] = {}
        self._sampling: m.Sampling | None = None

    def begin(self, records: Mapping[int, Record], sampling: m.Sampling) -> None:
        """The samples that commands will be about, and how they are drawn."""
        self._records, self._sampling = records, sampling

    def execute(self, commands: Sequence[ev.Command]) -> None:
        for command in commands:
            match command:
                case ev.Generate():
                    self._generate(command.instance, command.sample_ids)
                case ev.Migrate():
                    self._migrate(command)
                case ev.Score():
                    self._score(command)
                case ev.Train():
                    self._train(command)
                case ev.Sleep():
                    self.turns.tell(command.instance, m.Sleep())
                case ev.Wake():
                    self.turns.tell(command.instance, m.Wake())
                case ev.Reward():
                    self._reward(command.sample_ids)
                case ev.Decision():
                    self.decisions.append(command.text)

    def generate(self, instance: int, items: tuple[m.GenerateItem, ...]) -> None:
        """Have an instance generate these, as all samples of the batch are drawn."""
        self.turns.tell(instance, m.Generate(items=items, sampling=self._checked_sampling))

    @property
    def _checked_sampling(self) -> m.Sampling:
        assert self._sampling is not None
        return self._sampling

    def _send(self, device: int, command: m.Command) -> None:
        """Not to a process that has taken the place of the one the scheduler means: what a lost
        instance was to do is given out again when the scheduler hears of the loss."""
        if isinstance(command, m.TrainGroup):
            self._fleet.send(self._fleet.training[device], command)
        elif self._serving.in_place(device):
            self._fleet.send(self._fleet.rollout[device], command)

    def _generate(self, instance: int, sample_ids: Sequence[int]) -> None:
        items = []
        for sample_id in sample_ids:
            record = self._records[sample_id]
            self._where.begin(sample_id, instance)
            items.append(m.GenerateItem(record.tokens, record.seed, record.left_from))
            record.left_from = ""
        self.generate(instance, tuple(items))

    def _migrate(self, command: ev.Migrate) -> None:
        self._where.move(command.sample_ids, command.source, command.destination)
        self.turns.tell(
            command.source,
            m.Export(sample_ids=command.sample_ids, with_cache=command.with_cache),
        )

    def _score(self, command: ev.Score) -> None:
        samples = tuple(self._records[i].tokens for i in command.sample_ids)
        sampling = self._checked_sampling
        self.turns.tell(
            command.worker,
            m.Score(role=_ROLES[command.role], samples=samples, sampling=sampling),
        )

    def _train(self, command: ev.Train) -> None:
        order = self._ahead.order(command, [self._records[i] for i in command.sample_ids])
        if order is not None:
            self.turns.tell(command.worker, order)

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
