"""What the rollout scheduler may do, and within which limits."""

from dataclasses import dataclass
from enum import StrEnum


class InterStage(StrEnum):
    """OFF: generation, then inference, nothing overlapped (the serial baseline). ON: finished
    samples are scored on free workers while others generate, and the tail may move. AUTO: the
    same; every move is weighed against doing nothing, so that it costs nothing where it does
    not pay."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


class Migration(StrEnum):
    """Who decides when the tail moves. AUTO: the cost model, at events. PAPER: one threshold of
    remaining samples (RLHFuse, arXiv 2409.13221). FORCED: at each (samples that remain, blocks
    that go on) of `forced`, in order (for searches in the simulator). OFF: nobody."""

    AUTO = "auto"
    PAPER = "paper"
    FORCED = "forced"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`max_running` and `cache_tokens` are per instance (`cache_tokens` 0: not limiting).

    margin: least predicted gain of a move, as a fraction of the time that is left.
    hysteresis_s: least time between two moves. paper_threshold: the part of the samples that
    remains when the paper's policy moves; 0: found by simulating the lengths seen before, or 0.2
    where there are none. score_token_budget: most tokens in one scoring call. score_ahead:
    scoring calls given to a worker before the first is answered, so that it does not wait for the
    driver. Workers are freed in blocks of `block` neighbours, and only a whole free block scores
    or trains (a scorer or an actor replica that spans several workers needs them all).
    shared_prefix: engines keep a prompt's cache for its siblings, so that these are dispatched
    together while that outweighs balance. moves_cache: engines can hand over a moving sample's keys
    and values. reward_tries: a reward that timed out is asked for so
    often before its sample is dropped. release_groups: say when a group is complete.
    """

    inter_stage: InterStage = InterStage.AUTO
    migration: Migration = Migration.AUTO
    max_response_tokens: int = 1024
    max_running: int = 256
    cache_tokens: int = 0
    margin: float = 0.02
    hysteresis_s: float = 0.02
    paper_threshold: float = 0.0
    score_token_budget: int = 2048
    score_ahead: int = 2
    block: int = 1
    sleep_when_free: bool = False
    shared_prefix: bool = False
    moves_cache: bool = True
    reward_tries: int = 1
    release_groups: bool = False
    forced: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        positive = ("max_response_tokens", "max_running", "score_token_budget", "score_ahead")
        for name in (*positive, "block", "reward_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout policy: {name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.margin < 1.0 or not 0.0 <= self.paper_threshold <= 1.0:
            raise ValueError(
                f"rollout policy: margin={self.margin} must lie in [0, 1) and "
                f"paper_threshold={self.paper_threshold} in [0, 1]"
            )
