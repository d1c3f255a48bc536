"""The arguments of one forward-backward call, as Megatron's callers give them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from rlhfuse.megatron import stock


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Keyword arguments of Megatron's forward-backward function, under their own names."""

    forward_step_func: Callable[..., Any]
    data_iterator: Any
    model: Any
    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    decoder_seq_length: int | None = None
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None
    p2p_communicator: Any = None
    pg_collection: Any = None
    force_all_reduce: bool = False
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of releases that this one has not seen."""

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "Call":
        """A call from keyword arguments; what this class does not know goes to `unknown`."""
        names = {item.name for item in fields(cls)} - {"unknown"}
        known = {name: value for name, value in arguments.items() if name in names}
        rest = {name: value for name, value in arguments.items() if name not in names}
        return cls(**known, unknown=rest)

    def arguments(self) -> dict[str, Any]:
        """What Megatron's own schedule is called with: only what differs from the defaults."""
        given = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name != "unknown"
            and (item.name in _ALWAYS or getattr(self, item.name) != item.default)
        }
        return {**given, **self.unknown}

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """The model's chunks on this rank, one without virtual pipeline stages."""
        return list(self.model) if isinstance(self.model, list) else [self.model]

    @property
    def data_iterators(self) -> list[Any]:
        """One iterator for each chunk."""
        chunks = len(self.chunks)
        if isinstance(self.data_iterator, list):
            if len(self.data_iterator) != chunks:
                raise ValueError(
                    f"data_iterator holds {len(self.data_iterator)} iterators for {chunks} model "
                    "chunks; give one for each"
                )
            return list(self.data_iterator)
        return [self.data_iterator] * chunks

    @property
    def config(self) -> Any:
        """The Megatron config of the model."""
        return stock.config_of(self.chunks[0])

    @property
    def device(self) -> torch.device:
        """Where the model is, and its messages."""
        return next(self.chunks[0].parameters()).device


_ALWAYS = (
    "forward_step_func",
    "data_iterator",
    "model",
    "num_microbatches",
    "seq_length",
    "micro_batch_size",
    "forward_only",
)
