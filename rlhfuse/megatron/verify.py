"""First steps twice, on Megatron's schedule and on ours, before ours is trusted."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlhfuse.megatron import stock
from rlhfuse.megatron.call import Call
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.delayed import refuse_stock_schedule
from rlhfuse.megatron.dropin import Scheduler

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest gradient difference over largest gradient that counts as rounding (split backward in
half precision); float32 schedules without W agree bit for bit."""


class VerifyingScheduler:
    """Runs `scheduler` once it has shown, for some training calls, that it changes nothing.

    A verified step costs two steps and a copy of all gradients. Evaluation calls are not verified.
    """

    def __init__(self, scheduler: Scheduler, steps: int) -> None:
        self._scheduler = scheduler
        self._left = steps
        self.refused: str | None = None
        """Why Megatron's schedule stays, once a step differed."""

    def get_forward_backward_func(
        self,
        pp_size: int | None = None,
        vp_size: int | None = None,
        schedule_pg_collection: object = None,
    ) -> stock.ForwardBackward:
        """As Megatron's."""
        own = stock.stock_func(pp_size, vp_size, schedule_pg_collection)
        ours = self._scheduler.get_forward_backward_func(pp_size, vp_size, schedule_pg_collection)

        def forward_backward(**arguments: Any) -> list[Any]:
            if self.refused is not None:
                return own(**arguments)
            if self._left == 0 or arguments.get("forward_only"):
                return ours(**arguments)
            return self._both(own, ours, arguments)

        return forward_backward

    def _both(
        self, own: stock.ForwardBackward, ours: stock.ForwardBackward, arguments: dict[str, Any]
    ) -> list[Any]:
        call = Call.from_arguments(arguments)
        refuse_stock_schedule(call.config, call.forward_only)
        recorded = [_Recorded(iterator) for iterator in call.data_iterators]
        context = ModelContext.current(own_rng=True)
        before = _Saved.of(call)
        expected = own(**_with_data(arguments, recorded))
        theirs = _Saved.of(call)
        before.restore(call)
        with context.active():
            found = ours(**_with_data(arguments, [iter(one.items) for one in recorded]))
        self._left -= 1
        difference = _agreed(_difference(expected, found, theirs, _Saved.of(call)), call)
        if difference > TOLERANCE:
            theirs.restore(call)
            self.refused = f"step differs by {difference:.3g} of the largest gradient or loss"
            logger.error("Megatron's own schedule stays in use: %s", self.refused)
            return expected
        logger.info("verified: largest difference %.3g; %d to go", difference, self._left)
        return found


class _Recorded:
    """An iterator that remembers what it gave."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self.items.append(copy.copy(item))  # callers pop keys of a batch
        return item


@dataclass(frozen=True)
class _Saved:
    """Gradients and buffers of all chunks."""

    gradients: list[tuple[Any, torch.Tensor | None]]
    buffers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, call: Call) -> "_Saved":
        parameters = [p for chunk in call.chunks for p in chunk.parameters()]
        buffers = [b for chunk in call.chunks for _, b in chunk.named_buffers()]
        return cls(
            [(p, None if _gradient(p) is None else _gradient(p).clone()) for p in parameters],
            [(b, b.clone()) for b in buffers],
        )

    def restore(self, call: Call) -> None:
        for chunk in call.chunks:
            reset: Any = getattr(chunk, "zero_grad_buffer", None)
            if reset is not None:  # also forgets what was reduced already
                reset()
        with torch.no_grad():
            for parameter, gradient in self.gradients:
                if hasattr(parameter, "main_grad"):
                    parameter.main_grad.copy_(gradient)
                else:
                    parameter.grad = None if gradient is None else gradient.clone()
            for buffer, value in self.buffers:
                buffer.copy_(value)


def _gradient(parameter: Any) -> Any:
    return (
        getattr(parameter, "main_grad", None) if hasattr(parameter, "main_grad") else parameter.grad
    )


def _with_data(arguments: dict[str, Any], iterators: list[Any]) -> dict[str, Any]:
    one = not isinstance(arguments["data_iterator"], list)
    return {**arguments, "data_iterator": iterators[0] if one else iterators}


def _difference(expected: Any, found: Any, theirs: _Saved, ours: _Saved) -> float:
    """Largest difference over largest value, of losses and of gradients."""
    pairs = list(_pairs(expected, found))
    pairs += [
        (a, b)
        for (_, a), (_, b) in zip(theirs.gradients, ours.gradients, strict=True)
        if a is not None and b is not None
    ]
    scale = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    worst = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    return worst / scale if scale else worst


def _pairs(expected: Any, found: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors at the same place of two results."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        if expected.is_floating_point():
            yield expected, found
    elif isinstance(expected, dict):
        for key, value in expected.items():
            yield from _pairs(value, found[key])
    elif isinstance(expected, list | tuple):
        for a, b in zip(expected, found, strict=True):
            yield from _pairs(a, b)


def _agreed(difference: float, call: Call) -> float:
    """The largest over all ranks, so that all of them switch or none."""
    worst = torch.tensor([difference], dtype=torch.float64, device=call.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
