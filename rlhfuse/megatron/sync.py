"""When a model's gradients are reduced over its replicas: Megatron's hooks, once each."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class GradientSync:
    """Keeps `no_sync_func` entered but for the last gradients of each chunk.

    Without `grad_sync_func`, reduction starts inside the last backward of a chunk, as its gradients
    become ready. With it, that happens on the first stage only; other stages call it after their
    last backward, in the bubble. With several chunks it is always called after the last backward.
    """

    def __init__(self, config: Any, chunks: Sequence[torch.nn.Module], first_rank: bool) -> None:
        self._chunks = chunks
        self._no_sync = _as_one(config.no_sync_func)
        self._grad_sync = _per_chunk(config.grad_sync_func, len(chunks))
        self._param_sync = _per_chunk(config.param_sync_func, len(chunks))
        self._inside = self._grad_sync is None or (first_rank and len(chunks) == 1)
        self._context: contextlib.AbstractContextManager[Any] | None = None

    def begin(self, forward_only: bool) -> None:
        """No reduction from here on; parameters of the first two chunks are asked for."""
        self._enter()
        if forward_only:
            self._param_sync = None
        for chunk in range(min(2, len(self._chunks))):
            self._ask_for(chunk)

    def before_first_forward(self, chunk: int) -> None:
        """Ask for the next chunk's parameters while this one computes."""
        if chunk >= 1 and chunk + 1 < len(self._chunks):
            self._ask_for(chunk + 1)

    @contextlib.contextmanager
    def gradients(self, chunk: int, *, last: bool, final: bool) -> Iterator[None]:
        """Around work that makes gradients of `chunk`: `last` if of its last micro-batch, `final`
        if no gradient of the chunk comes later."""
        if last and self._inside:
            self._leave()
        yield
        if final and not self._inside and self._grad_sync is not None:
            self._leave()
            self._grad_sync[chunk](self._chunks[chunk].parameters())
        self._enter()

    def end(self) -> None:
        """Leave `no_sync_func`, whatever happened."""
        self._leave()

    def _enter(self) -> None:
        if self._context is None:
            self._context = self._no_sync()
            self._context.__enter__()

    def _leave(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            context.__exit__(None, None, None)

    def _ask_for(self, chunk: int) -> None:
        # One chunk alone asks for its parameters itself, in forward hooks.
        if self._param_sync is not None and len(self._chunks) > 1:
            self._param_sync[chunk](self._chunks[chunk].parameters())


def _as_one(no_sync: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if no_sync is None:
        return contextlib.nullcontext
    if not isinstance(no_sync, list):
        found: Callable[[], contextlib.AbstractContextManager[Any]] = no_sync
        return found

    @contextlib.contextmanager
    def all_of_them() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in no_sync:
                stack.enter_context(one())
            yield

    return all_of_them


def _per_chunk(hook: Any, chunks: int) -> list[Callable[..., Any]] | None:
    if hook is None or isinstance(hook, list):
        return hook
    return [hook] * chunks
