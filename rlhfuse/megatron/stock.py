"""All that is taken from Megatron's own scheduler, for the release that is installed."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config, get_model_type

ForwardBackward = Callable[..., list[Any]]
"""What Megatron's ``get_forward_backward_func`` returns; called by keyword."""

get_stock_func: Callable[..., ForwardBackward] = schedules.get_forward_backward_func
"""Megatron's own function, kept from before `install` puts ours in its place."""

_FORWARD_STEP = frozenset(inspect.signature(schedules.forward_step).parameters)
_BACKWARD_STEP = frozenset(inspect.signature(schedules.backward_step).parameters)
_SCHEDULE = frozenset(inspect.signature(schedules.forward_backward_no_pipelining).parameters)
_GET_FUNC = frozenset(inspect.signature(get_stock_func).parameters)


def stock_func(pp_size: int | None, vp_size: int | None, collection: object) -> ForwardBackward:
    """Megatron's own schedule for these sizes; releases before 0.16 take none."""
    given = {"pp_size": pp_size, "vp_size": vp_size, "schedule_pg_collection": collection}
    return get_stock_func(**{k: v for k, v in given.items() if k in _GET_FUNC and v is not None})


def config_of(chunk: torch.nn.Module) -> Any:
    """The Megatron config of a (wrapped) model chunk."""
    return get_model_config(chunk)


def forward_step(**arguments: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Megatron's forward step: input, autocast, loss and its scaling, timers, scalers."""
    known = {name: value for name, value in arguments.items() if name in _FORWARD_STEP}
    output, num_tokens = schedules.forward_step(**known)
    return output, num_tokens


def backward_step(
    chunk: torch.nn.Module,
    received: torch.Tensor | None,
    output: list[torch.Tensor],
    gradient: torch.Tensor | None,
    config: Any,
) -> torch.Tensor | None:
    """Megatron's backward step; the gradient of `received`, None on the first stage."""
    arguments = {
        "input_tensor": [received],
        "output_tensor": output,
        "output_tensor_grad": [gradient],
        "config": config,
    }
    if "model_type" in _BACKWARD_STEP:
        arguments["model_type"] = get_model_type(chunk)
    (by_input,) = schedules.backward_step(**arguments)
    assert by_input is None or isinstance(by_input, torch.Tensor)
    return by_input


def deallocate(output: torch.Tensor, config: Any) -> None:
    """Leave only the graph of an output that is on its way, if the config says so."""
    schedules.deallocate_output_tensor(output, config.deallocate_pipeline_outputs)


def first_validation(first_val_step: bool | None, forward_only: bool, first: bool) -> bool:
    """Whether a micro-batch counts as the first one (FP8 weights are cast then)."""
    return bool(schedules.check_first_val_step(first_val_step, forward_only, first))


def clear_embedding_buffers(config: Any, chunks: Sequence[torch.nn.Module], last: bool) -> object:
    """Before a step with deferred embedding weight gradients; None without them."""
    return schedules.clear_embedding_activation_buffer(config, list(chunks), last)


def finish_embedding(config: Any, embedding: object, last: bool, tp_group: object) -> None:
    """After the last backward: the deferred weight gradients of the output layer."""
    schedules.finish_embedding_wgrad_compute(config, embedding, last, tp_group)


def finalize(
    config: Any,
    chunks: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None,
    collection: object,
    force_all_reduce: bool,
) -> None:
    """Call the user's ``finalize_model_grads_func`` as this release's schedules do."""
    given: dict[str, object] = {"pg_collection": collection}
    if "force_all_reduce" in _SCHEDULE:  # since 0.16
        given["force_all_reduce"] = force_all_reduce
    config.finalize_model_grads_func(list(chunks), num_tokens, **given)
