"""PPO's losses in the form that Megatron's ``forward_step_func`` returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhfuse.algorithms.losses import PolicyInputs, PolicyLossSettings, policy_loss, value_loss
from rlhfuse.algorithms.tally import Stats
from rlhfuse.megatron.logprobs import vocab_parallel_logprob

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, Stats]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoBatch:
    """One micro-batch of B samples, padded to S tokens.

    `response` marks response tokens [B, S], never a row's first; the other fields are [B, S] too
    and read there only. Leave `response` on the CPU: elsewhere the host waits for the device, to
    learn how many they are.
    """

    tokens: torch.Tensor
    response: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    old_values: torch.Tensor
    returns: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Ends of the samples' responses, packed: int32 [B + 1]."""
        counts = self.response.sum(-1, dtype=torch.int32)
        return self._there(torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)))

    @property
    def places(self) -> torch.Tensor:
        """Where the response tokens are in [B * S], sample after sample: int64 [T]."""
        return self._there(self.response.flatten().nonzero()[:, 0])

    def _there(self, counted: torch.Tensor) -> torch.Tensor:
        return counted.to(self.tokens.device, non_blocking=True)


def actor_loss_func(
    batch: PpoBatch,
    settings: PolicyLossSettings,
    *,
    normalizer: float,
    num_microbatches: int,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
) -> LossFunction:
    """The policy loss of logits [B, S, V / tp].

    `normalizer`: response tokens (or samples) of this data-parallel rank's mini-batch: Megatron
    averages over data-parallel ranks. `num_microbatches` undoes Megatron's division by it.
    """

    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, Stats]:
        places = batch.places
        logprobs = vocab_parallel_logprob(
            logits.flatten(0, 1)[places - 1],  # said one token earlier
            batch.tokens.flatten()[places],
            tp_group,
            temperature=temperature,
        )
        inputs = PolicyInputs(
            logprobs=logprobs,
            old_logprobs=batch.old_logprobs.flatten()[places],
            advantages=batch.advantages.flatten()[places],
            cu_seqlens=batch.cu_seqlens,
        )
        found = policy_loss(inputs, settings, normalizer=normalizer)
        return found.loss * num_microbatches, found.stats

    return loss


def critic_loss_func(
    batch: PpoBatch, *, clip: float | None, normalizer: float, num_microbatches: int
) -> LossFunction:
    """The value loss of values [B, S, 1]; numbers as `actor_loss_func`."""

    def loss(values: torch.Tensor) -> tuple[torch.Tensor, Stats]:
        places = batch.places
        found = value_loss(
            values.flatten()[places - 1],
            batch.old_values.flatten()[places],
            batch.returns.flatten()[places],
            batch.cu_seqlens,
            clip=clip,
            normalizer=normalizer,
        )
        return found.loss * num_microbatches, found.stats

    return loss
