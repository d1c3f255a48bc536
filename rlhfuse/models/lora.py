"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a stage, through peft."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from rlhfuse.models.dropout import RowDropout, Rows
from rlhfuse.models.stage import SCORE, ModelStage

DECODER_LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
_BASE = ".base_layer."
_ADAPTER = "default"


def add_adapters(
    stage: ModelStage,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    seed: int,
    dropout: float = 0.0,
    rows: Rows | None = None,
) -> None:
    """Freeze the stage but for a scalar head, and give each linear layer of `targets` (all of the
    decoder's where empty) an adapter whose effect is zero to begin with.

    The start depends on `seed` and the layer's name alone, not on how the model is cut. `dropout`:
    of what an adapter reads, by the keys of `rows`.

    Raises:
        ValueError: peft is not installed, or no layer has one of these names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank: needs the package peft: pip install peft") from error

    wanted = list(targets or DECODER_LINEARS)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, lora_dropout=0.0)
    like = next(stage.parameters())
    try:
        inject_adapter_in_model(config, stage, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ValueError(f"target_modules: {', '.join(wanted)}: {error}") from error
    for name in [name for name, _ in stage.named_modules()]:
        if dropout and name.endswith(".lora_dropout"):
            assert rows is not None, "dropout needs the keys of rows"
            stage.set_submodule(f"{name}.{_ADAPTER}", RowDropout(dropout, name, rows))
    for name, parameter in stage.named_parameters():
        if ".lora_A." in name:
            parameter.data = _start(name, parameter.shape, seed).to(like)
        elif ".lora_B." in name:
            parameter.data = torch.zeros(parameter.shape).to(like)
        elif name == SCORE:
            parameter.requires_grad_(True)


@torch.no_grad()
def merged_weights(stage: ModelStage) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every weight of the stage, with adapters added to the layers
    that have some; without any, the parameters themselves."""
    modules = dict(stage.named_modules())
    for name, parameter in stage.named_hf_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(f"{_BASE}weight"):
            layer = modules[name.removesuffix(f"{_BASE}weight")]
            delta = layer.get_delta_weight(_ADAPTER)
            yield name.replace(_BASE, "."), parameter + delta.to(parameter.dtype)
        else:
            yield name.replace(_BASE, "."), parameter.detach()


def _start(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Uniform, as `nn.Linear` starts."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
