"""In place of Megatron's ``get_forward_backward_func``: the same contract, any schedule."""

import logging
from dataclasses import dataclass, field
from typing import Any

from rlhfuse.megatron import stock
from rlhfuse.megatron.call import Call
from rlhfuse.megatron.delayed import delaying, refuse_stock_schedule
from rlhfuse.megatron.engine import Engine, Model, Placed, Recorder, recorder_for
from rlhfuse.megatron.groups import groups_of
from rlhfuse.megatron.orders import (
    Choice,
    Costs,
    Shape,
    default_order,
    forwards_only,
    make_schedule,
    problem_for,
)
from rlhfuse.megatron.split import splittable
from rlhfuse.megatron.support import fall_back_reasons
from rlhfuse.schedules.ir import Op, Schedule
from rlhfuse.timeline import Timeline

logger = logging.getLogger(__name__)
NAME = "model"


@dataclass(slots=True)
class Scheduler:
    """Runs Megatron models on one chosen schedule, and keeps what calls share.

    `schedule`: see `Choice`; `costs` and `memory_cap` (in units of `costs.activation`) are what it
    is made for. `record`: keep a timeline of each call.
    """

    schedule: Choice = default_order
    costs: Costs = field(default_factory=Costs)
    memory_cap: float | None = None
    record: bool = False
    timeline: Timeline = field(default_factory=lambda: Timeline(()))
    """This rank's tasks of the last call, if recorded."""
    _engine: Engine = field(default_factory=Engine)
    _placed: dict[tuple[object, ...], Placed] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def get_forward_backward_func(
        self,
        pp_size: int | None = None,
        vp_size: int | None = None,
        schedule_pg_collection: object = None,
    ) -> stock.ForwardBackward:
        """As Megatron's: the returned callable takes the same keyword arguments."""

        def forward_backward(**arguments: Any) -> list[Any]:
            call = Call.from_arguments(arguments)
            placed, reasons = self._place(call, schedule_pg_collection)
            if placed is None:
                self._tell("Megatron's own schedule is used", *reasons)
                refuse_stock_schedule(call.config, call.forward_only)
                own = stock.stock_func(pp_size, vp_size, schedule_pg_collection)
                return own(**call.arguments())
            return self.run(call, placed)

        return forward_backward

    def run(self, call: Call, placed: Placed) -> list[Any]:
        """One call on a schedule that fits it."""
        recorder: Recorder | None = recorder_for(call.device) if self.record else None
        groups = groups_of(call.p2p_communicator, call.pg_collection)
        store = self._engine.run(placed, {NAME: Model(call, groups)}, recorder)[NAME]
        if recorder is not None:
            self.timeline = Timeline(tuple(recorder.spans(f"rank{placed.row}")))
        return store

    def close(self) -> None:
        """Leave the process groups made so far."""
        self._engine.close()
        self._placed.clear()

    def _place(self, call: Call, collection: object) -> tuple[Placed | None, list[str]]:
        """The schedule for a call, or why there is none."""
        if collection is not None:
            return None, ["schedule_pg_collection: several modules in one pipeline"]
        reasons = fall_back_reasons(call, split_weight=False)
        if reasons:
            return None, reasons
        ranks = groups_of(call.p2p_communicator, call.pg_collection).pp_ranks
        if len(ranks) == 1:
            return None, []  # nothing to schedule, nothing to tell
        key = (ranks, len(call.chunks), call.num_microbatches, call.forward_only)
        if key not in self._placed:
            self._placed[key] = Placed.at(self._made(call, len(ranks)), ranks)
        placed = self._placed[key]
        if splits(placed.schedule):
            reasons = fall_back_reasons(call, split_weight=True)
            self._tell(*nothing_to_split(call))
        return (None, reasons) if reasons else (placed, [])

    def _made(self, call: Call, num_ranks: int) -> Schedule:
        shape = Shape(
            tuple(range(num_ranks)), len(call.chunks), call.num_microbatches, call.forward_only
        )
        problem = problem_for({NAME: shape}, {NAME: self.costs}, self.memory_cap)
        return make_schedule(forwards_only if call.forward_only else self.schedule, problem)

    def _tell(self, what: str = "", *reasons: str) -> None:
        text = f"{what}: {'; '.join(reasons)}"
        if reasons and text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


def nothing_to_split(call: Call) -> tuple[str, ...]:
    """A warning, and its reason, where a split schedule finds no layer to split on this rank.

    No ground to fall back: other ranks, with other layers, would not.
    """
    if any(splittable(chunk) or delaying(chunk, call.config) for chunk in call.chunks):
        return ()
    return (
        "weight gradients stay in the input gradients' tasks",
        "no layer here is one of Megatron's local parallel linear layers, or one of Transformer "
        "Engine's built with delay_wgrad_compute (rlhfuse.megatron.delayed)",
    )


def splits(schedule: Schedule) -> bool:
    """Whether any backward is split."""
    return any(task.op is Op.W for row in schedule.rows for task in row)
