"""Puts our scheduler in place of Megatron's in a running program, and takes it out again.

Every caller of Megatron binds the *name* ``get_forward_backward_func`` when it is imported, so a
patch of the defining module alone does nothing for modules that are loaded already: each name in
each loaded module that means Megatron's function is rebound. What a caller *called* earlier and
keeps (ROLL keeps the returned callable in its strategy) cannot be found: install before that.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhfuse.megatron import stock
from rlhfuse.megatron.dropin import Scheduler
from rlhfuse.megatron.orders import Choice, Costs, default_order
from rlhfuse.megatron.verify import VerifyingScheduler


@dataclass(slots=True)
class _Installed:
    """What stands in the place of Megatron's function: one per process, as what it replaces is."""

    function: Callable[..., Any] | None = None
    scheduler: Scheduler | None = None
    names: list[tuple[str, str]] = field(default_factory=list)


_installed = _Installed()


def install(
    schedule: Choice = default_order,
    *,
    costs: Costs | None = None,
    memory_cap: float | None = None,
    verify_steps: int = 0,
) -> tuple[str, ...]:
    """Rebind Megatron's ``get_forward_backward_func`` everywhere; returns the rebound names.

    Installing again changes the schedule and rebinds what has been imported since.

    Args:
        schedule, costs, memory_cap: as `Scheduler`.
        verify_steps: for so many training calls run Megatron's schedule and ours on the same
            batch; only if losses and gradients agree, ours is used from then on.
    """
    scheduler = Scheduler(schedule, costs or Costs(), memory_cap)
    chosen = VerifyingScheduler(scheduler, verify_steps) if verify_steps else scheduler
    before = [stock.get_stock_func]
    if _installed.function is not None:
        before.append(_installed.function)
    if _installed.scheduler is not None:
        _installed.scheduler.close()
    function = chosen.get_forward_backward_func
    names = _rebind(before, function)
    _installed.function, _installed.scheduler, _installed.names = function, scheduler, names
    return tuple(f"{module}.{name}" for module, name in names)


def uninstall() -> tuple[str, ...]:
    """Bind Megatron's own function again everywhere; returns the names. Nothing if not installed.

    Modules that imported ours after `install` are found too.
    """
    if _installed.function is None:
        return ()
    names = _rebind([_installed.function], stock.get_stock_func)
    assert _installed.scheduler is not None
    _installed.scheduler.close()
    _installed.function = _installed.scheduler = None
    _installed.names = []
    return tuple(f"{module}.{name}" for module, name in names)


@contextmanager
def installed(
    schedule: Choice = default_order,
    *,
    costs: Costs | None = None,
    memory_cap: float | None = None,
    verify_steps: int = 0,
) -> Iterator[tuple[str, ...]]:
    """Within, as after `install`; afterwards, as after `uninstall`."""
    try:
        yield install(schedule, costs=costs, memory_cap=memory_cap, verify_steps=verify_steps)
    finally:
        uninstall()


@contextmanager
def rebound(function: Callable[..., Any]) -> Iterator[tuple[str, ...]]:
    """Within, every name that means Megatron's function, or an installed one, means `function`."""
    before = [stock.get_stock_func]
    if _installed.function is not None:
        before.append(_installed.function)
    kept = [
        (key, module, name, value)
        for key, module, name, value in _bound()
        if any(value is one for one in before)
    ]
    for _, module, name, _ in kept:
        setattr(module, name, function)
    try:
        yield tuple(f"{key}.{name}" for key, _, name, _ in kept)
    finally:
        for _, module, name, value in kept:
            setattr(module, name, value)


def _bound() -> Iterator[tuple[str, Any, str, Any]]:
    """Every name in every loaded module, but where this package keeps Megatron's own function."""
    for key, module in sorted(sys.modules.items()):
        if module is not None and module is not stock and hasattr(module, "__dict__"):
            for name, value in list(vars(module).items()):
                yield key, module, name, value


def _rebind(before: list[Callable[..., Any]], after: Callable[..., Any]) -> list[tuple[str, str]]:
    names = []
    for key, module, name, value in _bound():
        if any(value is one for one in before):
            setattr(module, name, after)
            names.append((key, name))
    return names
