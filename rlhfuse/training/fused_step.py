"""Any models, trained (or only run) together under one schedule: fusion for your own training loop.

PPO's actor and critic are one pair among many: a student beside its forward-only teacher, an actor
beside a reward model in training, several policies. Each model is a pipeline of plain modules;
what is computed does not depend on the schedule, only when. A forward-only model may hold the
modules of one that trains (`weights_of`): what it finds is of the weights before the step, such as
old log-probabilities of later mini-batches.

    policy = Model("policy", ranks=(0, 1), stages={rank: stage}, optimizer=adam)
    teacher = Model("teacher", ranks=(1, 0), stages={1 - rank: frozen}, forward_only=True)
    step = FusedStep([policy, teacher], rank=rank, device=device, dtype=torch.bfloat16)
    schedule = fuse(problem)  # of pipelines named "policy" and "teacher"; see rlhfuse.schedules
    results = step.update({"policy": batch, "teacher": next_batch}, schedule)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.schedules.ir import Schedule
from rlhfuse.schedules.timing import check_channels
from rlhfuse.timeline import Span
from rlhfuse.training.alike import Alike
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import clock_of
from rlhfuse.training.control import Control
from rlhfuse.training.executor import Executor, StageRunner
from rlhfuse.training.failure import StepFailed, in_one_voice
from rlhfuse.training.fused_models import (
    Batch,
    Model,
    Result,
    check_batches,
    check_models,
    trained_parameters,
)
from rlhfuse.training.gradients import GradientSums, square_sum
from rlhfuse.training.memory import Held, Ways, advice, in_use, out_of_memory
from rlhfuse.training.split import WeightStore, split_linears
from rlhfuse.training.stage_runner import AutogradRunner, Compute, ForwardRunner
from rlhfuse.training.streams import draws, may_draw, stream

__all__ = ["Batch", "FusedStep", "Model", "Result"]

_WAYS = Ways(
    activations="cut smaller micro-batches, or set Model.recompute",
    deferred="set Model.split_weight=False, or fuse without split_weight",
    optimizer="use an optimizer of less state, or more ranks for the model (Model.ranks)",
    weights="use more ranks for the model (Model.ranks), or a narrower dtype",
)


class FusedStep:
    """The models of one rank. Every rank makes one alike; `update` is collective."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        """Collective. `dtype`: of the messages between stages.

        Raises:
            ValueError: models that do not fit together (`check_models`), or stages that do not lie
                on this rank.
        """
        check_models(models, rank)
        self._rank = rank
        self._models = {model.name: model for model in models}
        # Walked once: of many small modules, names alone would take longer than their numbers.
        trained = {m.name: trained_parameters(m) for m in models if not m.forward_only}
        self._parameters = {
            name: tuple(p for mine in stages.values() for p in mine)
            for name, stages in trained.items()
        }
        self._sums = {name: GradientSums(mine) for name, mine in self._parameters.items()}
        self._alike = Alike(models, rank, trained, self._sums, timeout)
        self._counted = {name: self._alike.counted(name) for name in trained}
        self._versions = dict.fromkeys(trained, 0)
        self._droppers = {
            model.name: tuple(part for m in model.stages.values() for part in may_draw(m))
            for model in models
        }
        self._device = device
        self._batches: Mapping[str, Batch] = {}
        self._finished: dict[str, dict[int, torch.Tensor]] = {}
        self._number = 0
        self._drawing: frozenset[str] = frozenset()
        self._proven: Schedule | None = None
        self._control = Control(timeout)
        self._channels = Channels(
            rank, {m.name: m.ranks for m in models}, device=device, dtype=dtype, timeout=timeout
        )
        runners: dict[tuple[str, int], StageRunner] = {
            (model.name, stage): self._runner(model, stage, module)
            for model in models
            for stage, module in model.stages.items()
        }
        self._store = _get_default_store()
        self._executor = Executor(
            rank, self._channels, runners, clock_of(device), self._store, self._explain
        )
        self._trained = [r for r in runners.values() if isinstance(r, AutogradRunner)]

    def version(self, name: str) -> int:
        """Optimizer steps that the weights of a model have taken here: what `Batch.version` asks.
        0 where nothing trains them."""
        return self._versions.get(self._models[name].weights_of or name, 0)

    def update(
        self,
        batches: Mapping[str, Batch],
        schedule: Schedule,
        spans: list[Span] | None = None,
        number: int | None = None,
    ) -> dict[str, Result]:
        """Run `schedule`, then one optimizer step of each model that trains. Appends what was
        measured to `spans`. `number`: of this update, for random numbers; one more than the last
        one's where it is not given (a run that goes on from a checkpoint should). It returns on all
        ranks, or raises on all.

        Raises:
            ValueError: the schedule is not of these models and micro-batches, or would lock up; or
                a batch asks for weights that have been stepped since.
            FloatingPointError: on all ranks, a gradient is not finite; nothing has been stepped.
            StepFailed: this rank failed, or another one; this object is of no more use, and weights
                are to be read again from a checkpoint.
        """
        check_batches(self._models, batches, schedule)
        self._check_versions(batches)
        if schedule is not self._proven:  # a schedule never changes
            check_channels(schedule)
            self._proven = schedule
        self._batches = batches
        self._finished = {name: {} for name in batches}
        self._number = self._number + 1 if number is None else number
        self._drawing = frozenset(
            name for name in batches if any(draws(part) for part in self._droppers[name])
        )
        with self._failing_together():
            norms = self._run(batches, schedule, [] if spans is None else spans)
        return {
            name: Result(
                tuple(value for _, value in sorted(done.items())),
                norms.get(self._models[name].family, 0.0),
            )
            for name, done in self._finished.items()
        }

    def close(self) -> None:
        """Leave the process groups that this object made."""
        self._channels.close()
        self._alike.close()
        self._control.close()

    def _run(
        self, batches: Mapping[str, Batch], schedule: Schedule, spans: list[Span]
    ) -> dict[str, float]:
        """Gradient norms by family."""
        shapes = {name: batch.shapes for name, batch in batches.items()}
        trained = sorted(name for name in batches if name in self._versions)
        self._alike.begin(schedule)
        self._executor.run(schedule, shapes, spans, self._alike.done)
        self._alike.finish(trained)
        for name in trained:
            self._sums[name].hand_over()
        norms, anyone_steps = self._norms(trained)
        for name, norm in norms.items():
            if not math.isfinite(norm):
                for other in trained:
                    self._sums[other].clear()
                raise FloatingPointError(f"{name}: the gradient norm is {norm}; nothing stepped")
        for name in trained:
            self._step(self._models[name], norms[self._models[name].family])
            self._versions[name] += 1
        if anyone_steps:  # whoever cannot leaves, and no rank takes the update for done
            self._control.barrier()
        return norms

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Who fails leaves, so that who waits for this rank fails now, not at the time limit."""
        try:
            yield
        except FloatingPointError:
            raise
        except StepFailed:
            self.close()
            raise
        except Exception as error:
            place = f"after the tasks of update {self._number}"
            text = in_one_voice(self._store, self._rank, place, self._explain(error))
            self.close()
            raise StepFailed(text) from error

    def _explain(self, error: Exception) -> str:
        if out_of_memory(error):
            return advice(error, self._held(), in_use(self._device), self._device, _WAYS)
        return f"{type(error).__name__}: {error}"

    def _held(self) -> Held:
        weights = {
            p: p.nbytes
            for model in self._models.values()
            for module in model.stages.values()
            for p in module.parameters()
        }
        trained = [(self._sums[name], p) for name, mine in self._parameters.items() for p in mine]
        gradients = (sums.of(p) for sums, p in trained)
        states = [m.optimizer.state for m in self._models.values() if m.optimizer is not None]
        return Held(
            weights=sum(weights.values()),
            gradients=sum(g.nbytes for g in gradients if g is not None),
            optimizer=sum(
                value.nbytes
                for state in states
                for own in state.values()
                for value in own.values()
                if isinstance(value, torch.Tensor)
            ),
            deferred=sum(runner.deferred_bytes for runner in self._trained),
            microbatches=sum(runner.num_held for runner in self._trained),
        )

    def _runner(self, model: Model, stage: int, module: nn.Module) -> StageRunner:
        last = stage == len(model.ranks) - 1
        compute = self._compute(model, stage, module)
        if model.forward_only:
            return ForwardRunner(compute, last=last)
        store = WeightStore(self._sums[model.name]) if model.split_weight else None
        if store is not None:
            split_linears(module, store)
        frozen = stage == 0 and not last and not any(p.requires_grad for p in module.parameters())
        return AutogradRunner(
            compute, last=last, weights=store, recompute=model.recompute, frozen=frozen
        )

    def _compute(self, model: Model, stage: int, module: nn.Module) -> Compute:
        name, last = model.name, stage == len(model.ranks) - 1

        def plain(microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
            given = self._batches[name].inputs(microbatch) if stage == 0 else received
            output: torch.Tensor = module(given)
            if not last:
                return output
            made = self._batches[name].finish(microbatch, output)
            self._finished[name][microbatch] = made.detach()
            return made

        def compute(microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
            if name not in self._drawing:
                return plain(microbatch, received)
            with stream(self._device, model.seed, name, self._number, stage, microbatch):
                return plain(microbatch, received)

        return compute

    def _check_versions(self, batches: Mapping[str, Batch]) -> None:
        for name, batch in batches.items():
            of = self._models[name].weights_of
            if of is None:
                continue
            if batch.version is None:
                raise ValueError(
                    f"{name}: Batch.version says of which weights of {of} it must be: "
                    f"FusedStep.version({of!r}) before the batch's first optimizer step"
                )
            if batch.version != self._versions[of]:
                raise ValueError(
                    f"{name}: asks for {of} as it was after {batch.version} optimizer steps, but "
                    f"it has taken {self._versions[of]}: run it in an update before that step"
                )

    def _norms(self, trained: Sequence[str]) -> tuple[dict[str, float], bool]:
        """Of each family, over all its stages; and whether any rank has an optimizer to step."""
        names = [name for name in trained if self._models[name].replica_of is None]
        numbers = torch.zeros(len(names) + 1, dtype=torch.float64)
        for index, name in enumerate(names):
            mine = (p.grad for p in self._counted[name])
            numbers[index] = sum(square_sum(gradient) for gradient in mine if gradient is not None)
        numbers[-1] = any(self._models[name].optimizer is not None for name in trained)
        self._control.sum_up(numbers)
        *squares, stepping = numbers.tolist()
        return {n: math.sqrt(s) for n, s in zip(names, squares, strict=True)}, stepping > 0

    def _step(self, model: Model, norm: float) -> None:
        if model.optimizer is None:
            return
        if model.clip_grad and norm > model.clip_grad:
            for parameter in self._parameters[model.name]:
                if parameter.grad is not None:
                    parameter.grad.mul_(model.clip_grad / norm)
        model.optimizer.step()
        self._sums[model.name].clear()
