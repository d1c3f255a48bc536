"""Generation and inference of one batch, from records to scores."""

from collections.abc import Sequence

from rlhfuse import messages as m
from rlhfuse.config import Config, ValidationConfig
from rlhfuse.cost import CostModel
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.loop import Record, RolloutLoop, RolloutResult
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.session import Session


def generate_and_score(
    session: Session,
    records: Sequence[Record],
    sampling: m.Sampling,
    *,
    roles: Sequence[str],
    cost: CostModel,
    overlap: bool,
    lengths: LengthModel | None = None,
    show: bool = True,
) -> RolloutResult:
    """Every record gets a response and what `roles` have to say of it. `overlap` off is the
    serial baseline: all generation, then all inference. `lengths` predicts from earlier batches
    and learns from this one."""
    config = session.run.config
    version = session.state.step
    fleet = session.fleet
    fleet.broadcast(fleet.rollout, m.BeginStep(step=version + 1, policy_version=version))
    scheduler = RolloutScheduler(
        config.placement.num_devices,
        tuple(roles),
        cost,
        rollout_policy(config, sampling, overlap=overlap),
        function_reward=session.rewards is not None,
        lengths=lengths,
    )
    loop = RolloutLoop(
        fleet,
        scheduler,
        session.rewards,
        session.progress,
        session.run.decode,
        timeout_s=config.trainer.wait_timeout_s,
        score_clip=config.reward.clip,
        show=show,
    )
    wanted = len(roles)
    return loop.run(records, sampling, version, wanted)


def rollout_policy(config: Config, sampling: m.Sampling, *, overlap: bool) -> Policy:
    """The scheduler's limits, from the configuration."""
    room = config.data.max_prompt_length + config.rollout.response_length
    return Policy(
        inter_stage=InterStage.ON if overlap else InterStage.OFF,
        migration=Migration(config.fusion.migration),
        max_response_tokens=sampling.max_tokens,
        max_running=config.rollout.max_num_seqs,
        cache_tokens=config.rollout.cache_tokens or config.rollout.max_num_seqs * room,
        margin=config.fusion.migration_margin,
        score_token_budget=config.rollout.score_token_budget,
    )


def training_sampling(config: Config, stop_token_ids: Sequence[int]) -> m.Sampling:
    """How training responses are drawn."""
    rollout = config.rollout
    return m.Sampling(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        max_tokens=rollout.response_length,
        min_tokens=rollout.min_response_length,
        stop_token_ids=tuple(stop_token_ids),
    )


def validation_sampling(
    config: Config, validation: ValidationConfig, stop_token_ids: Sequence[int]
) -> m.Sampling:
    """How the responses of a validation set are drawn."""
    return m.Sampling(
        temperature=validation.temperature,
        top_k=validation.top_k,
        top_p=validation.top_p,
        min_p=0.0,
        max_tokens=config.rollout.response_length,
        min_tokens=0,
        stop_token_ids=tuple(stop_token_ids),
    )
