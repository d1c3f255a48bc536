"""What an update is given, and what it can answer with. Plain records."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rlhfuse.schedules.ir import Schedule
from rlhfuse.scoring import Kept

TokenIds = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SampleData:
    """A scored sample. Per-token arrays have one number per response token [L].

    `old_logprobs` are the behaviour policy's as the loss takes them (not read where it takes the
    update's own), `rollout_logprobs` the engine's own. With `kept`, what the sampler kept at each
    position, they are those among it, and `full_logprobs` those of the whole distribution. A rank
    without a loss needs the tokens alone: it may be given empty arrays.
    """

    sample_id: int
    group: int
    prompt: TokenIds
    response: TokenIds
    score: float
    old_logprobs: Floats
    rollout_logprobs: Floats
    reference_logprobs: Floats | None
    values: Floats | None
    full_logprobs: Floats | None = None
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class MiniBatchPlan:
    """One optimizer step of each role in `microbatches`: by pipeline (``actor``, and its replicas
    ``actor.1`` ...), the sample ids of each micro-batch.

    `rounds` run one after another with a barrier between: one schedule when fused, one per model
    when serial. `forward`: micro-batches of the reference's pipelines, whose log-probabilities a
    later mini-batch needs.
    """

    microbatches: Mapping[str, tuple[tuple[int, ...], ...]]
    rounds: tuple[Schedule, ...]
    forward: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def forward_samples(self) -> tuple[int, ...]:
        """Those of `forward`, in its order."""
        return tuple(i for cut in self.forward.values() for ids in cut for i in ids)


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; no parameter of this mini-batch has changed."""

    def __init__(self, step: int, minibatch: int, role: str, detail: str) -> None:
        super().__init__(
            f"step {step}, mini-batch {minibatch}, {role}: {detail}; nothing was updated. "
            "Look at the saved batch; a lower learning rate or clip_grad may help"
        )
        self.step = step
        self.minibatch = minibatch
        self.role = role
        self.detail = detail
