"""Two training loops of another framework, side by side, their mini-batches fused.

A framework's update of a model is a loop over mini-batches: zero gradients, forward-backward,
optimizer step. Two such loops run here in turns, never at the same time: each runs until it calls
Megatron's forward-backward function, then the other does, then both calls run as one fused call,
and each loop goes on with its own result. So mini-batch k of one meets mini-batch k of the other,
and both optimizers have stepped before k + 1; neither loop knows.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from rlhfuse.megatron import stock
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.install import rebound

Result = TypeVar("Result")


class LoopStopped(RuntimeError):
    """Raised inside a loop whose partner failed."""


def run_together(
    loops: Mapping[str, Callable[[], Result]],
    scheduler: FusedScheduler,
    contexts: Mapping[str, ModelContext] | None = None,
) -> dict[str, Result]:
    """Run the loops in turns, their training calls fused; what each returns, by name.

    While this runs, every module's ``get_forward_backward_func`` is bound to ours. Calls that only
    go forward run at once, on Megatron's schedule. When one loop has fewer mini-batches, the rest
    of the other's run alone. Collective: every rank brings the same loops in the same order.

    Args:
        contexts: the `ModelContext` of models that were built in their own.
    """
    contexts = contexts or {}
    threads = {name: _Loop(name, loop) for name, loop in loops.items()}
    with rebound(_function_for(threads)):
        try:
            while any(not thread.done for thread in threads.values()):
                _next_round(threads, scheduler, contexts)
        except BaseException:
            for thread in threads.values():
                thread.stop()
            raise
    return {name: thread.result for name, thread in threads.items()}


class _Loop(threading.Thread):
    """A loop that runs only while `go_on` waits for it."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=f"rlhfuse-{name}", daemon=True)
        self._work = work
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._go, self._back = threading.Event(), threading.Event()
        self._stopped = False
        self.asks: dict[str, Any] | None = None
        self.answer: list[Any] = []
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a thread starts on the first device
            self.result = self._work()
        except BaseException as error:  # handed to the caller of run_together
            self.error = error
        self.done = True
        self._back.set()

    def go_on(self) -> None:
        """Let the loop run to its next training call, or to its end."""
        self.asks = None
        self._back.clear()
        if self.ident is None:
            self.start()
        else:
            self._go.set()
        self._back.wait()
        if self.error is not None:
            raise self.error

    def call(self, arguments: dict[str, Any]) -> list[Any]:
        """In the loop's thread: wait until the call has been run."""
        self.asks = arguments
        self._go.clear()
        self._back.set()
        self._go.wait()
        if self._stopped:
            raise LoopStopped(f"{self.name}: its partner failed")
        return self.answer

    def stop(self) -> None:
        """End a loop that waits for a result."""
        self._stopped = True
        self._go.set()
        if self.ident is not None:
            self.join(timeout=10.0)


def _next_round(
    threads: Mapping[str, _Loop],
    scheduler: FusedScheduler,
    contexts: Mapping[str, ModelContext],
) -> None:
    for name, thread in threads.items():
        if not thread.done:
            with _inside(contexts, name):
                thread.go_on()
    calls = {name: thread.asks for name, thread in threads.items() if thread.asks is not None}
    if calls:
        for name, store in scheduler(calls, contexts).items():
            threads[name].answer = store


def _inside(contexts: Mapping[str, ModelContext], name: str) -> AbstractContextManager[None]:
    return contexts[name].active() if name in contexts else nullcontext()


def _function_for(threads: Mapping[str, _Loop]) -> Callable[..., stock.ForwardBackward]:
    def get_forward_backward_func(*sizes: Any, **named: Any) -> stock.ForwardBackward:
        own = stock.get_stock_func(*sizes, **named)

        def forward_backward(**arguments: Any) -> list[Any]:
            me = threading.current_thread()
            if arguments.get("forward_only") or me not in threads.values():
                return own(**arguments)
            assert isinstance(me, _Loop)
            return me.call(arguments)

        return forward_backward

    return get_forward_backward_func
