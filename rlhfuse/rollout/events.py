"""What the rollout scheduler hears and what it says. Ids and lengths only, no tokens.

An *instance* is one generation replica; the *worker* of the same number is the process that holds
it together with its scorers. A worker does one thing at a time: it steps its engine or it scores.
Times are seconds on the driver's clock and never go backwards.
"""

import msgspec

from rlhfuse.sample import Sample


class Started(msgspec.Struct, frozen=True, gc=False):
    """A new iteration with these samples, all QUEUED. Only when the one before is done."""

    now_s: float
    samples: tuple[Sample, ...]


class Progress(msgspec.Struct, frozen=True, gc=False):
    """`lengths`: (sample id, response tokens so far) of samples running on `instance`; not
    necessarily of all: they are stepped together, so that one says how far the others are."""

    now_s: float
    instance: int
    lengths: tuple[tuple[int, int], ...]


class Finished(msgspec.Struct, frozen=True, gc=False):
    """A response is complete."""

    now_s: float
    instance: int
    sample_id: int
    response_tokens: int


class Completed(msgspec.Struct, frozen=True, gc=False):
    """What many `Finished`, one after the other, say at once: `times`, `instances`, `sample_ids`
    and `response_tokens`, in order. Only the last may have commands follow from it
    (`RolloutScheduler.quiet`); `now_s` is its time. A simulator's shorthand."""

    now_s: float
    times: list[float]
    instances: list[int]
    sample_ids: list[int]
    response_tokens: list[int]


class Left(msgspec.Struct, frozen=True, gc=False):
    """An exported sample has left its source `instance` and can be added elsewhere."""

    now_s: float
    instance: int
    sample_id: int
    response_tokens: int


class Scored(msgspec.Struct, frozen=True, gc=False):
    """One `Score` command is done."""

    now_s: float
    worker: int
    role: str
    sample_ids: tuple[int, ...]


class Rewarded(msgspec.Struct, frozen=True, gc=False):
    """The reward function or service has answered for one sample."""

    now_s: float
    sample_id: int


class Dropped(msgspec.Struct, frozen=True, gc=False):
    """A sample will not be trained on, for `reason` (its reward timed out, ...)."""

    now_s: float
    sample_id: int
    reason: str


class InstanceLost(msgspec.Struct, frozen=True, gc=False):
    """The worker is gone, with its running samples and the scores that it held. `trains_on`: not
    with the groups that it trained and trains (another process of the device does)."""

    now_s: float
    instance: int
    trains_on: bool = False


class InstanceReady(msgspec.Struct, frozen=True, gc=False):
    """The worker is there (again), empty, with the current weights, awake."""

    now_s: float
    instance: int


class ScorerLost(msgspec.Struct, frozen=True, gc=False):
    """The worker's scoring models are gone, with the scores that it held and was at; its engine
    goes on. It scores nothing until `InstanceReady`."""

    now_s: float
    worker: int


class RewardTimedOut(msgspec.Struct, frozen=True, gc=False):
    """The reward function has not answered in time. Asked again, or dropped: `Policy`."""

    now_s: float
    sample_id: int


class Trained(msgspec.Struct, frozen=True, gc=False):
    """One `Train` command is done: the gradients are accumulated where it ran."""

    now_s: float
    worker: int
    sample_ids: tuple[int, ...]


class NotTrained(msgspec.Struct, frozen=True, gc=False):
    """One `Train` command came to nothing: what it needs is gone, and has to be scored again."""

    now_s: float
    worker: int
    sample_ids: tuple[int, ...]


class Tick(msgspec.Struct, frozen=True, gc=False):
    """Time has passed. Send one every second or so; decisions need no other clock."""

    now_s: float


Event = (
    Started
    | Progress
    | Finished
    | Completed
    | Left
    | Scored
    | Rewarded
    | Dropped
    | InstanceLost
    | InstanceReady
    | ScorerLost
    | RewardTimedOut
    | Trained
    | NotTrained
    | Tick
)


class Generate(msgspec.Struct, frozen=True, gc=False):
    """Add these samples to the instance, each with the tokens that it has so far."""

    instance: int
    sample_ids: tuple[int, ...]


class Migrate(msgspec.Struct, frozen=True, gc=False):
    """Export at `source`, then add at `destination`; a `Left` event per sample in between.

    A sample that finishes first sends `Finished` and no `Left`. Where the destination has been
    lost by the time of `Left`, the driver adds nothing: the answer to `Left` is a `Generate`.
    """

    source: int
    destination: int
    sample_ids: tuple[int, ...]
    with_cache: bool


class Score(msgspec.Struct, frozen=True, gc=False):
    """Run one role's model over the samples, in one call; answered by one `Scored`."""

    worker: int
    role: str
    sample_ids: tuple[int, ...]


class Sleep(msgspec.Struct, frozen=True, gc=False):
    """Give back the instance's key-value memory: nothing runs there any more."""

    instance: int


class Wake(msgspec.Struct, frozen=True, gc=False):
    """Take the key-value memory again; a `Generate` or `Migrate` to it follows."""

    instance: int


class Reward(msgspec.Struct, frozen=True, gc=False):
    """Ask the reward function or service; answered by `Rewarded` or `Dropped` per sample."""

    sample_ids: tuple[int, ...]


class Release(msgspec.Struct, frozen=True, gc=False):
    """All of the group's samples are scored or dropped: group estimators (GRPO, RLOO) can give
    these samples their advantages. Again, after a loss, with what was scored anew."""

    group: int
    sample_ids: tuple[int, ...]


class Train(msgspec.Struct, frozen=True, gc=False):
    """Forward and backward of a released group on the actor replica that starts at `worker`; the
    batch normaliser and the optimizer step come after the last. Answered by one `Trained`. Only
    where the scheduler was asked to train groups (one optimizer step per batch, no critic)."""

    worker: int
    sample_ids: tuple[int, ...]


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Why the tail moved: for logs and reports; nothing to execute."""

    text: str
    predicted_gain_s: float


Command = Generate | Migrate | Score | Sleep | Wake | Reward | Release | Train | Decision
