"""Hugging Face weights of Llama, Qwen2 and Qwen3 in Megatron's layout, in and out.

Megatron stores queries, keys and values of one layer as one matrix, group by group (a group: the
query heads that share a key head, then that key head, then its value head), and the MLP's gate and
up projections as one, each cut over tensor-parallel ranks by rows; output projections are cut by
columns; embeddings and the output layer by vocabulary rows, padded to equal parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the layout of one model depends on."""

    heads: int
    groups: int
    head_size: int
    tp_size: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    parameter: torch.nn.Parameter
    names: tuple[str, ...]
    join: Callable[[Sequence[torch.Tensor], _Shape], torch.Tensor]
    """Whole tensors of Hugging Face to the whole of Megatron's, tensor-parallel parts in order."""
    part: Callable[[torch.Tensor, _Shape], list[torch.Tensor]]
    """The whole of Megatron's to Hugging Face's."""
    dim: int | None
    """The dimension cut over tensor-parallel ranks; None where each holds all."""


def load_hf(chunk: torch.nn.Module, tensors: Tensors, tp_group: dist.ProcessGroup) -> None:
    """Copy this rank's part of a Hugging Face model into a GPT model chunk.

    Raises:
        ValueError: a tensor is missing or has the wrong shape for this model.
    """
    shape = _shape(chunk, tp_group)
    for entry in _entries(chunk):
        missing = [name for name in entry.names if name not in tensors]
        if missing:
            raise ValueError(f"the Hugging Face weights lack {', '.join(missing)}")
        whole = entry.join([tensors[name] for name in entry.names], shape)
        mine = _cut(whole, entry, shape)
        if mine.shape != entry.parameter.shape:
            raise ValueError(
                f"{entry.names[0]} gives a part of shape {tuple(mine.shape)}, the Megatron model "
                f"has {tuple(entry.parameter.shape)}; do the two configurations agree?"
            )
        with torch.no_grad():
            entry.parameter.copy_(mine)


def hf_tensors(
    chunk: torch.nn.Module, tp_group: dist.ProcessGroup, *, vocab_size: int | None = None
) -> dict[str, torch.Tensor]:
    """This chunk's layers under Hugging Face's names, whole. Collective over `tp_group`.

    `vocab_size`: without the padding rows that Megatron may have added.
    """
    shape = _shape(chunk, tp_group)
    found = {}
    for entry in _entries(chunk):
        whole = entry.parameter.detach()
        if entry.dim is not None and shape.tp_size > 1:
            parts = [torch.empty_like(whole) for _ in range(shape.tp_size)]
            dist.all_gather(parts, whole.contiguous(), group=tp_group)
            whole = torch.cat(parts, entry.dim)
        for name, tensor in zip(entry.names, entry.part(whole, shape), strict=True):
            vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            found[name] = tensor[:vocab_size].clone() if vocabulary else tensor.clone()
    return found


def _cut(whole: torch.Tensor, entry: _Entry, shape: _Shape) -> torch.Tensor:
    if entry.dim is None:
        return whole
    rows = entry.parameter.shape[entry.dim] * shape.tp_size
    if entry.dim == 0 and entry.join is _one and rows > whole.shape[0]:  # a padded vocabulary
        pad = whole.new_zeros(rows - whole.shape[0], *whole.shape[1:])
        whole = torch.cat([whole, pad])
    return whole.chunk(shape.tp_size, entry.dim)[shape.tp_rank]


def _shape(chunk: torch.nn.Module, tp_group: dist.ProcessGroup) -> _Shape:
    config: Any = get_attr_wrapped_model(chunk, "config")
    groups = config.num_query_groups or config.num_attention_heads
    return _Shape(
        config.num_attention_heads,
        groups,
        config.kv_channels,
        tp_group.size(),
        tp_group.rank(),
    )


def _entries(chunk: torch.nn.Module) -> Iterator[_Entry]:
    """Every parameter of the chunk with its Hugging Face names."""
    model: Any = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
    if model.pre_process:
        yield _vocabulary(model.embedding.word_embeddings.weight, "model.embed_tokens.weight")
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        yield from _attention(layer, prefix)
        yield from _mlp(layer, prefix)
    if model.post_process:
        yield _whole(model.decoder.final_layernorm.weight, "model.norm.weight")
        tied = model.share_embeddings_and_output_weights
        if tied and not model.pre_process:
            yield _vocabulary(model.output_layer.weight, "model.embed_tokens.weight")
        elif not tied and hasattr(model.output_layer, "output_size_per_partition"):
            yield _vocabulary(model.output_layer.weight, "lm_head.weight")
        elif not tied:  # a value head
            yield _whole(model.output_layer.weight, "score.weight")


def _attention(layer: Any, prefix: str) -> Iterator[_Entry]:
    attention = layer.self_attention
    norm = getattr(attention.linear_qkv, "layer_norm_weight", None)  # Transformer Engine's layer
    yield _whole(
        layer.input_layernorm.weight if norm is None else norm, f"{prefix}.input_layernorm.weight"
    )
    for kind in ("weight", "bias"):
        parameter = getattr(attention.linear_qkv, kind, None)
        if isinstance(parameter, torch.nn.Parameter):
            names = tuple(f"{prefix}.self_attn.{p}_proj.{kind}" for p in "qkv")
            yield _Entry(parameter, names, _join_qkv, _part_qkv, 0)
    for which in "qk":
        head_norm = getattr(attention, f"{which}_layernorm", None)
        if head_norm is not None and hasattr(head_norm, "weight"):
            yield _whole(head_norm.weight, f"{prefix}.self_attn.{which}_norm.weight")
    yield _Entry(
        attention.linear_proj.weight, (f"{prefix}.self_attn.o_proj.weight",), _one, _as_one, 1
    )


def _mlp(layer: Any, prefix: str) -> Iterator[_Entry]:
    norm = getattr(layer.mlp.linear_fc1, "layer_norm_weight", None)
    yield _whole(
        layer.pre_mlp_layernorm.weight if norm is None else norm,
        f"{prefix}.post_attention_layernorm.weight",
    )
    names = (f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight")
    yield _Entry(layer.mlp.linear_fc1.weight, names, _join_gate, _part_gate, 0)
    yield _Entry(layer.mlp.linear_fc2.weight, (f"{prefix}.mlp.down_proj.weight",), _one, _as_one, 1)


def _whole(parameter: torch.nn.Parameter, name: str) -> _Entry:
    return _Entry(parameter, (name,), _one, _as_one, None)


def _vocabulary(parameter: torch.nn.Parameter, name: str) -> _Entry:
    return _Entry(parameter, (name,), _one, _as_one, 0)


def _one(tensors: Sequence[torch.Tensor], shape: _Shape) -> torch.Tensor:
    return tensors[0]


def _as_one(tensor: torch.Tensor, shape: _Shape) -> list[torch.Tensor]:
    return [tensor]


def _join_qkv(tensors: Sequence[torch.Tensor], shape: _Shape) -> torch.Tensor:
    rest = tensors[0].shape[1:]
    grouped = [t.reshape(shape.groups, -1, shape.head_size, *rest) for t in tensors]
    return torch.cat(grouped, 1).reshape(-1, *rest)


def _part_qkv(tensor: torch.Tensor, shape: _Shape) -> list[torch.Tensor]:
    rest, queries = tensor.shape[1:], shape.heads // shape.groups
    grouped = tensor.reshape(shape.groups, queries + 2, shape.head_size, *rest)
    return [part.reshape(-1, *rest) for part in grouped.split([queries, 1, 1], 1)]


def _join_gate(tensors: Sequence[torch.Tensor], shape: _Shape) -> torch.Tensor:
    """Each rank's part holds its rows of the gate, then its rows of the up projection."""
    cut = [tensor.chunk(shape.tp_size) for tensor in tensors]
    return torch.cat([part for rank in zip(*cut, strict=True) for part in rank])


def _part_gate(tensor: torch.Tensor, shape: _Shape) -> list[torch.Tensor]:
    parts = tensor.chunk(2 * shape.tp_size)
    return [torch.cat(parts[0::2]), torch.cat(parts[1::2])]
