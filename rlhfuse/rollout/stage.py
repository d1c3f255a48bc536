"""Generation and inference of one batch, from records to scores."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rlhfuse import messages as m
from rlhfuse.config import Config, ValidationConfig
from rlhfuse.cost import CostModel
from rlhfuse.fleet import WorkerFailed
from rlhfuse.planner.memory import sleeps
from rlhfuse.rollout.ahead import PlanGroup
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.loop import RolloutLoop
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.records import Record
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.session import Session


class Rollout:
    """One batch on its way from prompts to what the training workers need."""

    def __init__(self, session: Session, loop: RolloutLoop) -> None:
        self._session = session
        self._loop = loop
        self.result = loop.result()
        self.done_at_s = loop.done_at_s

    def deliver(self) -> None:
        """The training workers fetch what the rollout workers hold of samples that they have not
        trained on yet. What has died with a worker since is made again first.

        Raises:
            WorkerFailed: it could not be had within the time limit.
        """
        fleet, step = self._session.fleet, self._session.state.step + 1
        limit_s = self._session.run.config.trainer.wait_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            done = self.result.trained
            left = [r for r in self.result.records if r.sample_id not in done]
            samples = tuple(train_samples(left))
            if not samples:
                return
            fleet.broadcast(fleet.training, m.FetchSamples(step=step, samples=samples))
            fetched = fleet.gather(m.Fetched, fleet.training, f"the samples of step {step}")
            missing = sorted({endpoint for _, event in fetched for endpoint in event.missing})
            if not missing:
                return
            if time.monotonic() > deadline:
                raise WorkerFailed(
                    f"step {step}: per-token data at {', '.join(missing)} could not be had for "
                    f"{limit_s:g} s (trainer.wait_timeout_s)"
                )
            fleet.receive()
            self._loop.finish()
            self.result = self._loop.result()

    def rest(self) -> None:
        """What holds keys and values gives them back, where the memory plan says so.

        Raises:
            WorkerFailed: as the rollout itself.
        """
        if sleeps_between(self._session):
            self._loop.rest()


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
    spared: Mapping[str, frozenset[int]] | None = None,
    plan_group: PlanGroup | None = None,
) -> Rollout:
    """Every record gets a response and what `roles` have to say of it. `overlap` off is the
    serial baseline: all generation, then all inference. `lengths` predicts from earlier batches
    and learns from this one. `spared`: samples that a role need not score. With
    `plan_group` and overlap, complete groups are trained too."""
    config = session.run.config
    version = session.state.step
    fleet = session.fleet
    fleet.begin_step(version + 1, version)
    scheduler = RolloutScheduler(
        config.placement.num_devices,
        tuple(roles),
        cost,
        replace(
            rollout_policy(config, sampling, overlap=overlap),
            sleep_when_free=sleeps_between(session),
        ),
        function_reward=session.rewards is not None,
        lengths=lengths,
        spared=spared,
        train_groups=overlap and plan_group is not None,
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
        needs_logprobs=needs_logprobs(session),
        plan_group=plan_group,
    )
    scores = len(records) * len(roles) - sum(map(len, (spared or {}).values()))
    loop.run(records, sampling, version, scores)
    return Rollout(session, loop)


def needs_logprobs(session: Session) -> bool:
    """Whether the engine's own log-probabilities enter the loss."""
    config = session.run.config
    if config.rollout.old_log_probs == "engine" or config.algorithm.tis == "on":
        return True
    if config.rollout.old_log_probs == "update":
        return False
    exact = all("float32" in session.fleet.detail(name) for name in session.fleet.rollout)
    return config.algorithm.tis == "auto" and not exact


def sleeps_between(session: Session) -> bool:
    """Whether instances sleep while others need their memory: what the plan counted with."""
    fleet = session.fleet
    cuda = any("cuda" in fleet.detail(name) for name in fleet.rollout)
    return sleeps(session.run.config, cuda=cuda)


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
        moves_cache=config.rollout.engine == "torch" or config.rollout.vllm.moves_cache,
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
        repetition_penalty=rollout.repetition_penalty,
        presence_penalty=rollout.presence_penalty,
        frequency_penalty=rollout.frequency_penalty,
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


def train_samples(records: Iterable[Record]) -> Iterator[m.TrainSample]:
    """What training workers need to know of scored samples."""
    for r in records:
        # A copy: the command may have to wait, and holders to be forgotten meanwhile.
        yield m.TrainSample(r.tokens, r.group, r.score, {**r.endpoints}, r.rollout_endpoint)
