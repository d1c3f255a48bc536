"""A value model: Megatron's GPT with one number per token in place of the vocabulary."""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model


class ValueHead(torch.nn.Linear):
    """Stands in for a GPT's output layer: hidden states [s, b, h] to values [s, b, 1], float32.

    Every tensor-parallel rank holds the whole head.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        self._gathers = bool(config.sequence_parallel)
        if self._gathers:
            self.weight.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron sums it
        with torch.no_grad():
            self.weight.normal_(std=config.init_method_std)

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """As Megatron's output layer: (output, bias)."""
        values = super().forward(input_).float()
        if self._gathers:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def make_value_model(model: torch.nn.Module) -> torch.nn.Module:
    """Give a GPT model (not wrapped in DDP yet) a value head, if this rank has its last stage.

    Raises:
        ValueError: embeddings are tied to the output layer, which a value model has not.
    """
    if get_attr_wrapped_model(model, "share_embeddings_and_output_weights"):
        raise ValueError(
            "share_embeddings_and_output_weights=True: a value model has no output layer to tie; "
            "build it with False"
        )
    if get_attr_wrapped_model(model, "post_process"):
        owner: Any = get_attr_wrapped_model(model, "post_process", return_model_obj=True)
        owner.output_layer = ValueHead(owner.config)
    return model
