"""One rank's part of a PPO update, and of what is kept of it: checkpoints and exports."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.algorithms.tally import Tally, merge
from rlhfuse.config import Config
from rlhfuse.group_training import BatchSize, trains_groups
from rlhfuse.placement import StagePlacement, roles_of
from rlhfuse.schedules.timing import check_channels
from rlhfuse.timeline import Kind, Span
from rlhfuse.training import checkpoint
from rlhfuse.training.backend import MakeBackend
from rlhfuse.training.batch import LossData, loss_data, with_reference
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import Watch, clock_of
from rlhfuse.training.control import Control
from rlhfuse.training.executor import Executor
from rlhfuse.training.failure import StepFailed, in_one_voice
from rlhfuse.training.memory import advice, in_use, loading, out_of_memory
from rlhfuse.training.minibatch import MiniBatches
from rlhfuse.training.progress import Tell, UpdateProgress
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.training.reference import References
from rlhfuse.training.snapshot import HostCopies, Keep, Part, Snapshot, shared
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.trained_stage import model_config

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
        self._pipelines = dict(pipelines)
        self._device = device
        self._truncate = uses_truncation(config, dtype)
        timeout = timedelta(seconds=config.trainer.wait_timeout_s)
        self._store = _get_default_store()
        everything = {**pipelines, **(reference or {})}
        self._control = Control(timeout, range(world_size))
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
        self._channels = Channels(
            rank,
            {name: place.ranks for name, place in everything.items()},
            device=device,
            dtype=dtype,
            timeout=timeout,
            tp=config.placement.tp,
        )
        executor = Executor(
            rank,
            self._channels,
            {**self._backend.runners, **self._references.runners},
            clock_of(device),
            self._store,
            self._explain,
            tp=config.placement.tp,
        )
        self._minibatches = MiniBatches(
            config,
            rank,
            pipelines,
            reference or {},
            device,
            self._backend,
            self._references,
            executor,
            self._control,
        )
        self._watch = Watch(rank, device)

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
            by_id = {sample.sample_id: sample for sample in samples}
            self._minibatches.begin((step, 0), plan, by_id, data)
            self._minibatches.run_alone(plan, spans)
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
            if any(self._minibatches.is_last(*key) for key in self._minibatches.stages):
                with self._watch.measure(spans, Kind.ADVANTAGE, "advantages"):
                    data = self._loss_data(samples, kl_coef, later)
            by_id = {sample.sample_id: sample for sample in samples}
            progress = UpdateProgress.of(
                minibatches, [name for name, _ in self._minibatches.stages], tell
            )
            for index, plan in enumerate(minibatches):
                for schedule in plan.rounds:
                    check_channels(schedule)
                self._minibatches.begin((step, index), plan, by_id, data)
                self._minibatches.run(plan, spans, progress)
                if plan.forward:
                    found = self._references.gather(plan, by_id, self._control)
                    by_id |= {i: replace(by_id[i], reference_logprobs=x) for i, x in found.items()}
                    data = data and with_reference(data, found)
                tallies += self._minibatches.finish(step, index, plan, spans, progress, whole)
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
            self._control.barrier()

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
            self._control.barrier()
            if place.ranks[0] == self._row and self._column == 0:
                source = model_config(self._config, role).path
                checkpoint.complete_export(folder, source)
            self._control.barrier()

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

    @contextmanager
    def _failing_together(self, place: str) -> Iterator[None]:
        try:
            yield
        except (StepFailed, NonFiniteLoss) as error:
            if isinstance(error, StepFailed):
                self._leave()
            raise
        except Exception as error:
            text = in_one_voice(self._store, self._rank, f"in {place}", self._explain(error))
            self._leave()
            raise StepFailed(text) from error

    def _explain(self, error: Exception) -> str:
        if out_of_memory(error):
            return advice(error, self._backend.held(), in_use(self._device), self._device)
        return f"{type(error).__name__}: {error}"

    def _leave(self) -> None:
        """Whoever waits for this rank fails now, not at the time limit."""
        self.close()
        self._control.close()


def uses_truncation(config: Config, dtype: torch.dtype) -> bool:
    """Whether truncated importance sampling applies: `auto` means off in float32, where the
    engine's tokens are the trainer's policy exactly, and where its log-probabilities are known in
    the update alone; on otherwise."""
    if config.algorithm.tis == "auto" and config.rollout.old_log_probs == "update":
        return False
    if config.algorithm.tis == "auto":
        return dtype not in (torch.float32, torch.float64)
    return config.algorithm.tis == "on"
