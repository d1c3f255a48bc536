"""What a `FusedStep` is made of and given: models, and their batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rlhfuse.schedules.ir import Schedule
from rlhfuse.training.channels import Shape

Tied = Callable[[nn.Module], nn.Parameter]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One pipeline. All ranks give the same models, each its own `stages` of them.

    `stages`: the modules of this rank by pp_stage, tensor in and tensor out; they keep their parts
    and parameters from here on. `optimizer`: over what they train; it is stepped once an update,
    after clipping by the global norm over all stages (`clip_grad`, 0: off), and gradients are
    cleared; without one, they are left in ``.grad``. Gradients of parameters in half precision are
    summed in float32, and rounded once. `split_weight`: linear layers may be split into I and W.
    `recompute`: hold only the inputs of stages, and compute them again in backward. `seed`: of
    dropout; every update, stage and micro-batch draws from a stream of its own.

    `weights_of`: of a model that only runs forward, the one that trains and whose modules it holds.
    `replica_of`: the model of whose batch this one, with the same weights on other ranks, trains
    another part; their gradients become one sum, and losses are to be divided accordingly. `tied`:
    finds the matrix that first and last stage share, in each; it gets the sum of both gradients.
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
    weights_of: str | None = None
    replica_of: str | None = None
    tied: Tied | None = None

    @property
    def family(self) -> str:
        """The model that this one is, or is a replica of."""
        return self.replica_of or self.name


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One model's micro-batches in one update.

    `shapes`: of the message between stages, per micro-batch; all ranks need them. `inputs`: what
    the first stage gets (asked for there alone). `finish`: on the last stage, the micro-batch and
    its output become a loss [], whose gradients add up over micro-batches; or, where the model
    only runs forward, what is to be kept. `version`: of the weights that must be found
    (`FusedStep.version`), asked of a model with `weights_of`: old log-probabilities are of the
    weights before a batch's first optimizer step.
    """

    shapes: Sequence[Shape]
    inputs: Callable[[int], torch.Tensor]
    finish: Callable[[int, torch.Tensor], torch.Tensor]
    version: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """`finished`: what `Batch.finish` returned, by micro-batch, detached; empty on ranks without
    the last stage. `grad_norm`: over all stages, before clipping; 0 where nothing is trained."""

    finished: tuple[torch.Tensor, ...]
    grad_norm: float


def trained_parameters(model: Model) -> dict[int, tuple[nn.Parameter, ...]]:
    """What the model trains on this rank, each once, by the first stage that has it."""
    if model.forward_only:
        return {}
    seen: set[nn.Parameter] = set()
    found = {}
    for stage, module in sorted(model.stages.items()):
        mine = [p for p in module.parameters() if p.requires_grad and p not in seen]
        found[stage] = tuple(mine)
        seen.update(mine)
    return found


def check_models(models: Sequence[Model], rank: int) -> None:
    """Raises ValueError for models that do not fit together, or not this rank."""
    by_name = {model.name: model for model in models}
    if len(by_name) != len(models):
        raise ValueError(f"models need different names, not {[m.name for m in models]}")
    for model in models:
        mine = {s for s, home in enumerate(model.ranks) if home == rank}
        if mine != set(model.stages):
            raise ValueError(
                f"{model.name}: rank {rank} holds stages {sorted(mine)} by `ranks`, "
                f"but was given {sorted(model.stages)}"
            )
        _check_relatives(model, by_name)
        _check_optimizer(model, rank)
    _check_sharing(models)


def check_batches(
    models: Mapping[str, Model], batches: Mapping[str, Batch], schedule: Schedule
) -> None:
    """Raises ValueError where the schedule is not of these models and micro-batches."""
    for pipe in schedule.problem.pipelines:
        model, batch = models.get(pipe.name), batches.get(pipe.name)
        if model is None or batch is None:
            raise ValueError(f"schedule: no model or no batch is called {pipe.name!r}")
        if tuple(pipe.stages) != model.ranks:
            raise ValueError(
                f"schedule: {pipe.name} on ranks {tuple(pipe.stages)}, the model on {model.ranks}"
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
    present = {models[name].family for name in batches}
    for model in models.values():
        if model.family in present and model.name not in batches:
            raise ValueError(f"schedule: runs replicas of {model.family}, but not {model.name}")


def _check_relatives(model: Model, by_name: Mapping[str, Model]) -> None:
    if model.weights_of is not None:
        of = by_name.get(model.weights_of)
        if of is None or of.forward_only or not model.forward_only:
            raise ValueError(
                f"{model.name}: weights_of {model.weights_of!r}: a model that only runs forward "
                "has the weights of one that trains"
            )
    if model.replica_of is None:
        return
    first = by_name.get(model.replica_of)
    if first is None or first.replica_of is not None or first.forward_only or model.forward_only:
        raise ValueError(
            f"{model.name}: replica_of {model.replica_of!r}: give a model that trains, "
            "and is no replica"
        )
    if len(first.ranks) != len(model.ranks) or set(first.ranks) & set(model.ranks):
        raise ValueError(
            f"{model.name}: on ranks {model.ranks}, {first.name} on {first.ranks}: replicas have "
            "as many stages, on other ranks"
        )


def _check_optimizer(model: Model, rank: int) -> None:
    trained = {p for mine in trained_parameters(model).values() for p in mine}
    if model.optimizer is None:
        return
    stepped = {p for group in model.optimizer.param_groups for p in group["params"]}
    left = len(trained - stepped)
    if left:
        raise ValueError(
            f"{model.name}: rank {rank}: {left} parameters require a gradient and are not in the "
            "optimizer: add them, or requires_grad_(False)"
        )
    if {p for p in stepped if p.requires_grad} - trained:
        raise ValueError(f"{model.name}: rank {rank}: the optimizer has parameters of no stage")


def _check_sharing(models: Sequence[Model]) -> None:
    """Two that train may not share what they train: each would step with both's gradients."""
    owner: dict[nn.Parameter, str] = {}
    for model in models:
        for parameter in (p for mine in trained_parameters(model).values() for p in mine):
            other = owner.setdefault(parameter, model.name)
            if other != model.name:
                raise ValueError(
                    f"{model.name} trains a parameter {tuple(parameter.shape)} that {other} trains "
                    "too: give one of them a copy, or let it run only forward"
                )
    for model in (m for m in models if m.forward_only):
        held = {owner[p] for s in model.stages.values() for p in s.parameters() if p in owner}
        if held - {model.weights_of}:
            raise ValueError(
                f"{model.name} holds parameters that {min(held)} trains: say so "
                f"(weights_of={min(held)!r}), as what it finds then depends on when it runs"
            )
