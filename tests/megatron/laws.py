"""Trains one tiny model twice, by Megatron's schedule and by ours, and tells the differences."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from rlhfuse.megatron import stock
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.dropin import Scheduler
from rlhfuse.megatron.orders import Choice
from tests.megatron.tiny import Setting, Trained, init_parallel

Tensors = dict[str, torch.Tensor]
Found = dict[str, dict[str, tuple[list[str], int]]]
"""What differs, and a count of what ran, by case and schedule."""
Case = TypeVar("Case")
History = list[tuple[list[Any], Tensors, Tensors]]


def train(setting: Setting, run: Callable[..., Any], *, told: bool = False) -> History:
    """Reported losses, gradients and updated weights of `setting.steps` steps; with `told`, beside
    the last losses, what the schedule told of each forward."""
    model = Trained(setting)
    history = []
    for step in range(setting.steps):
        model.zero()
        store = run(**model.arguments(step))
        history.append((store, model.gradients(), model.step() if setting.ddp else {}))
    if told:
        history[-1][0].append(sorted(model.seen, key=str))  # schedules differ in order
    return history


def differences(expected: History, found: History, rounding: float = 0.0) -> list[str]:
    """What is not the same to the last bit. With `rounding`: whose gradients differ by more of
    their largest element (weights do not count then: Adam moves by tiny gradients as far)."""
    wrong = []
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not same(one[0], other[0]):
            wrong.append(f"step {step}: losses {one[0]} {other[0]}")
        for what, a, b in (("gradient", one[1], other[1]), ("weight", one[2], other[2])):
            wrong += [f"step {step}: missing {what} {name}" for name in a.keys() ^ b.keys()]
            gaps = {name: float((a[name] - b[name]).abs().max()) for name in a.keys() & b.keys()}
            wrong += [
                f"step {step}: {what} {name} by {gap:.3g}"
                for name, gap in gaps.items()
                if not torch.equal(a[name], b[name])
                and (what == "gradient" or not rounding)
                and not gap <= rounding * float(a[name].abs().max())
            ]
    return wrong


def rounding(setting: Setting, choice: Choice) -> float:
    """Of which schedules gradients are equal to rounding only: an output layer that is used twice
    in a micro-batch has two products, which a split backward adds one by one."""
    return 1e-6 if setting.mtp and choice in ("zero-bubble", "fuse-split") else 0.0


def same(one: Any, other: Any) -> bool:
    """Equal results of a forward-backward call, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def compare(setting: Setting, schedules: Sequence[Choice]) -> dict[str, tuple[list[str], int]]:
    """For each schedule: what differs from Megatron's own run, and how many tasks ran on ours."""
    init_parallel(setting)
    found = {}
    try:
        expected = train(
            replace(setting, delayed=False), stock.stock_func(None, None, None), told=True
        )
        assert any(bool(g.any()) for g in expected[0][1].values())
        for choice in schedules:
            ours = Scheduler(choice, record=True)
            history = train(setting, ours.get_forward_backward_func(), told=True)
            wrong = differences(expected, history, rounding(setting, choice))
            found[str(choice)] = (wrong, len(ours.timeline.spans))
            ours.close()
    finally:
        parallel_state.destroy_model_parallel()
    return found


def compare_all(
    cases: Mapping[str, Case], compare: Callable[[Case], dict[str, tuple[list[str], int]]]
) -> Found:
    """All cases in one process, until one raises."""
    found: Found = {}
    with on_cpu():
        for name, case in cases.items():
            try:
                found[name] = compare(case)
            except Exception:  # what went before is still of interest; ranks are out of step now
                found[name] = {"raised": ([traceback.format_exc()], 0)}
                break
    return found
