"""Weight gradients of Megatron's linear layers apart from input gradients, exactly.

Column- and row-parallel layers (local ones, not Transformer Engine's) get a forward whose backward
hands the weight's matrix product to a `ProductStore`, which computes it at once or later, and adds
it where Megatron's own backward would: through the DDP's hook into ``main_grad``, or to ``.grad``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

Add = Callable[[torch.nn.Parameter, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Linear:
    """What one call of a parallel layer was given."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    fused: bool
    allreduce_dgrad: bool
    sequence_parallel: bool
    tp_group: Any


@dataclass(frozen=True, slots=True)
class _Product:
    """The weight gradient of `linear` to come."""

    linear: _Linear
    rows: torch.Tensor
    gradient: torch.Tensor


class ProductStore:
    """One chunk's weight gradients that are still to be computed, by micro-batch."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._add = _adder(chunk)
        self._held: dict[int, list[_Product]] = {}
        self._open: int | None = None

    @contextmanager
    def deferring(self, microbatch: int) -> Iterator[None]:
        """Within, keep the products of this micro-batch for `compute`."""
        self._open = microbatch
        self._held[microbatch] = []
        try:
            yield
        finally:
            self._open = None

    def take(self, product: _Product) -> None:
        """Called in the backward pass of a layer."""
        if self._open is None:
            self._compute(product)
        else:
            self._held[self._open].append(product)

    def compute(self, microbatch: int) -> None:
        """Compute and forget what was kept of this micro-batch."""
        for product in self._held.pop(microbatch):
            self._compute(product)

    @torch.no_grad()
    def _compute(self, product: _Product) -> None:
        linear = product.linear
        total = _gathered(product.rows, linear)
        gradient, rows = layers.prepare_input_tensors_for_wgrad_compute(product.gradient, total)
        if linear.fused:
            self._add(linear.weight, _fused_product(linear.weight, gradient, rows))
        else:
            self._add(linear.weight, gradient.t().matmul(rows))
        if linear.bias is not None:
            self._add(linear.bias, gradient.sum(dim=0))


@contextmanager
def split_linears(chunk: torch.nn.Module, store: ProductStore) -> Iterator[int]:
    """Within, parallel linear layers of `chunk` leave their weight gradients to `store`.

    Yields the number of layers.
    """
    split = splittable(chunk)
    for module in split:
        module._forward_impl = _split_forward(store)
    try:
        yield len(split)
    finally:
        for module in split:
            del module._forward_impl


def splittable(chunk: torch.nn.Module) -> list[Any]:
    """The layers of `chunk` whose weight gradients can be split off."""
    kinds = (layers.ColumnParallelLinear, layers.RowParallelLinear)
    return [module for module in chunk.modules() if isinstance(module, kinds)]


def _split_forward(store: ProductStore) -> Callable[..., torch.Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # outputs need a gradient, whatever the input

    def forward(
        input: torch.Tensor,
        weight: torch.nn.Parameter,
        bias: torch.nn.Parameter | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        linear = _Linear(
            weight,
            bias,
            gradient_accumulation_fusion,
            allreduce_dgrad,
            sequence_parallel,
            layers.get_tensor_model_parallel_group_if_none(tp_group),
        )
        if not weight.requires_grad or not torch.is_grad_enabled():
            return _output(input, linear)
        out: torch.Tensor = _SplitLinear.apply(  # type: ignore[no-untyped-call]
            input, anchor, linear, store
        )
        return out

    return forward


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, anchor: torch.Tensor, linear: _Linear, store: ProductStore
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.linear, ctx.store = linear, store
        return _output(rows, linear)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (rows,) = ctx.saved_tensors
        linear: _Linear = ctx.linear
        by_rows = gradient.matmul(linear.weight)
        work = None
        if linear.allreduce_dgrad:
            work = torch.distributed.all_reduce(by_rows, group=linear.tp_group, async_op=True)
        if linear.sequence_parallel:
            whole, by_rows = by_rows, torch.empty_like(rows)
            work = layers.dist_reduce_scatter_func(
                by_rows, whole, group=linear.tp_group, async_op=True
            )
        ctx.store.take(_Product(linear, rows.detach(), gradient))
        if work is not None:
            work.wait()
        return by_rows if ctx.needs_input_grad[0] else None, None, None, None


def _output(rows: torch.Tensor, linear: _Linear) -> torch.Tensor:
    output = torch.matmul(_gathered(rows, linear), linear.weight.t())
    return output if linear.bias is None else output + linear.bias


def _gathered(rows: torch.Tensor, linear: _Linear) -> torch.Tensor:
    """All rows where each rank of the tensor-parallel group holds a part of the sequence."""
    if not linear.sequence_parallel:
        return rows
    length, *rest = rows.shape
    total = torch.empty(
        (length * linear.tp_group.size(), *rest), dtype=rows.dtype, device=rows.device
    )
    layers.dist_all_gather_func(total, rows.contiguous(), group=linear.tp_group)
    return total


def _fused_product(weight: Any, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Add to ``main_grad`` in the product's own kernel (CUDA); returns what stands for it."""
    kernels = layers.fused_weight_gradient_mlp_cuda
    if weight.main_grad.dtype == torch.float32:
        kernels.wgrad_gemm_accum_fp32(rows, gradient, weight.main_grad)
    else:
        kernels.wgrad_gemm_accum_fp16(rows, gradient, weight.main_grad)
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):  # the DDP adds it all the same: tied embeddings
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _adder(chunk: torch.nn.Module) -> Add:
    """What a finished gradient is given to: Megatron's DDP hook, or ``.grad``."""
    module: Any = chunk
    while module is not None and not hasattr(module, "_make_backward_post_hook"):
        module = getattr(module, "module", None)
    if module is None:
        return _add_to_grad
    hooks: dict[torch.nn.Parameter, Callable[[], None]] = {}

    def add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        if parameter not in hooks:
            hooks[parameter] = module._make_backward_post_hook(parameter)
        parameter.grad = gradient
        hooks[parameter]()

    return add


def _add_to_grad(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
