"""Forward and backward of two models under one schedule, each filling the other's bubbles."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from rlhfuse.megatron import stock
from rlhfuse.megatron.call import Call
from rlhfuse.megatron.context import ModelContext, Turns
from rlhfuse.megatron.delayed import refuse_stock_schedule
from rlhfuse.megatron.dropin import nothing_to_split, splits
from rlhfuse.megatron.engine import Engine, Model, Placed, Recorder, recorder_for
from rlhfuse.megatron.groups import Groups, groups_of
from rlhfuse.megatron.orders import (
    Choice,
    Costs,
    Shape,
    forwards_only,
    make_schedule,
    problem_for,
)
from rlhfuse.megatron.support import fall_back_reasons, refusals, serial_reasons
from rlhfuse.timeline import Timeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """The pipelines that share ranks with this one, over all models."""

    ranks: tuple[int, ...]
    """Global rank of each row."""
    pipelines: dict[str, tuple[str, tuple[int, ...]]]
    """Model and rows, by pipeline name."""
    mine: dict[str, str]
    """Of each model: the pipeline that this rank is part of."""


@dataclass(slots=True)
class FusedScheduler:
    """Runs two models together and keeps what calls share.

    `schedule`: see `Choice`; a schedule's pipelines carry the models' names (``critic.0``,
    ``critic.1``, ... where a model has several pipelines on the same ranks). `costs`: by model.
    """

    schedule: Choice = "fuse"
    costs: Mapping[str, Costs] = field(default_factory=dict)
    memory_cap: float | None = None
    record: bool = False
    timeline: Timeline = field(default_factory=lambda: Timeline(()))
    """This rank's tasks of the last call, if recorded."""
    _engine: Engine = field(default_factory=Engine)
    _layouts: dict[tuple[object, ...], Layout] = field(default_factory=dict)
    _placed: dict[tuple[object, ...], Placed] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __call__(
        self,
        calls: Mapping[str, Mapping[str, Any]],
        contexts: Mapping[str, ModelContext] | None = None,
    ) -> dict[str, list[Any]]:
        """Run all models' forward and backward passes; what Megatron would return for each.

        Collective. Models have the same micro-batch count on all of their replicas.

        Args:
            calls: each model's usual keyword arguments.
            contexts: the global state of models that were built in their own.

        Raises:
            ValueError: the schedule does not fit the models, or they cannot run together.
            StepFailed: a task failed on some rank.
        """
        contexts = contexts or {}
        parsed = {name: Call.from_arguments(arguments) for name, arguments in calls.items()}
        models = {
            name: Model(call, _groups(call, contexts.get(name)), contexts.get(name))
            for name, call in parsed.items()
        }
        refused = refusals({name: model.call.config for name, model in models.items()})
        if refused:
            raise ValueError(f"models cannot be fused: {'; '.join(refused)}")
        reasons = self._reasons(models, split=False)
        if len(models) > 1 and not reasons:
            placed, layout = self._place(models)
            if splits(placed.schedule):
                reasons = self._reasons(models, split=True)
                for model in models.values():
                    self._tell(*nothing_to_split(model.call))
            if not reasons:
                return self._run(placed, layout, models)
        self._tell("models run one after the other on Megatron's schedules", *reasons)
        return {name: _alone(name, model) for name, model in models.items()}

    def close(self) -> None:
        """Leave the process groups made so far."""
        self._engine.close()
        self._placed.clear()
        self._layouts.clear()

    def _run(
        self, placed: Placed, layout: Layout, models: Mapping[str, Model]
    ) -> dict[str, list[Any]]:
        device = next(iter(models.values())).call.device
        recorder: Recorder | None = recorder_for(device) if self.record else None
        named = {layout.mine[name]: model for name, model in models.items()}
        stores = self._engine.run(placed, named, recorder)
        if recorder is not None:
            self.timeline = Timeline(tuple(recorder.spans(f"rank{placed.row}")))
        return {name: stores[layout.mine[name]] for name in models}

    def _place(self, models: Mapping[str, Model]) -> tuple[Placed, Layout]:
        where = tuple((name, model.groups.pp_ranks) for name, model in models.items())
        if where not in self._layouts:
            self._layouts[where] = layout_of(where)
        layout = self._layouts[where]
        shapes = {
            pipeline: _shape(models[name].call, rows)
            for pipeline, (name, rows) in layout.pipelines.items()
        }
        key = (where, tuple(shapes.items()))
        if key not in self._placed:
            costs = {p: self.costs.get(name, Costs()) for p, (name, _) in layout.pipelines.items()}
            problem = problem_for(shapes, costs, self.memory_cap)
            evaluating = all(shape.forward_only for shape in shapes.values())
            schedule = make_schedule(forwards_only if evaluating else self.schedule, problem)
            self._placed[key] = Placed.at(schedule, layout.ranks)
        return self._placed[key], layout

    def _reasons(self, models: Mapping[str, Model], *, split: bool) -> list[str]:
        reasons = [
            f"{name}: {reason}"
            for name, model in models.items()
            for reason in fall_back_reasons(model.call, split_weight=split)
        ]
        alone = [name for name, model in models.items() if len(model.groups.pp_ranks) == 1]
        reasons += serial_reasons({name: model.call.config for name, model in models.items()})
        if alone and len(models) > 1:
            reasons.append(f"{', '.join(alone)}: one pipeline stage has no bubbles")
        return reasons

    def _tell(self, what: str = "", *reasons: str) -> None:
        text = f"{what}: {'; '.join(reasons)}"
        if reasons and text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


def layout_of(where: tuple[tuple[str, tuple[int, ...]], ...]) -> Layout:
    """Rows and pipelines of the ranks connected with this one. Collective over all ranks.

    `where`: each model's name with its pipeline's global ranks, as this rank sees them.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, where)
    found = sorted({item for one in everywhere for item in one}, key=lambda item: item[1])
    ranks = {dist.get_rank()}
    while True:
        touching = {r for _, members in found if ranks & set(members) for r in members}
        if touching <= ranks:
            break
        ranks |= touching
    rows = {rank: row for row, rank in enumerate(sorted(ranks))}
    pipelines: dict[str, tuple[str, tuple[int, ...]]] = {}
    mine: dict[str, str] = {}
    for name, my_ranks in where:
        here = [members for other, members in found if other == name and members[0] in ranks]
        for number, members in enumerate(here):
            label = name if len(here) == 1 else f"{name}.{number}"
            pipelines[label] = (name, tuple(rows[rank] for rank in members))
            if members == my_ranks:
                mine[name] = label
    return Layout(tuple(rows), pipelines, mine)


def _alone(name: str, model: Model) -> list[Any]:
    """One model on Megatron's own schedule, in its own state."""
    refuse_stock_schedule(model.call.config, model.call.forward_only)
    turns = Turns({name: model.context})
    turns.to(name)
    try:
        vp_size = len(model.call.chunks) if len(model.call.chunks) > 1 else None
        own = stock.stock_func(len(model.groups.pp_ranks), vp_size, None)
        return own(**model.call.arguments())
    finally:
        turns.end()


def _groups(call: Call, context: ModelContext | None) -> Groups:
    turns = Turns({"": context})
    turns.to("")
    try:
        return groups_of(call.p2p_communicator, call.pg_collection)
    finally:
        turns.end()


def _shape(call: Call, rows: tuple[int, ...]) -> Shape:
    return Shape(rows, len(call.chunks), call.num_microbatches, call.forward_only)
