"""Layers that keep their weight gradients back themselves: ``delay_wgrad_compute``.

Transformer Engine's layers (2.3 and later) know no other way to split a backward pass. Built with
``config.delay_wgrad_compute``, each of their backward passes leaves its weight gradient in a store
of the layer's own, first in, first out; `backward_dw` computes the oldest one, adds it to
``main_grad`` and tells the DDP. Megatron itself calls it in one schedule only, that of
``overlap_moe_expert_parallel_comm``, and demands that flag together with the other when a
TransformerConfig is made: for our schedules set ``config.delay_wgrad_compute = True`` afterwards,
before the model is built.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import layers

_LOCAL = (layers.ColumnParallelLinear, layers.RowParallelLinear)
"""Megatron's own have a `backward_dw` that does nothing: `split` splits them."""


def delaying(chunk: torch.nn.Module, config: Any) -> list[Any]:
    """The layers of `chunk` that keep back their weight gradients, in forward order."""
    if not getattr(config, "delay_wgrad_compute", False):
        return []
    able = [module for module in chunk.modules() if hasattr(module, "backward_dw")]
    # Attention, MLP and layers have one, too, which calls those of the layers inside.
    return [
        module
        for module in able
        if not isinstance(module, _LOCAL)
        and any(parameter.requires_grad for parameter in module.parameters())
        and not any(other is not module and other in able for other in module.modules())
    ]


class DelayedLayers:
    """The delaying layers of one chunk, for one run."""

    def __init__(self, chunk: torch.nn.Module, config: Any) -> None:
        """Raises:
        ValueError: Megatron's DDP would never see these layers' gradients.
        """
        self._layers = delaying(chunk, config)
        if self._layers and not _ddp_knows(chunk):
            raise ValueError(
                "delay_wgrad_compute=True in the model's config, but its DDP waits for gradients "
                "in the backward pass; make it with "
                "DistributedDataParallelConfig(delay_wgrad_compute=True)"
            )

    @torch.no_grad()
    def compute(self) -> None:
        """The oldest micro-batch's weight gradients, from the last layer to the first."""
        for layer in reversed(self._layers):
            layer.backward_dw()


def refuse_stock_schedule(config: Any, forward_only: bool) -> None:
    """Where a call is about to run on Megatron's schedule.

    Raises:
        ValueError: that schedule would leave out the weight gradients.
    """
    delayed = getattr(config, "delay_wgrad_compute", False)
    combined = getattr(config, "overlap_moe_expert_parallel_comm", False)
    if delayed and not combined and not forward_only:
        raise ValueError(
            "delay_wgrad_compute=True: Megatron's own schedule, which this call would run on, "
            "never computes these weight gradients without overlap_moe_expert_parallel_comm; set "
            "delay_wgrad_compute to False"
        )


def _ddp_knows(chunk: torch.nn.Module) -> bool:
    module: Any = chunk
    while module is not None and not hasattr(module, "ddp_config"):
        module = getattr(module, "module", None)
    return module is not None and bool(getattr(module.ddp_config, "delay_wgrad_compute", False))
