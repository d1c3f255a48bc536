"""Laws of the rollout scheduler: whatever happens in whatever order, its books agree, and every
sample ends scored once by every role, or dropped for a reason."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.sample import Sample, SampleState

ROLES = ("actor", "critic", "reference", "reward")
COST = CostModel.default()
COST = replace(COST, score_token_s={**COST.score_token_s, "train": 4e-4})
DONE = (SampleState.SCORED, SampleState.DROPPED)


class _World:
    """Workers that do what they are told, one thing at a time, in any order that chance picks;
    it refuses commands that real workers could not obey."""

    def __init__(
        self, seed: int, policy: Policy, instances: int, num_samples: int, train: bool = False
    ) -> None:
        self.random = random.Random(seed)
        cost = replace(COST, swap_s=0.01 * (seed % 3))
        # In every third world a role need not score half of the samples.
        self.spared = frozenset(range(0, num_samples, 2)) if seed % 3 == 1 else frozenset()
        self.scheduler = RolloutScheduler(
            instances,
            ROLES,
            cost,
            policy,
            function_reward=seed % 2 == 0,
            train_groups=train,
            spared={ROLES[0]: self.spared},
        )
        self.policy = policy
        self.now_s = 0.0
        lengths = {
            i: min(60, 1 + int(self.random.paretovariate(0.9) * 4)) for i in range(num_samples)
        }
        self.lengths = lengths
        self.samples = tuple(
            Sample(id=i, group=i // 2, prompt_tokens=4 + i % 5, seed=i, policy_version=0)
            for i in range(num_samples)
        )
        self.running: list[dict[int, int]] = [{} for _ in range(instances)]
        self.alive = [True] * instances
        self.can_score = [True] * instances
        self.trained: Counter[int] = Counter()
        self.released: dict[int, tuple[int, ...]] = {}
        self.known: dict[int, int] = dict.fromkeys(lengths, 0)
        self.leaving: list[tuple[int, int, int]] = []  # source, sample, destination
        self.calls: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(instances)]
        self.rewards: list[int] = []
        self.scores: Counter[tuple[str, int]] = Counter()
        self.held: dict[tuple[str, int], int] = {}
        self.finishing: list[int] = []  # done in the last step, reported one by one
        self.early = 0

    def tell(self, event: ev.Event) -> None:
        for command in self.ask(event):
            self.obey(command)

    def has_scores(self, sample_id: int) -> bool:
        """Every role that the sample needs has scored it, or it is trained already."""
        needed = ROLES[1:] if sample_id in self.spared else ROLES
        scored = all((role, sample_id) in self.held for role in needed)
        return scored or sample_id in self.trained

    def ask(self, event: ev.Event) -> list[ev.Command]:
        commands = self.scheduler.handle(event)
        self.scheduler.validate()
        return commands

    def obey(self, command: ev.Command) -> None:
        match command:
            case ev.Generate():
                assert self.alive[command.instance]
                for s in command.sample_ids:
                    assert all(s not in r for r in self.running), "generated twice"
                    self.running[command.instance][s] = self.known[s]
                assert len(self.running[command.instance]) <= self.policy.max_running
            case ev.Migrate():
                for s in command.sample_ids:
                    assert s in self.running[command.source] or s in self.finishing
                    self.leaving.append((command.source, s, command.destination))
            case ev.Score():
                assert self.alive[command.worker]
                assert self.can_score[command.worker]
                for s in command.sample_ids:
                    assert self.samples[s].state is SampleState.FINISHED
                    assert (command.role, s) not in self.held, "scored twice"
                    assert not (command.role == ROLES[0] and s in self.spared)
                if self.scheduler.num_generating:
                    assert self.policy.inter_stage is not InterStage.OFF
                    assert not self.running[command.worker]
                    self.early += 1
                self.calls[command.worker].append((command.role, command.sample_ids))
            case _:
                self.obey_late(command)

    def obey_late(self, command: ev.Command) -> None:
        match command:
            case ev.Reward():
                self.rewards.extend(command.sample_ids)
            case ev.Release():
                self.released[command.group] = command.sample_ids
                mine = [s for s in self.samples if s.group == command.group]
                assert all(s.state in DONE for s in mine)
                scored = {s.id for s in mine if s.state is SampleState.SCORED}
                assert set(command.sample_ids) == scored
            case ev.Train():
                assert self.can_score[command.worker]
                assert not self.running[command.worker]
                assert all(self.samples[s].state is SampleState.SCORED for s in command.sample_ids)
                assert not any(s in self.trained for s in command.sample_ids), "trained twice"
                self.calls[command.worker].append(("train", command.sample_ids))

    def step(self) -> None:
        """One thing happens somewhere."""
        self.now_s += self.random.random() * 0.01
        actions = [self.decode] * 6 + [self.leave, self.score, self.reward] * 2 + [self.tick]
        self.random.choice(actions)()

    def tick(self) -> None:
        self.tell(ev.Tick(self.now_s))

    def decode(self) -> None:
        instance = self.random.randrange(len(self.running))
        if not self.running[instance] or self.calls[instance]:
            return
        grown = {}
        for s in self.running[instance]:
            self.running[instance][s] += self.random.randint(1, 3)
            grown[s] = self.running[instance][s]
        finished = [s for s, tokens in grown.items() if tokens >= self.lengths[s]]
        rest = tuple((s, t) for s, t in grown.items() if s not in finished)
        self.known.update(dict(rest))
        self.tell(ev.Progress(self.now_s, instance, rest))
        self.finishing = finished
        for s in finished:
            del self.running[instance][s]
        for s in finished:
            self.tell(ev.Finished(self.now_s, instance, s, self.lengths[s]))

    def leave(self) -> None:
        if not self.leaving:
            return
        source, s, destination = self.leaving.pop(self.random.randrange(len(self.leaving)))
        if s not in self.running[source]:
            return  # it had finished, or its source was lost
        tokens = self.running[source].pop(s)
        self.known[s] = tokens
        commands = self.ask(ev.Left(self.now_s, source, s, tokens))
        if not any(isinstance(c, ev.Generate) and s in c.sample_ids for c in commands):
            assert self.alive[destination] or self.samples[s].state is SampleState.QUEUED
            if self.alive[destination]:
                self.running[destination][s] = tokens
        for command in commands:
            self.obey(command)

    def score(self) -> None:
        worker = self.random.randrange(len(self.calls))
        if self.calls[worker]:
            role, ids = self.calls[worker].pop(0)
            if role == "train":
                self.trained.update(ids)
                self.tell(ev.Trained(self.now_s, worker, ids))
                return
            for s in ids:
                self.held[role, s] = worker
            self.tell(ev.Scored(self.now_s, worker, role, ids))

    def reward(self) -> None:
        if self.rewards:
            s = self.rewards.pop(self.random.randrange(len(self.rewards)))
            chance = self.random.random()
            if chance < 0.2:
                self.tell(ev.RewardTimedOut(self.now_s, s))
            elif chance < 0.25:
                self.tell(ev.Dropped(self.now_s, s, "its reward timed out"))
            else:
                self.tell(ev.Rewarded(self.now_s, s))

    def lose(self, instance: int) -> None:
        if not self.alive[instance] or sum(self.alive) == 1:
            return
        self.alive[instance] = False
        self.running[instance].clear()
        self.leaving = [entry for entry in self.leaving if entry[0] != instance]
        self.calls[instance].clear()
        self.held = {pair: w for pair, w in self.held.items() if w != instance}
        self.tell(ev.InstanceLost(self.now_s, instance))

    def lose_scorer(self, worker: int) -> None:
        self.can_score[worker] = False
        self.calls[worker].clear()
        self.held = {pair: w for pair, w in self.held.items() if w != worker}
        self.tell(ev.ScorerLost(self.now_s, worker))

    def revive(self, instance: int) -> None:
        if not self.alive[instance] or not self.can_score[instance]:
            self.alive[instance] = self.can_score[instance] = True
            self.tell(ev.InstanceReady(self.now_s, instance))


POLICIES = st.builds(
    Policy,
    inter_stage=st.sampled_from(InterStage),
    migration=st.sampled_from([Migration.AUTO, Migration.PAPER, Migration.OFF]),
    max_response_tokens=st.just(60),
    max_running=st.sampled_from([3, 8, 64]),
    cache_tokens=st.sampled_from([0, 400]),
    margin=st.just(0.0),
    hysteresis_s=st.just(0.0),
    paper_threshold=st.sampled_from([0.0, 0.2, 0.6]),
    score_token_budget=st.sampled_from([40, 4000]),
    block=st.sampled_from([1, 2]),
    sleep_when_free=st.booleans(),
    shared_prefix=st.booleans(),
    release_groups=st.booleans(),
    reward_tries=st.sampled_from([1, 3]),
)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    POLICIES,
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
)
def test_any_order_of_events(
    policy: Policy, seed: int, instances: int, num_samples: int, faults: bool, train: bool
) -> None:
    """Whatever happens, the books agree after every event, every sample ends scored once by every
    role (and trained once, where groups are) or dropped for a reason."""
    instances *= policy.block
    world = _World(seed, policy, instances, num_samples, train)
    world.tell(ev.Started(0.0, world.samples))
    for turn in range(20_000):
        if world.scheduler.done:
            break
        if faults and turn < 3000 and turn % 37 == 5:
            world.lose(world.random.randrange(instances))
        if faults and turn < 3000 and turn % 41 == 9:
            world.lose_scorer(world.random.randrange(instances))
        if turn % 53 == 7 or turn > 5000:
            for i in range(instances):
                world.revive(i)
        world.step()
    assert world.scheduler.done, world.scheduler.waiting_for()
    kept = [s for s in world.samples if s.state is not SampleState.DROPPED]
    quiet = all(world.alive) and all(world.can_score) and not train  # no call is moot
    if quiet and len(kept) == num_samples:
        assert world.scheduler.waiting_for() == "nothing"
    assert all(s.state is SampleState.SCORED for s in kept)
    assert all(world.has_scores(s.id) for s in kept)
    assert all(s.drop_reason for s in world.samples if s.state is SampleState.DROPPED)
    if train:
        assert world.trained == Counter(s.id for s in kept)
    if train or policy.release_groups:
        assert {s for ids in world.released.values() for s in ids} >= {s.id for s in kept}


def _run(migration: Migration, inter_stage: InterStage = InterStage.ON, *, seed: int = 3) -> _World:
    policy = Policy(
        inter_stage=inter_stage, migration=migration, max_response_tokens=60, hysteresis_s=0.0
    )
    world = _World(seed, policy, 4, 40)
    world.tell(ev.Started(0.0, world.samples))
    while not world.scheduler.done:
        world.step()
    return world


def test_off_overlaps_nothing_and_on_does() -> None:
    assert _run(Migration.OFF, InterStage.OFF).early == 0
    assert _run(Migration.OFF).early > 0


def test_moving_changes_no_sample() -> None:
    """The same samples, with the same lengths, scored by the same roles, with moves and without."""
    ends = []
    for migration in (Migration.AUTO, Migration.PAPER, Migration.OFF):
        world = _run(migration)
        lengths = {s.id: s.response_tokens for s in world.samples}
        ends.append((lengths, set(world.held), {s.state for s in world.samples}))
    assert ends[0] == ends[1] == ends[2]


def test_reports_of_the_past_change_nothing() -> None:
    """Late reports of a lost instance, and answers for samples that were dropped."""
    world = _World(1, Policy(max_response_tokens=60), 2, 6)
    world.tell(ev.Started(0.0, world.samples))
    victim = next(iter(world.running[0]))
    world.lose(0)
    assert victim in world.running[1]
    for event in (
        ev.Finished(0.1, 0, victim, 9),
        ev.Left(0.1, 0, victim, 9),
        ev.Progress(0.1, 0, ((victim, 50),)),
        ev.Scored(0.1, 0, "actor", (victim,)),
        ev.Rewarded(0.1, victim),
    ):
        assert not [c for c in world.scheduler.handle(event) if not isinstance(c, ev.Decision)]
        world.scheduler.validate()
    assert world.samples[victim].response_tokens == 0
    assert world.samples[victim].state is SampleState.RUNNING


def test_a_lost_sample_goes_on_with_the_tokens_reported() -> None:
    world = _World(1, Policy(max_response_tokens=60), 2, 6)
    world.tell(ev.Started(0.0, world.samples))
    victim = next(iter(world.running[0]))
    world.tell(ev.Progress(0.0, 0, ((victim, 7),)))
    world.lose(0)
    assert world.samples[victim].response_tokens == 7


def test_waiting_for_names_samples_and_places() -> None:
    world = _World(1, Policy(max_response_tokens=60), 2, 3)
    world.tell(ev.Started(0.0, world.samples))
    text = world.scheduler.waiting_for()
    assert text == "instance 0: 1 generating (samples 2); instance 1: 2 generating (samples 0, 1)"
    world.tell(ev.Progress(0.1, 1, ((1, 7),)))
    world.tell(ev.Finished(0.1, 1, 0, 9))  # its instance is not free to score it
    text = world.scheduler.waiting_for()
    assert text.endswith("; scores not given out yet: 1 critic, 1 reference, 1 reward")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="no scoring rate for"):
        RolloutScheduler(1, ("judge",), CostModel.default(), Policy())
    with pytest.raises(ValueError, match="at least one is needed"):
        RolloutScheduler(0, ROLES, CostModel.default(), Policy())
    with pytest.raises(ValueError, match="max_running"):
        Policy(max_running=0)
