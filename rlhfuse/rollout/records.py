"""A batch of samples as the controller knows it: token ids, scores, and who holds the rest."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rlhfuse import messages as m
from rlhfuse.data import Row

TokenIds = npt.NDArray[np.int32]


@dataclass(slots=True)
class Record:
    """One sample as the controller knows it. `group`: index of its prompt in the batch; `row`:
    the data row it came from; `endpoints`: who holds its per-token scores; `rollout_endpoint`: who
    holds the engine's log-probabilities (empty: they are lost)."""

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

    def from_the_start(self) -> m.GenerateItem:
        """What an engine needs to generate it anew."""
        return m.GenerateItem(m.SampleTokens(self.sample_id, self.prompt.tobytes(), b""), self.seed)

    def forget(self, endpoint: str) -> None:
        """Whatever the worker at `endpoint` held of it is gone."""
        for role in [role for role, holder in self.endpoints.items() if holder == endpoint]:
            del self.endpoints[role]
        if self.left_from == endpoint:
            self.left_from = ""
        if self.rollout_endpoint == endpoint:
            self.rollout_endpoint = ""


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """`generated_s` and `done_s`: when the last response and the last score were there, in
    seconds from the start. `instances_lost`: how many samples went on elsewhere for it, and how
    many of their tokens had to be prefilled again. `trained`: samples whose gradients are summed up
    already; `trained_ahead`: groups of which that was so when the last response was there."""

    records: tuple[Record, ...]
    generated_s: float
    done_s: float
    moved: int
    decisions: tuple[str, ...]
    instances_lost: int = 0
    samples_rescued: int = 0
    tokens_prefilled_again: int = 0
    trained: frozenset[int] = frozenset()
    trained_ahead: int = 0
