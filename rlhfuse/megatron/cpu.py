"""Megatron on a machine without a GPU: for tests and trials, with gloo."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as tp_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    """Megatron asks for ``device="cuda"`` in places: on this machine that is the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.Float", "torch.cuda.Float")
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within, in this process, what Megatron hard-codes for CUDA happens on the CPU.

    The names that are rebound stay so: Megatron objects made within live on. Only the torch
    function mode, which costs a little per call, belongs to the block (and the thread).
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    if not hasattr(WrappedTorchNorm.__new__, "of_a_part"):
        WrappedTorchNorm.__new__ = _norm_of_a_part(WrappedTorchNorm.__new__)
    moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine is missing
    tp_random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    tp_random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)  # recomputation asks for it
    tp_random._set_cuda_rng_state = lambda *_, **__: None
    with CpuForCuda():
        yield


def _norm_of_a_part(plain: Any) -> Any:
    """Megatron's local norm refuses sequence parallelism, though rows are independent."""

    def make(cls: Any, config: Any, *sizes: Any, **named: Any) -> Any:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = plain(cls, whole, *sizes, **named)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    make.of_a_part = True  # type: ignore[attr-defined]  # not twice
    return make
