"""Autocast, and matrix products of half-precision factors whose results stay in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of a head in autocast's type where autocast is on (float64 stays).

    Only they are narrowed, as by autocast's own matrix product; logits never are.
    """
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    given = [hidden, weight] if bias is None else [hidden, weight, bias]
    cast: Sequence[Tensor] = [
        part if part.dtype == torch.float64 else part.to(dtype) for part in given
    ]
    return cast[0], cast[1], cast[2] if len(cast) > 2 else None


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which no product is narrowed, whoever calls."""
    return torch.autocast(tensor.device.type, enabled=False)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, in float32 whatever the factors are."""
    if _tensor_cores(left):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product_(into: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """into += left @ right, in float32 whatever the factors are."""
    if _tensor_cores(left):
        return torch.addmm(into, left, right, out_dtype=torch.float32, out=into)
    return into.addmm_(left.float(), right.float())


def _tensor_cores(factor: Tensor) -> bool:
    return factor.device.type == "cuda" and factor.dtype in (torch.float16, torch.bfloat16)
