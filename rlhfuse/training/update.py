"""One rank's part of a PPO update: every mini-batch's schedules, clipping, optimizer steps."""

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.algorithms.losses import normalizer
from rlhfuse.algorithms.tally import Tally, merge
from rlhfuse.config import Config
from rlhfuse.group_training import BatchSize, nominal_size, trains_groups
from rlhfuse.models.loading import load_config
from rlhfuse.models.packed import laid_out, padded_rows
from rlhfuse.placement import StagePlacement, replicas, role_of, roles_of
from rlhfuse.schedules.ir import Op, Task
from rlhfuse.schedules.timing import check_channels
from rlhfuse.timeline import ArgValue, Kind, Span
from rlhfuse.training import checkpoint
from rlhfuse.training.backend import Key, MakeBackend
from rlhfuse.training.batch import LossData, loss_data, make_microbatch, with_reference
from rlhfuse.training.channels import Channels, Shape
from rlhfuse.training.clock import clock_of
from rlhfuse.training.executor import Executor, StepFailed, publish_failure
from rlhfuse.training.memory import advice, in_use, loading, out_of_memory
from rlhfuse.training.numbers import Numbers
from rlhfuse.training.progress import Tell, UpdateProgress
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.training.reference import References, reference_path
from rlhfuse.training.snapshot import HostCopies, Keep, Part, Snapshot, shared
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.trained_stage import model_config

__all__ = [
    "MiniBatchPlan",
    "NonFiniteLoss",
    "RankTrainer",
    "SampleData",
]

logger = logging.getLogger(__name__)


class RankTrainer:
    """The stages of one rank, of every trained role.

    All ranks make one at the same time and call the collective methods alike. When one of them
    raises, the others end within the time limit of `trainer.wait_timeout_s`, usually at once, and
    the trainer is of no more use; after `NonFiniteLoss` it can go on.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        pipelines: Mapping[str, StagePlacement],
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
        reference: Mapping[str, StagePlacement] | None = None,
        make_backend: MakeBackend = TorchBackend,
    ) -> None:
        """Collective. `pipelines`: by name, replicas apart. `total_steps`: optimizer steps of each
        role over the whole run. `reference`: forward-only pipelines of the reference.
        `make_backend`: whose models are trained.

        Raises:
            ValueError: a model folder does not fit the configuration.
        """
        self._config = config
        self._rank = rank
        self._row, self._column = divmod(rank, config.placement.tp)
        self._by_groups = trains_groups(config)
        self._ahead = -1  # the step of which groups have been trained ahead
        self._ahead_tallies: list[Tally] = []
        self._lane = f"rank{rank}"
        self._pipelines = dict(pipelines)
        self._device = device
        self._truncate = uses_truncation(config, dtype)
        timeout = timedelta(seconds=config.trainer.wait_timeout_s)
        self._store = _get_default_store()
        everything = {**pipelines, **(reference or {})}
        self._hidden = {role: _hidden_size(config, role) for role in roles_of(everything)}
        # Numbers of all ranks travel over gloo also where tensors travel over NCCL.
        self._control = dist.new_group(range(world_size), timeout=timeout, backend="gloo")
        with loading(" and the ".join(roles_of(everything)), device):
            self._backend = make_backend(
                config,
                rank=rank,
                pipelines=pipelines,
                device=device,
                dtype=dtype,
                total_steps=total_steps,
                control=self._control,
            )
            self._references = References(config, reference or {}, rank, device=device, dtype=dtype)
        self._stages = [
            (name, s)
            for name, place in sorted(pipelines.items())
            for s, home in enumerate(place.ranks)
            if home == self._row
        ]
        self._channels = Channels(
            rank,
            {name: place.ranks for name, place in everything.items()},
            device=device,
            dtype=dtype,
            timeout=timeout,
            tp=config.placement.tp,
        )
        self._executor = Executor(
            rank,
            self._channels,
            {**self._backend.runners, **self._references.runners},
            clock_of(device),
            self._store,
            self._explain,
            tp=config.placement.tp,
        )

    def accumulate(
        self,
        step: int,
        samples: Sequence[SampleData],
        plan: MiniBatchPlan,
        kl_coef: float,
        spans: list[Span],
    ) -> None:
        """Forward and backward of complete groups, ahead of the `update` of the same step, which
        knows the batch's normaliser and steps. For this rank alone; only where groups are trained
        one by one (`trains_groups`).

        Raises:
            StepFailed: as `update`.
        """
        assert self._by_groups, "groups are trained together"
        with self._failing_together(f"step {step}"):
            self._start_batch(step)
            data = self._loss_data(samples, kl_coef, ())
            self._begin(plan, {sample.sample_id: sample for sample in samples}, data)
            for schedule in plan.rounds:
                self._executor.run(schedule, self._shapes, spans)
            self._ahead_tallies += [stats.tally() for stats in data.stats]

    def _start_batch(self, step: int) -> None:
        if self._ahead != step:
            self._backend.clear()
            self._ahead, self._ahead_tallies = step, []

    def update(
        self,
        step: int,
        samples: Sequence[SampleData],
        minibatches: Sequence[MiniBatchPlan],
        kl_coef: float,
        spans: list[Span],
        tell: Tell | None = None,
        whole: BatchSize | None = None,
    ) -> Tally:
        """Every mini-batch in order: schedules, then one optimizer step per role. Collective.
        Where groups are trained one by one, there is one mini-batch, of the groups that no rank has
        accumulated; `whole` is then the size of the batch with all of them.

        Returns what this rank knows of the metrics (ranks that hold a loss know some). Appends what
        was measured to `spans`. `tell` hears of progress, a few times a second.

        Raises:
            NonFiniteLoss: on all ranks, before any parameter of that mini-batch has changed.
            StepFailed: this rank or another one failed.
        """
        with self._failing_together(f"step {step}"):
            tallies: list[Tally] = []
            data = None
            if self._by_groups:
                self._start_batch(step)
            later = {i for plan in minibatches for i in plan.forward_samples}
            if any(self._is_last(*key) for key in self._stages):
                with self._span(spans, Kind.ADVANTAGE, "advantages"):
                    data = self._loss_data(samples, kl_coef, later)
            by_id = {sample.sample_id: sample for sample in samples}
            progress = UpdateProgress.of(minibatches, [name for name, _ in self._stages], tell)
            for index, plan in enumerate(minibatches):
                for schedule in plan.rounds:
                    check_channels(schedule)
                self._begin(plan, by_id, data)
                self._run_rounds(plan, spans, progress)
                if plan.forward:
                    found = self._references.gather(plan, by_id, self._control)
                    by_id |= {i: replace(by_id[i], reference_logprobs=x) for i, x in found.items()}
                    data = data and with_reference(data, found)
                tallies += self._finish(step, index, plan, spans, progress, whole)
            self._backend.end_update()
            if self._knows_batch():
                if later:
                    data = self._loss_data([by_id[s.sample_id] for s in samples], kl_coef, ())
                assert data is not None
                tallies += [stats.tally() for stats in data.stats]
            tallies += self._ahead_tallies
            self._ahead, self._ahead_tallies = -1, []
            return merge(tallies)

    def named_tensors(self, role: str) -> dict[str, torch.Tensor]:
        """The weights of this rank's stages of `role`, by Hugging Face name."""
        return self._backend.named_tensors(role)

    def digest(self, role: str) -> dict[str, str]:
        """sha256 of every tensor of `named_tensors`."""
        return {name: checkpoint.tensor_digest(t) for name, t in self.named_tensors(role).items()}

    def snapshot(self, roles_to_export: Sequence[str] = (), *, copy: bool = False) -> Snapshot:
        """This rank's part of a checkpoint as it is now: with `copy`, in host memory, so that it
        may be written while training goes on. `roles_to_export` are also written as Hugging Face
        models below ``ROLE/huggingface``, but for what `complete_export` adds. Collective."""
        keep = HostCopies() if copy else shared
        parts = [*self._backend.parts(keep), checkpoint.rng_part(self._rank, self._device)]
        for role in roles_to_export:
            parts += self._export_parts(role, f"{role}/huggingface", keep)
        return Snapshot(parts)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint into `folder`. Collective: returns when the
        parts of all ranks are there. Raises StepFailed on all ranks where one fails, such as for
        a full disk."""
        with self._failing_together("writing a checkpoint"):
            self.snapshot().write(folder)
            dist.barrier(self._control)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, also with other pipeline stages than these.

        Raises:
            ValueError: a part is missing, damaged, or of another model.
        """
        self._ahead = -1
        self._backend.load(folder)
        checkpoint.load_rng(folder, self._rank, self._device)

    def export_hf(self, folder: Path, role: str) -> None:
        """Write `role` as a Hugging Face model folder, one file per stage. Collective; `folder`
        must be the same place for all ranks."""
        with self._failing_together(f"exporting the {role}"):
            place = self._pipelines[role]
            Snapshot(self._export_parts(role, "", shared)).write(folder)
            dist.barrier(self._control)
            if place.ranks[0] == self._row and self._column == 0:
                source = model_config(self._config, role).path
                checkpoint.complete_export(folder, source)
            dist.barrier(self._control)

    def _export_parts(self, role: str, folder: str, keep: Keep) -> list[Part]:
        ranks = self._pipelines[role].ranks
        tensors = self._backend.named_tensors(role)
        return [
            checkpoint.export_part(folder, tensors, stage, len(ranks), keep)
            for stage, home in enumerate(ranks)
            if home == self._row and self._column == 0
        ]

    def close(self) -> None:
        """Leave the process groups that this trainer made."""
        self._channels.close()
        self._backend.close()

    def _is_last(self, pipeline: str, pp_stage: int) -> bool:
        return pp_stage + 1 == len(self._pipelines[pipeline].ranks)

    def _knows_batch(self) -> bool:
        """One rank reports the metrics of the whole batch: the first actor's last."""
        return self._pipelines["actor"].ranks[-1] == self._row and self._column == 0

    def _loss_data(
        self, samples: Sequence[SampleData], kl_coef: float, later: Collection[int]
    ) -> LossData:
        if not samples:  # all groups have been trained ahead
            return LossData({}, ())
        truncate = self._truncate
        return loss_data(self._config, samples, kl_coef, truncate=truncate, later=later)

    def _begin(
        self, plan: MiniBatchPlan, by_id: Mapping[int, SampleData], data: LossData | None
    ) -> None:
        for pipeline, pp_stage in self._present(plan):
            mine = data if self._is_last(pipeline, pp_stage) else None
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
            )
        self._references.begin(plan, by_id)
        self._shapes: dict[str, list[Shape]] = {
            name: [self._shape(name, [_num_tokens(by_id[i]) for i in ids]) for ids in microbatches]
            for name, microbatches in (*plan.microbatches.items(), *plan.forward.items())
        }

    def _shape(self, pipeline: str, lengths: Sequence[int]) -> Shape:
        """Of the messages of a micro-batch of samples of these lengths."""
        rows = sum(laid_out(lengths, padded=self._padded(pipeline)))
        return padded_rows(rows), self._hidden[role_of(pipeline)]

    def _padded(self, pipeline: str) -> bool:
        role = role_of(pipeline)
        return role != "reference" and not model_config(self._config, role).use_remove_padding

    def _run_rounds(self, plan: MiniBatchPlan, spans: list[Span], progress: UpdateProgress) -> None:
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
                with self._span(spans, Kind.WAIT, "barrier between models"):
                    dist.barrier(self._control)
            self._executor.run(schedule, self._shapes, spans, done)

    def _finish(
        self,
        step: int,
        index: int,
        plan: MiniBatchPlan,
        spans: list[Span],
        progress: UpdateProgress,
        whole: BatchSize | None,
    ) -> list[Tally]:
        """Exchange norms and losses, stop on what is not finite, clip, and step."""
        taking_part = self._stages if self._by_groups else self._present(plan)
        roles = roles_of(self._pipelines if self._by_groups else plan.microbatches)
        if self._by_groups:
            assert whole is not None, "the batch's normaliser is not known"
            self._settle(whole, spans)
        elif len(self._pipelines) > len(roles_of(self._pipelines)):
            with self._span(spans, Kind.WAIT, "gradients of all replicas"):
                self._backend.finish_gradients(roles)
        else:
            self._backend.finish_gradients(roles)
        with self._span(spans, Kind.WAIT, "norms and losses of all ranks"):
            numbers = self._backend.numbers(roles)
        self._stop_on_non_finite(step, index, numbers)
        progress.minibatch_done({role: both.loss for role, both in numbers.items()})
        lasts = {role_of(name) for name, s in taking_part if self._is_last(name, s)}
        lasts = lasts if self._column == 0 else set()  # tensor-parallel ranks know the same
        tallies = []
        with self._span(spans, Kind.OPTIMIZER, "optimizer step"):
            for role in dict.fromkeys(role_of(name) for name, _ in taking_part):
                norm = numbers[role].norm
                if role in lasts:
                    own = {"grad_norm": norm, "lr": self._backend.lr(role)}
                    means = {f"{role}/{key}": (value, 1.0) for key, value in own.items()}
                    tallies += [s.tally() for s in self._backend.stats(role)]
                    tallies.append(Tally(means, {}, {}))
                self._backend.step(role, norm)
        return tallies

    def _settle(self, whole: BatchSize, spans: list[Span]) -> None:
        """Gradients from the sums of all groups, on every replica."""
        with self._span(spans, Kind.WAIT, "gradients of all replicas"):
            for key in self._stages:
                self._backend.gradients_complete(key)
            self._backend.finish_gradients(("actor",))
        aggregation = self._config.actor.loss_agg_mode
        nominal, actual = (
            normalizer(aggregation, num_tokens=size.tokens, num_samples=size.samples)
            for size in (nominal_size(self._config), whole)
        )
        self._backend.settle(nominal / actual)

    def _present(self, plan: MiniBatchPlan) -> list[Key]:
        """This rank's stages that take part in a mini-batch."""
        return [key for key in self._stages if key[0] in plan.microbatches]

    def _stop_on_non_finite(self, step: int, index: int, numbers: Mapping[str, Numbers]) -> None:
        for role, both in numbers.items():
            for what, number in (("loss", both.loss), ("gradient norm", both.norm)):
                if not math.isfinite(number):
                    self._backend.clear()
                    raise NonFiniteLoss(step, index, role, f"the {what} is {number}")

    @contextmanager
    def _failing_together(self, place: str) -> Iterator[None]:
        try:
            yield
        except (StepFailed, NonFiniteLoss) as error:
            if isinstance(error, StepFailed):
                self._leave()
            raise
        except Exception as error:
            word = f"rank {self._rank} failed in {place}: {self._explain(error)}"
            first = publish_failure(self._store, word)
            self._leave()
            if first != word:
                word = f"rank {self._rank} stopped in {place}, because {first}"
            raise StepFailed(word) from error

    def _explain(self, error: Exception) -> str:
        if out_of_memory(error):
            return advice(error, self._backend.held(), in_use(self._device), self._device)
        return f"{type(error).__name__}: {error}"

    def _leave(self) -> None:
        """Whoever waits for this rank fails now, not at the time limit."""
        self.close()
        dist.destroy_process_group(self._control)

    @contextmanager
    def _span(self, spans: list[Span], kind: Kind, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        args: dict[str, ArgValue] = {"what": "barrier"} if kind is Kind.WAIT else {}
        spans.append(Span(self._lane, start_s, time.monotonic(), kind, name, args))


def uses_truncation(config: Config, dtype: torch.dtype) -> bool:
    """Whether truncated importance sampling applies: `auto` means off in float32, where the
    engine's tokens are the trainer's policy exactly, and on otherwise."""
    if config.algorithm.tis == "auto":
        return dtype not in (torch.float32, torch.float64)
    return config.algorithm.tis == "on"


def _hidden_size(config: Config, role: str) -> int:
    reference = role == "reference"
    path = reference_path(config) if reference else model_config(config, role).path
    return load_config(path).hidden_size


def _num_tokens(sample: SampleData) -> int:
    return len(sample.prompt) + len(sample.response)
