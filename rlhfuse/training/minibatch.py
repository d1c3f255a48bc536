"""One rank's part of one mini-batch: forward and backward of its stages, then one step of each
role."""

import math
from collections.abc import Mapping, Sequence

import torch

from rlhfuse.algorithms.losses import normalizer
from rlhfuse.algorithms.tally import Tally
from rlhfuse.config import Config
from rlhfuse.group_training import BatchSize, nominal_size, trains_groups
from rlhfuse.kernels.keyed import key_of
from rlhfuse.models.loading import load_config
from rlhfuse.models.packed import laid_out, padded_rows
from rlhfuse.placement import StagePlacement, replicas, role_of, roles_of
from rlhfuse.schedules.ir import Op, Task
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.backend import Backend, Key
from rlhfuse.training.batch import LossData, make_microbatch
from rlhfuse.training.channels import Shape
from rlhfuse.training.clock import Watch
from rlhfuse.training.control import Control
from rlhfuse.training.executor import Executor
from rlhfuse.training.numbers import Numbers
from rlhfuse.training.progress import UpdateProgress
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.training.reference import References, reference_path
from rlhfuse.training.trained_stage import model_config


class MiniBatches:
    """Runs mini-batches on the stages of one rank: `begin`, `run`, `finish`, in that order."""

    def __init__(
        self,
        config: Config,
        rank: int,
        pipelines: Mapping[str, StagePlacement],
        reference: Mapping[str, StagePlacement],
        device: torch.device,
        backend: Backend,
        references: References,
        executor: Executor,
        control: Control,
    ) -> None:
        """`reference`: its forward-only pipelines. `control`: of all ranks.

        Raises:
            ValueError: a model folder cannot be read.
        """
        self._config = config
        self._row, self._column = divmod(rank, config.placement.tp)
        self._by_groups = trains_groups(config)
        self._pipelines = dict(pipelines)
        self._device = device
        self._backend = backend
        self._references = references
        self._executor = executor
        self._control = control
        self._watch = Watch(rank, device)
        self._hidden = {
            role: _hidden_size(config, role) for role in roles_of({**pipelines, **reference})
        }
        self._shapes: dict[str, list[Shape]] = {}
        self.stages: list[Key] = [
            (name, s)
            for name, place in sorted(pipelines.items())
            for s, home in enumerate(place.ranks)
            if home == self._row
        ]

    def is_last(self, pipeline: str, pp_stage: int) -> bool:
        """Whether the stage holds its pipeline's loss."""
        return pp_stage + 1 == len(self._pipelines[pipeline].ranks)

    def begin(
        self,
        number: tuple[int, int],
        plan: MiniBatchPlan,
        by_id: Mapping[int, SampleData],
        data: LossData | None,
    ) -> None:
        """Pack the samples of every micro-batch. `number`: of the step and of the mini-batch in it;
        `data`: what losses read, where there are any."""
        for pipeline, pp_stage in self._present(plan):
            mine = data if self.is_last(pipeline, pp_stage) else None
            padded = self._padded(pipeline)
            whole = [
                by_id[i]
                for name in replicas(plan.microbatches, role_of(pipeline))
                for ids in plan.microbatches[name]
                for i in ids
            ]
            size = BatchSize(sum(len(sample.response) for sample in whole), len(whole))
            if self._by_groups:
                size = nominal_size(self._config)
            self._backend.begin(
                (pipeline, pp_stage),
                [
                    make_microbatch([by_id[i] for i in ids], mine, self._device, padded=padded)
                    for ids in plan.microbatches[pipeline]
                ],
                num_tokens=size.tokens,
                num_samples=size.samples,
                stream=key_of(self._config.trainer.seed, *number),
            )
        self._references.begin(plan, by_id)
        self._shapes = {
            name: [self._shape(name, [_num_tokens(by_id[i]) for i in ids]) for ids in microbatches]
            for name, microbatches in (*plan.microbatches.items(), *plan.forward.items())
        }

    def run_alone(self, plan: MiniBatchPlan, spans: list[Span]) -> None:
        """The plan's schedules, of this rank alone; more micro-batches of the same optimizer step
        may follow."""
        for schedule in plan.rounds:
            self._executor.run(schedule, self._shapes, spans)

    def run(self, plan: MiniBatchPlan, spans: list[Span], progress: UpdateProgress) -> None:
        """The plan's schedules; gradients start to travel to replicas as they are complete.
        Collective."""
        left = {key: len(plan.microbatches[key[0]]) for key in self._present(plan)}

        def done(task: Task) -> None:
            progress.task_done(task)
            if task.op in (Op.B, Op.W):
                key = (task.pipeline, task.pp_stage)
                left[key] -= 1
                if left[key] == 0 and not self._by_groups:
                    self._backend.gradients_complete(key)

        for number, schedule in enumerate(plan.rounds):
            if number:
                with self._watch.measure(spans, Kind.WAIT, "barrier between models"):
                    self._control.barrier()
            self._executor.run(schedule, self._shapes, spans, done)

    def finish(
        self,
        step: int,
        index: int,
        plan: MiniBatchPlan,
        spans: list[Span],
        progress: UpdateProgress,
        whole: BatchSize | None,
    ) -> list[Tally]:
        """Exchange norms and losses, stop on what is not finite, clip, and step. Collective.

        Raises:
            NonFiniteLoss: on all ranks; nothing has been stepped.
        """
        taking_part = self.stages if self._by_groups else self._present(plan)
        roles = roles_of(self._pipelines if self._by_groups else plan.microbatches)
        self._sum_gradients(roles, whole, spans)
        with self._watch.measure(spans, Kind.WAIT, "norms and losses of all ranks"):
            numbers = self._backend.numbers(roles)
        self._stop_on_non_finite(step, index, numbers)
        progress.minibatch_done({role: both.loss for role, both in numbers.items()})
        lasts = {role_of(name) for name, s in taking_part if self.is_last(name, s)}
        lasts = lasts if self._column == 0 else set()  # tensor-parallel ranks know the same
        tallies = []
        with self._watch.measure(spans, Kind.OPTIMIZER, "optimizer step"):
            for role in dict.fromkeys(role_of(name) for name, _ in taking_part):
                norm = numbers[role].norm
                if role in lasts:
                    own = {"grad_norm": norm, "lr": self._backend.lr(role)}
                    means = {f"{role}/{key}": (value, 1.0) for key, value in own.items()}
                    tallies += [s.tally() for s in self._backend.stats(role)]
                    tallies.append(Tally(means, {}, {}))
                self._backend.step(role, norm)
        return tallies

    def _sum_gradients(
        self, roles: Sequence[str], whole: BatchSize | None, spans: list[Span]
    ) -> None:
        """Of all replicas; where groups are trained one by one, also of those trained ahead."""
        if not self._by_groups and len(self._pipelines) == len(roles_of(self._pipelines)):
            self._backend.finish_gradients(roles)
            return
        with self._watch.measure(spans, Kind.WAIT, "gradients of all replicas"):
            for key in self.stages if self._by_groups else ():
                self._backend.gradients_complete(key)
            self._backend.finish_gradients(roles)
        if self._by_groups:
            assert whole is not None, "the batch's normaliser is not known"
            aggregation = self._config.actor.loss_agg_mode
            nominal, actual = (
                normalizer(aggregation, num_tokens=size.tokens, num_samples=size.samples)
                for size in (nominal_size(self._config), whole)
            )
            self._backend.settle(nominal / actual)

    def _stop_on_non_finite(self, step: int, index: int, numbers: Mapping[str, Numbers]) -> None:
        for role, both in numbers.items():
            for what, number in (("loss", both.loss), ("gradient norm", both.norm)):
                if not math.isfinite(number):
                    self._backend.clear()
                    raise NonFiniteLoss(step, index, role, f"the {what} is {number}")

    def _present(self, plan: MiniBatchPlan) -> list[Key]:
        """This rank's stages that take part in a mini-batch."""
        return [key for key in self.stages if key[0] in plan.microbatches]

    def _shape(self, pipeline: str, lengths: Sequence[int]) -> Shape:
        """Of the messages of a micro-batch of samples of these lengths."""
        rows = sum(laid_out(lengths, padded=self._padded(pipeline)))
        return padded_rows(rows), self._hidden[role_of(pipeline)]

    def _padded(self, pipeline: str) -> bool:
        role = role_of(pipeline)
        return role != "reference" and not model_config(self._config, role).use_remove_padding


def _hidden_size(config: Config, role: str) -> int:
    reference = role == "reference"
    path = reference_path(config) if reference else model_config(config, role).path
    return load_config(path).hidden_size


def _num_tokens(sample: SampleData) -> int:
    return len(sample.prompt) + len(sample.response)
