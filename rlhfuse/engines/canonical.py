"""How near ties are decided: the whole prefix, alone, in float64. All engines share this."""

import logging

import torch
from torch import nn
from torch.func import functional_call

from rlhfuse.engines.base import SamplingParams, TokenIds
from rlhfuse.engines.sampling import NEAR_TIE, RowParams, draw, forbid_early_stop, penalise
from rlhfuse.models.attention import PackedAttention
from rlhfuse.models.packed import pack
from rlhfuse.models.stage import ModelStage

log = logging.getLogger(__name__)

ALARM = NEAR_TIE / 4


@torch.inference_mode()
def canonical_logits(stage: ModelStage, prefix: TokenIds) -> torch.Tensor:
    """Logits float64 [V] of the token after `prefix`, by a whole language model (one stage).

    Weights are raised to float64 one layer at a time, so no full copy is ever held. A function of
    the prefix and the weights alone: the prefix never shares a batch.
    """
    assert stage.first
    assert stage.last
    device = stage.lm_head_weight().device
    batch = pack([prefix], device)
    hidden = stage.embed(batch.token_ids).double()[None]
    positions = stage.rotary(hidden.float(), batch.position_ids[None])  # as the model has them
    attend = PackedAttention(batch.lengths, batch.cu_seqlens)
    rotations = tuple(part.double() for part in positions)
    for layer in stage.decoder_layers():
        inputs = {"position_embeddings": rotations, "attend": attend}
        hidden = functional_call(layer, _in_float64(layer), (hidden,), inputs)
    norm = stage.model.get_submodule("norm")
    last: torch.Tensor = functional_call(
        norm, _in_float64(norm), (hidden[0, batch.num_tokens - 1],)
    )
    return torch.mv(stage.lm_head_weight().double(), last)


def _in_float64(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.double() for name, parameter in module.named_parameters()}


@torch.inference_mode()
def decide(
    stage: ModelStage,
    prefix: TokenIds,
    seen: torch.Tensor,
    *,
    seed: int,
    params: SamplingParams,
    response_tokens: int,
) -> tuple[int, float]:
    """The token after `prefix`, and its log-probability, where a batch's own logits `seen` [V]
    were too close to call. Warns where `seen` is further off than the bound allows for."""
    logits = canonical_logits(stage, prefix)[None]
    forbid_early_stop(logits, [params], [response_tokens])
    if params.penalises:
        penalise(logits[0], params, prefix, len(prefix) - response_tokens)
    difference = (logits[0] - seen.double()).nan_to_num_(0.0)  # -inf on both sides
    noise = float(difference.abs().max())
    if noise > ALARM:
        log.warning(
            "logits are off by %.1e from float64, where %.1e is allowed for: tokens may depend "
            "on the batch (position %d)",
            noise,
            NEAR_TIE,
            len(prefix),
        )
    rows = RowParams.of([seed], [params], vocab_size=logits.shape[1], device=logits.device)
    position = torch.tensor([len(prefix)], device=logits.device)
    drawn = draw(logits, position, rows, near_tie=0.0)
    return int(drawn.tokens[0]), float(drawn.logprobs[0])
