"""Between the controller and its workers: commands, and the events that answer them.

Every message is a tagged struct, encoded as msgpack by `rlhfuse.transport`. Token ids travel as
int32 bytes; per-token floats never pass the controller: they stay with the worker that made them
and are fetched by the worker that needs them (`rlhfuse.peer_messages`).
"""

from typing import Annotated, Literal

import msgspec

from rlhfuse.schedules.ir import Schedule
from rlhfuse.timeline import Span

PROTOCOL_VERSION = 7
SampleIds = tuple[int, ...]
Role = Literal["actor", "critic", "reference", "reward"]
Tokens = Annotated[bytes, msgspec.Meta(max_length=64 * 1024 * 1024)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the class name."""


def whole_numbers(data: bytes, what: str) -> None:
    """Raise ValueError where `data` is not a row of 4-byte numbers."""
    if len(data) % 4:
        raise ValueError(f"{what}: {len(data)} bytes are no row of 4-byte numbers")


# --- records inside messages ---------------------------------------------------------------


class SampleTokens(msgspec.Struct, frozen=True, array_like=True):
    """A sample's token ids, int32 little-endian bytes."""

    sample_id: int
    prompt: Tokens
    response: Tokens

    def __post_init__(self) -> None:
        whole_numbers(self.prompt, "prompt")
        whole_numbers(self.response, "response")


class GenerateItem(msgspec.Struct, frozen=True, array_like=True):
    """A sample to generate, or to go on with. `cache_from` is the payload endpoint of the worker
    that it left: its log-probabilities and, where exported, its key-value cache are there."""

    tokens: SampleTokens
    seed: int
    cache_from: str = ""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters of one batch of samples (see `engines.base.SamplingParams`)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Growth(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sample; `length` is the response length with them. `whole`: the worker
    knows the log-probabilities of all tokens, also of those that others drew."""

    sample_id: int
    tokens: Tokens
    length: int
    finish_reason: str = ""  # "stop" or "length" when finished
    whole: bool = True

    def __post_init__(self) -> None:
        whole_numbers(self.tokens, "tokens")


class TensorSource(msgspec.Struct, frozen=True, array_like=True):
    """Tensors that one training worker sends: its payload endpoint and their names."""

    endpoint: str
    names: tuple[str, ...]


# --- commands to a rollout worker ----------------------------------------------------------


class Reset(Message, frozen=True):
    """Stop generating and forget all samples: the step is over before its end."""


class BeginStep(Message, frozen=True):
    """Forget the payloads of earlier steps; samples from now on carry this policy version, and
    all models that are trained must have it."""

    step: int
    policy_version: int


class Generate(Message, frozen=True):
    items: tuple[GenerateItem, ...]
    sampling: Sampling


class Export(Message, frozen=True):
    """Stop generating these samples and report what they have (`Exported`)."""

    sample_ids: SampleIds
    with_cache: bool


class Score(Message, frozen=True):
    """Run one role's scorer over finished samples; per-token results stay with the worker.
    `sampling`: how they were drawn."""

    role: Role
    samples: tuple[SampleTokens, ...]
    sampling: Sampling


class PullWeights(Message, frozen=True):
    """Fetch a role's new weights from the training workers, bucket by bucket."""

    role: Role
    version: int
    sources: tuple[TensorSource, ...]
    digest: str  # of all tensors, as the senders computed it


class Sleep(Message, frozen=True):
    pass


class Wake(Message, frozen=True):
    pass


class Shutdown(Message, frozen=True):
    pass


# --- commands to a training worker ---------------------------------------------------------


class TrainSample(msgspec.Struct, frozen=True, array_like=True):
    """A scored sample and where its per-token data is: payload endpoint by role.

    `score` is the outcome reward. `rollout_endpoint` holds the engine's log-probabilities; it is
    empty where they died with their worker."""

    tokens: SampleTokens
    group: int
    score: float
    endpoints: dict[str, str]
    rollout_endpoint: str


class MiniBatch(msgspec.Struct, frozen=True, array_like=True):
    """One optimizer step: micro-batches of sample ids per pipeline, and the schedules that run
    them one after another (one round when fused, one per model when serial). `forward`: those of
    forward-only pipelines, of samples that a later mini-batch trains on."""

    microbatches: dict[str, tuple[SampleIds, ...]]
    rounds: tuple[Schedule, ...]
    forward: dict[str, tuple[SampleIds, ...]] = {}


class FetchSamples(Message, frozen=True):
    """Pull the per-token data of the samples to train on (`Fetched`)."""

    step: int
    samples: tuple[TrainSample, ...]


class TrainGroup(Message, frozen=True):
    """Pull the per-token data of a complete group, and run its forward and backward passes ahead of
    its step's update, on this rank alone (`GroupTrained`)."""

    step: int
    samples: tuple[TrainSample, ...]
    batch: MiniBatch
    kl_coef: float


class Train(Message, frozen=True):
    """One PPO update of the samples fetched: advantages, then every mini-batch in order. `whole`:
    response tokens and samples of the batch with the groups that were trained ahead."""

    step: int
    minibatches: tuple[MiniBatch, ...]
    kl_coef: float
    policy_version: int  # of the samples: must equal the actor's
    whole: tuple[int, int]


class PrepareWeights(Message, frozen=True):
    """Freeze the named roles' weights for sending and report names and digest."""

    roles: tuple[Role, ...]
    version: int


class SaveCheckpoint(Message, frozen=True):
    """Write this rank's part of a checkpoint (`Written`). `aside`: of a copy in host memory, while
    training goes on; an `Ack` says that the copy is made. `ticket`: tells saves apart."""

    folder: str
    step: int
    ticket: int
    aside: bool


class LoadCheckpoint(Message, frozen=True):
    folder: str


class KeepState(Message, frozen=True):
    """Write this rank's part of a restart state (`Kept`): as a checkpoint, without exports. A
    failure is told and harms nothing."""

    folder: str
    step: int


# --- events from workers -------------------------------------------------------------------


class Pulse(Message, frozen=True):
    """A sign of life, sent every second by a thread of its own. `busy_s`: for how long the worker
    has been at `doing`, its last command; 0 while it waits for one."""

    doing: str
    busy_s: float


class Hello(Message, frozen=True):
    """First message of a worker: who it is and where its payloads can be fetched."""

    worker: str
    protocol: int
    endpoint: str
    pid: int
    detail: str = ""


class Grown(Message, frozen=True):
    """What engine steps added since the last report."""

    growths: tuple[Growth, ...]


class Exported(Message, frozen=True):
    """Samples that left, with the tokens not yet reported; their caches stay fetchable."""

    growths: tuple[Growth, ...]
    requested: SampleIds  # those not in `growths` had finished before


class Scored(Message, frozen=True):
    """`scores` are per-sample numbers (reward) or the mean of the per-token values."""

    role: Role
    sample_ids: SampleIds
    scores: tuple[float, ...]


class WeightsReady(Message, frozen=True):
    """`error`: why they could not be had; the worker must not generate until they are."""

    role: Role
    version: int
    digest: str
    error: str = ""


class Ack(Message, frozen=True):
    """A command that has no result of its own is done (`Sleep`, `Wake`, `SaveCheckpoint`, ...)."""

    command: str


class Spans(Message, frozen=True):
    """Measured spans, on the clock shared by all workers of a machine."""

    spans: tuple[Span, ...]


class WeightsPrepared(Message, frozen=True):
    role: Role
    version: int
    names: tuple[str, ...]
    digests: tuple[str, ...]  # one per name
    num_bytes: int


class Kept(Message, frozen=True):
    """`error`: why this rank's part is not there, or empty."""

    step: int
    error: str = ""


class Fetched(Message, frozen=True):
    """`missing`: endpoints that did not answer or had lost the data; none: all is here."""

    step: int
    missing: tuple[str, ...] = ()


class GroupTrained(Message, frozen=True):
    """`missing`: endpoints that did not answer or had lost the data; then nothing was trained."""

    step: int
    sample_ids: SampleIds
    missing: tuple[str, ...] = ()


class Training(Message, frozen=True):
    """An update in progress: micro-batches whose backward pass is complete on this rank's stages,
    of all that it has; the losses of the last complete mini-batch, by role."""

    done: int
    total: int
    losses: dict[str, float]


class Written(Message, frozen=True):
    """A rank's part of the checkpoint with this ticket is on disk, or cannot be (`error`)."""

    ticket: int
    seconds: float
    error: str = ""


class Trained(Message, frozen=True):
    """What this rank knows of an update's metrics: means as (total, weight), sums, maxima."""

    step: int
    means: dict[str, tuple[float, float]]
    sums: dict[str, float]
    maxima: dict[str, float]


class Failed(Message, frozen=True):
    """The worker cannot go on. `user_error`: the user's mistake rather than ours."""

    worker: str
    where: str
    error: str
    traceback: str
    user_error: bool = False


Command = (
    Reset
    | BeginStep
    | Generate
    | Export
    | Score
    | PullWeights
    | Sleep
    | Wake
    | Shutdown
    | FetchSamples
    | TrainGroup
    | Train
    | PrepareWeights
    | SaveCheckpoint
    | LoadCheckpoint
    | KeepState
)
Event = (
    Hello
    | Pulse
    | Grown
    | Exported
    | Scored
    | WeightsReady
    | Ack
    | Spans
    | WeightsPrepared
    | Kept
    | Fetched
    | GroupTrained
    | Training
    | Trained
    | Written
    | Failed
)
