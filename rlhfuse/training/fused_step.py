"""Any models, trained (or only run) together under one schedule: fusion for your own training loop.

PPO's actor and critic are one pair among many: a student beside its forward-only teacher, an actor
beside a reward model in training, several policies. Each model is a pipeline of plain modules;
what is computed does not depend on the schedule, only when. A forward-only model may hold the
modules of one that trains: what it finds is of the weights before the step, such as old
log-probabilities of later mini-batches.

    policy = Model("policy", ranks=(0, 1), stages={rank: stage}, optimizer=adam)
    teacher = Model("teacher", ranks=(1, 0), stages={1 - rank: frozen}, forward_only=True)
    step = FusedStep([policy, teacher], rank=rank, device=device, dtype=torch.bfloat16)
    schedule = fuse(problem)  # of pipelines named "policy" and "teacher"; see rlhfuse.schedules
    results = step.update({"policy": batch, "teacher": next_batch}, schedule)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from rlhfuse.schedules.ir import Schedule
from rlhfuse.schedules.timing import check_channels
from rlhfuse.timeline import Span
from rlhfuse.training.channels import Channels, Shape
from rlhfuse.training.clock import clock_of
from rlhfuse.training.executor import Executor, StageRunner
from rlhfuse.training.gradients import GradientSums, square_sum
from rlhfuse.training.memory import Held, Ways, advice, in_use, out_of_memory
from rlhfuse.training.split import WeightStore, split_linears
from rlhfuse.training.stage_runner import AutogradRunner, Compute, ForwardRunner
from rlhfuse.training.streams import draws, may_draw, stream

_WAYS = Ways(
    activations="cut smaller micro-batches, or set Model.recompute",
    deferred="set Model.split_weight=False, or fuse without split_weight",
    optimizer="use an optimizer of less state, or more ranks for the model (Model.ranks)",
    weights="use more ranks for the model (Model.ranks), or a narrower dtype",
)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One pipeline. All ranks give the same names and `ranks`, each its own `stages`.

    `stages`: the modules of this rank by pp_stage, tensor in and tensor out; they keep their parts
    and parameters from here on. `optimizer`: over their parameters; it is stepped and cleared once
    an update, after clipping by the global norm over all stages (`clip_grad`, 0: off). Gradients of
    parameters in half precision are summed in float32, and rounded once. `split_weight`: linear
    layers may be split into I and W. `recompute`: hold only the inputs of stages, and compute them
    again in backward. `seed`: of dropout; every update, stage and micro-batch draws from a stream
    of its own.
    """

    name: str
    ranks: tuple[int, ...]
    stages: Mapping[int, nn.Module]
    optimizer: torch.optim.Optimizer | None = None
    clip_grad: float = 0.0
    split_weight: bool = False
    forward_only: bool = False
    recompute: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One model's micro-batches in one update.

    `shapes`: of the message between stages, per micro-batch; all ranks need them. `inputs`: what
    the first stage gets (asked for there alone). `finish`: on the last stage, the micro-batch and
    its output become a loss [], whose gradients add up over micro-batches; or, where the model
    only runs forward, what is to be kept.
    """

    shapes: Sequence[Shape]
    inputs: Callable[[int], torch.Tensor]
    finish: Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """`finished`: what `Batch.finish` returned, by micro-batch, detached; empty on ranks without
    the last stage. `grad_norm`: over all stages, before clipping; 0 where nothing is trained."""

    finished: tuple[torch.Tensor, ...]
    grad_norm: float


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
            ValueError: two models of one name, stages that do not lie on this rank.
        """
        self._models = {model.name: model for model in models}
        if len(self._models) != len(models):
            raise ValueError(f"models need different names, not {[m.name for m in models]}")
        for model in models:
            mine = {s for s, home in enumerate(model.ranks) if home == rank}
            if mine != set(model.stages):
                raise ValueError(
                    f"{model.name}: rank {rank} holds stages {sorted(mine)} by `ranks`, "
                    f"but was given {sorted(model.stages)}"
                )
        # Walked once: of many small modules, names alone would take longer than their numbers.
        self._parameters = {
            model.name: tuple(
                dict.fromkeys(p for _, m in sorted(model.stages.items()) for p in m.parameters())
            )
            for model in models
            if not model.forward_only
        }
        self._sums = {name: GradientSums(mine) for name, mine in self._parameters.items()}
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
        self._control = dist.new_group(timeout=timeout, backend="gloo")
        self._channels = Channels(
            rank, {m.name: m.ranks for m in models}, device=device, dtype=dtype, timeout=timeout
        )
        runners: dict[tuple[str, int], StageRunner] = {
            (model.name, stage): self._runner(model, stage, module)
            for model in models
            for stage, module in model.stages.items()
        }
        self._executor = Executor(
            rank, self._channels, runners, clock_of(device), _get_default_store(), self._explain
        )
        self._trained = [r for r in runners.values() if isinstance(r, AutogradRunner)]

    def update(
        self,
        batches: Mapping[str, Batch],
        schedule: Schedule,
        spans: list[Span] | None = None,
        number: int | None = None,
    ) -> dict[str, Result]:
        """Run `schedule`, then one optimizer step of each model that trains. Appends what was
        measured to `spans`. `number`: of this update, for random numbers; one more than the last
        one's where it is not given (a run that goes on from a checkpoint should).

        Raises:
            ValueError: the schedule is not of these models and micro-batches, or would lock up.
            FloatingPointError: on all ranks, a gradient is not finite; nothing has been stepped.
            StepFailed: a task failed here or elsewhere; this object is of no more use.
        """
        self._check(batches, schedule)
        if schedule is not self._proven:  # a schedule never changes
            check_channels(schedule)
            self._proven = schedule
        self._batches = batches
        self._finished = {name: {} for name in batches}
        self._number = self._number + 1 if number is None else number
        self._drawing = frozenset(
            name for name in batches if any(draws(part) for part in self._droppers[name])
        )
        shapes = {name: batch.shapes for name, batch in batches.items()}
        self._executor.run(schedule, shapes, [] if spans is None else spans)
        for name in batches:
            if name in self._sums:
                self._sums[name].hand_over()
        norms = self._norms(sorted(batches))
        for name, norm in norms.items():
            if not math.isfinite(norm):
                self._clear(batches)
                raise FloatingPointError(f"{name}: the gradient norm is {norm}; nothing stepped")
        for name, norm in norms.items():
            self._step(self._models[name], norm)
        return {
            name: Result(tuple(value for _, value in sorted(done.items())), norms[name])
            for name, done in self._finished.items()
        }

    def close(self) -> None:
        """Leave the process groups that this object made."""
        self._channels.close()
        dist.destroy_process_group(self._control)

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
        return AutogradRunner(compute, last=last, weights=store, recompute=model.recompute)

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

    def _check(self, batches: Mapping[str, Batch], schedule: Schedule) -> None:
        for pipe in schedule.problem.pipelines:
            model, batch = self._models.get(pipe.name), batches.get(pipe.name)
            if model is None or batch is None:
                raise ValueError(f"schedule: no model or no batch is called {pipe.name!r}")
            if tuple(pipe.stages) != model.ranks:
                raise ValueError(
                    f"schedule: {pipe.name} on ranks {tuple(pipe.stages)}, the model on "
                    f"{model.ranks}"
                )
            if pipe.num_microbatches != len(batch.shapes):
                raise ValueError(
                    f"schedule: {pipe.num_microbatches} micro-batches of {pipe.name}, the batch "
                    f"has {len(batch.shapes)}"
                )
            if pipe.forward_only != model.forward_only:
                raise ValueError(f"schedule: {pipe.name} runs only forward in one of both")
        extra = set(batches) - {pipe.name for pipe in schedule.problem.pipelines}
        if extra:
            raise ValueError(f"schedule: runs nothing of {', '.join(sorted(extra))}")

    def _norms(self, names: Sequence[str]) -> dict[str, float]:
        squares = torch.zeros(len(names), dtype=torch.float64)
        for index, name in enumerate(names):
            squares[index] = sum(map(square_sum, self._gradients(self._models[name])))
        dist.all_reduce(squares, group=self._control)
        return {name: math.sqrt(float(s)) for name, s in zip(names, squares, strict=True)}

    def _step(self, model: Model, norm: float) -> None:
        if model.optimizer is None:
            return
        if model.clip_grad and norm > model.clip_grad:
            for gradient in self._gradients(model):
                gradient.mul_(model.clip_grad / norm)
        model.optimizer.step()
        model.optimizer.zero_grad()

    def _clear(self, names: Mapping[str, Batch]) -> None:
        for name in names:
            if name in self._sums:
                self._sums[name].clear()

    def _gradients(self, model: Model) -> list[torch.Tensor]:
        parameters = self._parameters.get(model.name, ())
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
