"""Megatron's process-wide state, one copy for each model, so that two models can take turns."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
)

State = dict[str, Any]
_MOE_LOG = "_MOE_LAYER_WISE_LOGGING_TRACKER"
_TRAINING = "megatron.training.global_vars"
_ARGUMENTS = "_GLOBAL_ARGS"


class ModelContext:
    """What Megatron keeps per process and a model needs as its own.

    Process groups and ranks of parallel_state, the scales and logs of auxiliary losses, what
    megatron.training's ``get_args`` returns if that is loaded (call ``set_args`` inside for other
    arguments), and, if asked for, the random number streams (dropout then draws from a stream of
    the model's own, whatever runs in between). Build the model, its optimizer and its checkpoint
    inside ``with context.active()``.
    """

    def __init__(self, state: State, rng: State | None = None) -> None:
        self._state = state
        self._rng = rng

    @classmethod
    def current(cls, *, own_rng: bool = False) -> "ModelContext":
        """A copy of the state as it is now."""
        return cls(_state(), _rng() if own_rng else None)

    @classmethod
    def create(
        cls, initialize: Callable[[], None], *, reverse: bool = False, own_rng: bool = False
    ) -> "ModelContext":
        """The state that `initialize` makes: it calls ``initialize_model_parallel``. Collective.

        `reverse`: pipelines run from the last rank of each pipeline group to the first, so that two
        models fill each other's bubbles. The present state is untouched.
        """
        before = _state()
        empty: State = {name: {} if isinstance(v, dict) else None for name, v in before.items()}
        if _ARGUMENTS in before:
            empty[_ARGUMENTS] = before[_ARGUMENTS]  # `initialize` may ask for sizes there
        _set_state(empty)
        MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
        try:
            with _reversed_pipelines() if reverse else contextlib.nullcontext():
                initialize()
            return cls.current(own_rng=own_rng)
        finally:
            _set_state(before)

    @property
    def arguments(self) -> object:
        """What megatron.training's ``get_args`` returns here; None where it is not loaded."""
        return self._state.get(_ARGUMENTS)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, Megatron sees this state; what changes stays with this context."""
        turns = Turns({"": self})
        turns.to("")
        try:
            yield
        finally:
            turns.end()


class Turns:
    """Switches between the contexts of models that run together; `end` puts all back."""

    def __init__(self, contexts: Mapping[str, ModelContext | None]) -> None:
        """`contexts`: None for a model that uses the process's state as it is."""
        self._contexts = contexts
        self._outer: ModelContext | None = None
        self._now: str | None = None

    def to(self, name: str) -> None:
        """From here on Megatron's state is that of model `name`."""
        context = self._contexts[name]
        if name == self._now or context is None:
            return
        if self._outer is None:
            own_rng = any(c is not None and c._rng is not None for c in self._contexts.values())
            self._outer = ModelContext.current(own_rng=own_rng)
        self._leave()
        _set_state(context._state)
        if context._rng is not None:
            _set_rng(context._rng)
        self._now = name

    def end(self) -> None:
        """Megatron's state is again what it was."""
        self._leave()
        if self._outer is not None:
            _set_state(self._outer._state)
            if self._outer._rng is not None:
                _set_rng(self._outer._rng)
        self._outer = self._now = None

    def _leave(self) -> None:
        context = None if self._now is None else self._contexts[self._now]
        if context is None:
            return
        context._state = _state()
        if context._rng is not None:
            context._rng = _rng()


def _state() -> State:
    state = {
        name: value
        for name, value in vars(parallel_state).items()
        if name[0] == "_" and name[1:2].isupper()
    }
    if hasattr(moe_utils, _MOE_LOG):  # releases before 0.16 keep it in parallel_state
        state[_MOE_LOG] = getattr(moe_utils, _MOE_LOG)
    state["MoE"] = moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale
    state["MTP"] = MTPLossAutoScaler.main_loss_backward_scale
    state["MTP log"] = MTPLossLoggingHelper.tracker
    if _TRAINING in sys.modules:
        state[_ARGUMENTS] = getattr(sys.modules[_TRAINING], _ARGUMENTS, None)
    return state


def _set_state(state: State) -> None:
    names = dict(state)
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = names.pop("MoE")
    MTPLossAutoScaler.main_loss_backward_scale = names.pop("MTP")
    MTPLossLoggingHelper.tracker = names.pop("MTP log")
    if _ARGUMENTS in names:
        setattr(sys.modules[_TRAINING], _ARGUMENTS, names.pop(_ARGUMENTS))
    if hasattr(moe_utils, _MOE_LOG):
        setattr(moe_utils, _MOE_LOG, names.pop(_MOE_LOG))
    vars(parallel_state).update(names)


def _rng() -> State:
    state: State = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: State) -> None:
    torch.set_rng_state(state["cpu"])
    if state["tracker"]:
        get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def _reversed_pipelines() -> Iterator[None]:
    """Within, Megatron makes its pipeline groups with their ranks in reverse order.

    Megatron has no argument for it, and torch sorts a group's ranks unless told not to.
    """
    generator, new_group = parallel_state.RankGenerator, torch.distributed.new_group

    class Reversed(generator):  # type: ignore[misc, valid-type]
        def get_ranks(self, token: str, *rest: Any) -> list[list[int]]:
            groups: list[list[int]] = super().get_ranks(token, *rest)
            return [ranks[::-1] for ranks in groups] if token == "pp" else groups

    def unsorted_group(*arguments: Any, **named: Any) -> Any:
        return new_group(*arguments, **{"sort_ranks": False, **named})

    parallel_state.RankGenerator = Reversed
    torch.distributed.new_group = unsorted_group
    try:
        yield
    finally:
        parallel_state.RankGenerator = generator
        torch.distributed.new_group = new_group
