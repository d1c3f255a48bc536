"""How our attention gets inside Hugging Face's layers: one registered function, any `Attend`.

Hugging Face's attention modules project, rotate, and then call the attention function that their
config names, passing on extra arguments. Ours passes on an `Attend`, so that one set of layers
serves training and scoring (`PackedAttention`) and generation (the engine's key-value cache).
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

ATTENTION_NAME = "rlhfuse"


class Attend(Protocol):
    """Attention of one layer over `rows` rows of one packed forward pass."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """query [1, heads, rows, d], key and value [1, kv_heads, rows, d], rotated already;
        `layer` counts from the model's first. Returns [1, rows, heads, d]."""


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers. Harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    **_unused: object,  # dropout, sliding_window, ...: refused when the model was loaded
) -> tuple[torch.Tensor, None]:
    layer = module.layer_idx
    assert isinstance(layer, int)
    assert attention_mask is None
    return attend(layer, query, key, value, scaling), None


class PackedAttention:
    """Causal attention of each sample of a `PackedBatch` over itself.

    In float32, and on a CPU, each sample is computed by itself at its own length, so that its
    bits do not depend on its company; in half precision on CUDA one variable-length kernel does
    all samples. Rows behind the last sample (dummy rows) come out as zeros.
    """

    def __init__(
        self, lengths: tuple[int, ...], cu_seqlens: torch.Tensor, *, rectangular: bool = False
    ) -> None:
        """`rectangular`: all lengths are equal, and one call may take the samples together."""
        self._lengths = lengths
        self._cu_seqlens = cu_seqlens
        self._rectangular = rectangular

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        if self._rectangular:
            return self._together(query, key, value, scaling)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(query, key, value, scaling)
        return self._per_sample(query, key, value, scaling)

    def _per_sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        dummy_rows = query.shape[2] - sum(self._lengths)
        spans = [*self._lengths, dummy_rows]
        parts = [torch.split(rows, spans, 2) for rows in (query, key, value)]
        outputs = [
            functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
            for q, k, v in zip(*(part[:-1] for part in parts), strict=True)
        ]
        if dummy_rows:
            outputs.append(torch.zeros_like(parts[0][-1]).transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def _together(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        samples, length = len(self._lengths), self._lengths[0]
        q, k, v = (
            rows[0, :, : samples * length].unflatten(1, (samples, length)).transpose(0, 1)
            for rows in (query, key, value)
        )
        output = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        rows = output.transpose(1, 2).flatten(0, 1)
        return functional.pad(rows, (0, 0, 0, 0, 0, query.shape[2] - samples * length))[None]

    def _varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        tokens, longest = sum(self._lengths), max(self._lengths)
        q, k, v = (rows[0, :, :tokens].transpose(0, 1).contiguous() for rows in (query, key, value))
        cu, causal = self._cu_seqlens, (-1, 0)
        output = varlen_attn(
            q, k, v, cu, cu, longest, longest, scale=scaling, window_size=causal, enable_gqa=True
        )
        assert isinstance(output, torch.Tensor)
        return functional.pad(output, (0, 0, 0, 0, 0, query.shape[2] - tokens))[None]
