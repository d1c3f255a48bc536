"""The two calls that replace Megatron's in a training script."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfuse.megatron import stock
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.dropin import Scheduler
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.orders import Choice, default_order


def get_forward_backward_func(
    pp_size: int | None = None,
    vp_size: int | None = None,
    schedule_pg_collection: object = None,
    *,
    schedule: Choice = default_order,
) -> stock.ForwardBackward:
    """Megatron's function of the same name, for any schedule of one model.

    The returned callable takes Megatron's keyword arguments and honours its contract. What our
    schedules do not cover runs on Megatron's own, and says why, once.

    Args:
        pp_size, vp_size, schedule_pg_collection: as Megatron's (used where Megatron's own runs).
        schedule: ``1f1b``, ``zero-bubble``, ``fuse``, ``fuse-split``, a schedule file, a `Schedule`
            or a function that makes one.
    """
    return _scheduler(schedule).get_forward_backward_func(pp_size, vp_size, schedule_pg_collection)


def fused_forward_backward(
    calls: Mapping[str, Mapping[str, Any]],
    schedule: Choice = "fuse",
    contexts: Mapping[str, ModelContext] | None = None,
) -> dict[str, list[Any]]:
    """Forward and backward of several models at once; each model's results, by name.

    Args:
        calls: for each model the keyword arguments of Megatron's forward-backward function, e.g.
            ``{"actor": {...}, "critic": {...}}``. One model alone, or pipelines of one stage, run
            as plain calls.
        schedule: as `get_forward_backward_func`; ``fuse`` and ``fuse-split`` fill one model's
            bubbles with the other's tasks.
        contexts: the `ModelContext` of models that were built in their own (a reversed critic).

    Raises:
        ValueError: the schedule does not fit the models.
        StepFailed: a task failed on some rank; every rank says which.
    """
    return _fused_scheduler(schedule)(calls, contexts)


# Callers ask anew for every step: process groups and schedules must live on between calls.
_schedulers: dict[int, tuple[Choice, Scheduler]] = {}
_fused_schedulers: dict[int, tuple[Choice, FusedScheduler]] = {}


def _scheduler(schedule: Choice) -> Scheduler:
    return _schedulers.setdefault(_key(schedule), (schedule, Scheduler(schedule)))[1]


def _fused_scheduler(schedule: Choice) -> FusedScheduler:
    return _fused_schedulers.setdefault(_key(schedule), (schedule, FusedScheduler(schedule)))[1]


def _key(schedule: Choice) -> int:
    """Text by value; a schedule or function by what it is (kept alive beside its scheduler)."""
    return hash(str(schedule)) if isinstance(schedule, str | Path) else id(schedule)
