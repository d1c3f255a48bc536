"""The rollout, simulated: the same scheduler code as the live loop, costs in, timeline out."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhfuse.cost import CostModel
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.world import Loss, Simulator, Stats
from rlhfuse.sample import Sample
from rlhfuse.timeline import Timeline

__all__ = ["Loss", "Simulator", "Stats", "samples_of", "simulate"]


def samples_of(
    prompts: Sequence[int],
    groups: Sequence[int] | None = None,
    sources: Sequence[str] | None = None,
    hints: Sequence[float] | None = None,
) -> list[Sample]:
    """Queued samples with ids 0, 1, ...; without `groups` each is a group of its own."""
    return [
        Sample(
            id=i,
            group=i if groups is None else groups[i],
            prompt_tokens=prompt,
            seed=i,
            policy_version=0,
            source="" if sources is None else sources[i],
            length_hint=0.0 if hints is None else hints[i],
        )
        for i, prompt in enumerate(prompts)
    ]


def simulate(
    cost: CostModel,
    policy: Policy,
    lengths: Sequence[int],
    prompts: Sequence[int],
    instances: int,
    roles: tuple[str, ...],
    *,
    groups: Sequence[int] | None = None,
    sources: Sequence[str] | None = None,
    hints: Sequence[float] | None = None,
    history: Sequence[int] = (),
    predictor: LengthModel | None = None,
    believed: CostModel | None = None,
    slowdown: Sequence[float] = (),
    losses: Sequence[Loss] = (),
    reward_s: float | None = None,
    train: bool = False,
    record: bool = True,
) -> tuple[Timeline, Stats]:
    """One iteration from costs, policy and true lengths.

    `groups`, `sources`, `hints`: per sample, what the scheduler may know of it. `history`:
    complete lengths that it has seen before (or a `predictor` that knows more); `believed`: its
    cost model, where it differs from the truth. `reward_s`: what a reward function takes; None:
    there is none. `train`: forward and backward of complete groups belong to the iteration, at
    `score_token_s["train"]` per token on one block. `record` off: no spans, which is faster.
    """
    with _no_collections():
        scheduler = RolloutScheduler(
            instances,
            roles,
            believed or cost,
            policy,
            function_reward=reward_s is not None,
            lengths=predictor or LengthModel(policy.max_response_tokens, history),
            train_groups=train,
        )
        world = Simulator(
            scheduler,
            cost,
            lengths,
            samples_of(prompts, groups, sources, hints),
            instances,
            reward_s=reward_s or 0.0,
            slowdown=slowdown,
            losses=losses,
            record=record,
        )
        return world.run()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the search for cyclic garbage: there is none, but millions of objects to look at."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
