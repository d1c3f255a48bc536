"""The algorithm, read top to bottom: one controller decides, the workers compute.

Fusion changes when things run, never what is computed: this page reads the same with both fusions
on as with both off.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rlhfuse import messages as m
from rlhfuse.algorithms.kl import KlControl, next_control
from rlhfuse.algorithms.tally import Tally, merge, named
from rlhfuse.batches import training_records
from rlhfuse.cost import CostModel
from rlhfuse.fleet import TrainingLost
from rlhfuse.group_plan import plan_group, plan_groups
from rlhfuse.group_training import trains_groups
from rlhfuse.learned_cost import LearnedCost
from rlhfuse.placement import num_rows
from rlhfuse.progress import TrainingWatch
from rlhfuse.recovery import Recovery
from rlhfuse.rollout.ahead import PlanGroup
from rlhfuse.rollout.groups import with_training
from rlhfuse.rollout.records import Record, RolloutResult
from rlhfuse.rollout.stage import generate_and_score, train_samples, training_sampling
from rlhfuse.run_folder import StepLengths
from rlhfuse.saving import Saver
from rlhfuse.schedules.online import OnlineScheduler
from rlhfuse.session import Session
from rlhfuse.step_metrics import StepTimes, digest_of, step_metrics
from rlhfuse.timeline import Timeline, save_chrome
from rlhfuse.update_plan import (
    TrainedSample,
    UpdatePlan,
    later_samples,
    measured_costs,
    plan_update,
    rebuilding_gain,
)
from rlhfuse.validation import validate
from rlhfuse.weight_sync import sync_weights

# Steps of this process after which schedules for the first costs are made again, to compare.
_LOOK_AT_GAIN = (1, 2, 3)
_LOOK_AT_GAIN_EVERY = 25


@dataclass(frozen=True, slots=True)
class Fusions:
    """Which fusions a step uses; both off is the serial baseline."""

    inter_stage: bool
    intra_stage: bool


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, for those who compare runs: digests of all tokens, scores, weights."""

    step: int
    tokens: str
    rewards: str
    weights: str
    seconds: float
    metrics: dict[str, float]


class Trainer:
    """PPO and its critic-free relatives: synchronous, on-policy, exact."""

    def __init__(self, session: Session, fusions: Fusions | None = None) -> None:
        """`fusions`: for every step, instead of what the configuration says."""
        self.session = session
        self.forced = fusions
        self.config = session.run.config
        self.costs = session.run.costs
        self.learned = LearnedCost(CostModel.default())
        self.fused_s_per_token: list[float] = []
        self.history: list[StepResult] = []
        self.validations: list[dict[str, float]] = []
        self.saver = Saver(session)
        self.schedules = OnlineScheduler(split_weight=self.config.fusion.split_weight)
        # Where the ranks need every core, nothing searches beside them.
        self.spare_core = (os.cpu_count() or 1) > self.config.placement.num_devices + 1

    def fit(self) -> None:
        """Train to the end, with validation and checkpoints on the way. Workers that die are
        replaced, and the steps that were lost with them run again."""
        recovery = Recovery(self.session)
        lost: TrainingLost | None = None
        while True:
            try:
                if lost is not None:
                    self.saver.abandon()
                    recovery.restart(lost)
                    self.forget_later_steps()
                self.run_to_end(recovery)
                return
            except TrainingLost as error:
                lost = error

    def run_to_end(self, recovery: Recovery) -> None:
        """From where the session stands to the last step."""
        trainer = self.config.trainer
        self.sync_weights()
        if trainer.val_before_train and self.session.state.step == 0:
            self.validate()
        while self.session.state.step < self.session.run.total_steps:
            self.step()
            step, last = self.session.state.step, self.session.run.total_steps
            if step == last or (trainer.test_freq and step % trainer.test_freq == 0):
                self.validate()
            self.saver.look()
            if step == last or (trainer.save_freq and step % trainer.save_freq == 0):
                self.saver.start(aside=trainer.async_save and step < last)
            else:
                recovery.keep()
            recovery.finished_step()
        self.saver.wait()

    def step(self) -> StepResult:
        """One iteration: draw prompts, generate and score, update, send the weights."""
        step = self.session.state.step + 1
        fusions = self.fusions(step)
        self.session.fleet.take_spans()  # of what came before the step
        times = StepTimes(start_s=time.monotonic(), start_cpu_s=time.process_time())
        records = training_records(self.session.run, self.session.stream, step)
        rollout = generate_and_score(
            self.session,
            records,
            training_sampling(self.config, self.session.run.stop_token_ids),
            roles=self.config.scored_roles,
            cost=with_training(self.learned.model, self.costs["actor"]),
            overlap=fusions.inter_stage,
            lengths=self.session.lengths,
            spared=self.spared(records, step, fusions),
            plan_group=self.group_planner(step),
        )
        times.rollout_done_s = rollout.done_at_s
        rollout.deliver()
        rollout.rest()
        plan, metrics = self.update(rollout.result, step, fused=fusions.intra_stage)
        times.update_done_s = time.monotonic()
        self.advance(step, metrics)
        weights = self.sync_weights()
        times.end_s, times.end_cpu_s = time.monotonic(), time.process_time()
        return self.record(step, rollout.result, plan, metrics, weights, times, fusions)

    def spared(
        self, records: Sequence[Record], step: int, fusions: Fusions
    ) -> dict[str, frozenset[int]]:
        """Samples whose reference log-probabilities are computed within the update."""
        if not (self.session.run.reference and fusions.intra_stage):
            return {}
        pairs = [(r.sample_id, r.group) for r in records]
        return {"reference": later_samples(self.config, pairs, step)}

    def group_planner(self, step: int) -> PlanGroup | None:
        """How a complete group is trained before the batch is complete, where that is done."""
        if not trains_groups(self.config):
            return None
        state = self.session.state

        def plan(group: Sequence[Record], replica: int) -> m.TrainGroup:
            batch = plan_group(self.config, planned(group), replica, state.pipelines, self.costs)
            return m.TrainGroup(
                step=step,
                samples=tuple(train_samples(group)),
                batch=batch,
                kl_coef=state.kl_coef,
            )

        return plan

    def plan_update(
        self, samples: Sequence[TrainedSample], step: int, *, fused: bool
    ) -> UpdatePlan:
        """What the training workers have left to do, `samples`, and in which order."""
        run, state = self.session.run, self.session.state
        if trains_groups(self.config):
            return plan_groups(self.config, samples, state.pipelines, self.costs)
        warming_up = self.config.uses_critic and step <= self.config.algorithm.critic_warmup
        return plan_update(
            self.config,
            samples,
            state.pipelines,
            self.costs,
            roles=("critic",) if warming_up else self.session.roles,
            fused=fused,
            step=step,
            reference=run.reference if fused else None,
            search=self.schedules.schedule,
        )

    def update(
        self, rollout: RolloutResult, step: int, *, fused: bool
    ) -> tuple[UpdatePlan, dict[str, float]]:
        """Advantages and every mini-batch of actor and critic; returns the merged metrics."""
        fleet = self.session.fleet
        state = self.session.state
        records = rollout.records
        samples = planned([r for r in records if r.sample_id not in rollout.trained])
        plan = self.plan_update(samples, step, fused=fused)
        command = m.Train(
            step=step,
            minibatches=plan.minibatches,
            kl_coef=state.kl_coef,
            policy_version=state.step,
            whole=(sum(len(r.response) // 4 for r in records), len(records)),
        )
        self.session.settled = False
        fleet.withdraw()
        watch = TrainingWatch(self.session.progress, plan.num_microbatches, fleet.training)
        fleet.broadcast(fleet.training, command)
        gain = self.rebuilding_gain(plan, samples)  # while the workers train
        if self.spare_core:
            self.schedules.improve_asked()  # for the next step, which will ask for something near
        trained = fleet.gather(
            m.Trained, fleet.training, f"the update of step {step}", meanwhile=watch.heard
        )
        self.schedules.stop()
        watch.finish()
        tallies = [Tally(event.means, event.sums, event.maxima) for _worker, event in trained]
        return plan, named(merge(tallies)) | gain

    def rebuilding_gain(
        self, plan: UpdatePlan, samples: Sequence[TrainedSample]
    ) -> dict[str, float]:
        """Now and then: what schedules for measured costs gain over those for the first guess."""
        done = len(self.history)
        if trains_groups(self.config):  # there is nothing to search
            return {}
        if done not in _LOOK_AT_GAIN and (not done or done % _LOOK_AT_GAIN_EVERY):
            return {}
        run = self.session.run
        placed = {**self.session.state.pipelines, **run.reference}
        gain = rebuilding_gain(self.config, plan.minibatches[0], samples, placed, run.costs)
        return {"fusion/rebuilding_gain": gain}

    def advance(self, step: int, metrics: dict[str, float]) -> None:
        """The state after a step: what a checkpoint holds."""
        state = self.session.state
        kl_ctrl = self.config.algorithm.kl_ctrl
        target = kl_ctrl.target_kl if kl_ctrl.type == "adaptive" else None
        control = KlControl(state.kl_coef, target, kl_ctrl.horizon)
        if "critic/kl" in metrics:
            samples = self.config.data.train_batch_size * self.config.rollout.n
            control = next_control(control, kl=metrics["critic/kl"], num_samples=samples)
        self.session.state = msgspec.structs.replace(
            state,
            step=step,
            data=self.session.stream.state,
            kl_coef=control.coef,
        )
        self.session.settled = True

    def forget_later_steps(self) -> None:
        """What was noted of steps that will run again."""
        step = self.session.state.step
        self.history = [result for result in self.history if result.step <= step]
        if not step:
            self.validations.clear()

    def sync_weights(self) -> str:
        """Engines and scorers get the weights of this step, and nothing older can generate.
        Returns a digest of all of them."""
        plans = sync_weights(self.session.fleet, self.session.roles, self.session.state.step)
        return digest_of([plan.digest for plan in plans.values()])

    def fusions(self, step: int) -> Fusions:
        """What this step uses: as configured, but none in an audited step."""
        if self.forced is not None:
            return self.forced
        fusion = self.config.fusion
        audited = bool(fusion.audit_every) and step % fusion.audit_every == 0
        return Fusions(
            inter_stage=fusion.inter_stage != "off" and not audited,
            intra_stage=fusion.intra_stage != "off" and not audited,
        )

    def validate(self) -> None:
        """Every validation set; the best checkpoint is known by one of its metrics."""
        metrics = validate(self.session, self.learned.model)
        self.validations.append(metrics)

    def save(self) -> Path:
        """A checkpoint that is whole or not there. Returns when it is."""
        self.saver.start(aside=False)
        path = self.saver.wait()
        assert path is not None
        return path

    def record(
        self,
        step: int,
        rollout: RolloutResult,
        plan: UpdatePlan,
        trained: dict[str, float],
        weights: str,
        times: StepTimes,
        fusions: Fusions,
    ) -> StepResult:
        """Measured spans become the report, the metrics and better costs for the next step."""
        timeline = Timeline(tuple(self.session.fleet.take_spans()))
        save_chrome(timeline.shifted(-times.start_s), self.session.folder.timeline(step))
        self.learn_costs(timeline, rollout.records, plan)
        metrics = step_metrics(
            self.config, rollout, plan, timeline, times, kl_coef=self.session.state.kl_coef
        )
        metrics.update(trained)
        metrics["fault/rollout_workers_lost"] = float(self.session.fleet.num_lost)
        metrics["fault/samples_rescued"] = float(rollout.samples_rescued)
        metrics["fault/tokens_prefilled_again"] = float(rollout.tokens_prefilled_again)
        metrics.update(self.saver.take_metrics())
        metrics.update(self.audit(metrics, fusions))
        metrics["fusion/serial"] = float(not (fusions.inter_stage or fusions.intra_stage))
        self.session.loggers.log(step, metrics)
        ordered = sorted(rollout.records, key=lambda r: r.sample_id)
        responses = tuple(len(r.response_ids) for r in ordered)
        prompts = tuple(len(r.prompt) for r in ordered)
        self.session.folder.add_lengths(StepLengths(step, responses, prompts))
        result = StepResult(
            step=step,
            tokens=digest_of([r.tokens.response for r in rollout.records]),
            rewards=digest_of([repr(r.score) for r in rollout.records]),
            weights=weights,
            seconds=times.end_s - times.start_s,
            metrics=metrics,
        )
        self.history.append(result)
        return result

    def learn_costs(self, timeline: Timeline, records: Sequence[Record], plan: UpdatePlan) -> None:
        """Better predictions for the next step; they decide when things run, nothing else."""
        lengths = {r.sample_id: len(r.prompt) + len(r.response_ids) for r in records}
        tokens = sum(lengths.values())
        trained = {"actor": tokens * self.config.actor.ppo_epochs}
        if self.config.uses_critic:
            trained["critic"] = tokens * self.config.critic.ppo_epochs
        trained["reference"] = sum(lengths[i] for i in plan.forward_samples)
        tp = self.config.placement.tp
        # Tensor-parallel ranks do the same tasks: one of them is enough.
        rows = {f"rank{row * tp}" for row in range(num_rows(self.config))}
        spans = [span for span in timeline.spans if span.lane in rows]
        self.costs = measured_costs(spans, trained, self.costs)
        self.learned.learn(timeline)

    def audit(self, metrics: dict[str, float], fusions: Fusions) -> dict[str, float]:
        """The speed-up of fused over serial steps, per token, where a step ran serially."""
        per_token = metrics["timing_s/step"] / metrics["perf/total_num_tokens"]
        if fusions.inter_stage or fusions.intra_stage:
            self.fused_s_per_token.append(per_token)
            return {}
        if not self.fused_s_per_token or not self.config.fusion.audit_every:
            return {}
        recent = sorted(self.fused_s_per_token[-5:])
        return {"fusion/measured_speedup": per_token / recent[len(recent) // 2]}


def planned(records: Sequence[Record]) -> list[TrainedSample]:
    """Samples as the plan of an update knows them."""
    return [
        TrainedSample(r.sample_id, r.group, len(r.prompt) + len(r.response_ids)) for r in records
    ]
