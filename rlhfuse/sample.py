"""A sample and its life: the control plane's view. Lengths and states, no tensors, no tokens."""

from dataclasses import dataclass
from enum import StrEnum


class SampleState(StrEnum):
    """Where a sample is in one iteration.

    QUEUED: waits for an instance. RUNNING: an instance is generating it. MOVING: has been asked
    to leave its instance and has not arrived on another. FINISHED: the response is complete,
    scores are outstanding. SCORED: everything that training needs is known. DROPPED: will not be
    trained on, for a stated reason.
    """

    QUEUED = "queued"
    RUNNING = "running"
    MOVING = "moving"
    FINISHED = "finished"
    SCORED = "scored"
    DROPPED = "dropped"


S = SampleState
ALLOWED_MOVES: dict[SampleState, frozenset[SampleState]] = {
    S.QUEUED: frozenset({S.RUNNING, S.DROPPED}),
    # RUNNING -> QUEUED: its instance was lost; the tokens reported so far are kept.
    S.RUNNING: frozenset({S.FINISHED, S.MOVING, S.QUEUED, S.DROPPED}),
    # MOVING -> FINISHED: it completed before the order to leave arrived.
    S.MOVING: frozenset({S.RUNNING, S.FINISHED, S.QUEUED, S.DROPPED}),
    S.FINISHED: frozenset({S.SCORED, S.DROPPED}),
    # SCORED -> FINISHED: the worker that held its per-token scores was lost.
    S.SCORED: frozenset({S.FINISHED, S.DROPPED}),
    S.DROPPED: frozenset(),
}


@dataclass(slots=True)
class Sample:
    """One prompt and its (growing) response.

    `seed` and the position decide every random draw of the response, wherever it is generated.
    `group` is the index of the prompt in its batch: samples of one prompt share it. `source` (of
    the prompt) and `length_hint` (tokens that a user expects, 0: none) help to predict lengths.
    """

    id: int
    group: int
    prompt_tokens: int
    seed: int
    policy_version: int
    response_tokens: int = 0
    state: SampleState = SampleState.QUEUED
    instance: int | None = None
    drop_reason: str = ""
    source: str = ""
    length_hint: float = 0.0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def move(self, state: SampleState, instance: int | None = None) -> None:
        """Go to `state` (on `instance` where that makes sense), or fail loudly."""
        assert state in ALLOWED_MOVES[self.state], (
            f"sample {self.id}: {self.state} -> {state} is not an allowed move"
        )
        assert (instance is not None) is (state is S.RUNNING), f"{state=} {instance=}"
        self.state = state
        if instance is not None:
            self.instance = instance
