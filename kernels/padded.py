"""GAE and discounted returns of padded rows [B, L] with a mask.

Tokens outside the mask are skipped, wherever they lie: the token after a kept one is the next kept
one (a tool's output inside a response takes no part). Triton: one launch, and one more to whiten by
the statistics that the first leaves. Elsewhere the kept tokens are packed first.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlhfuse.kernels import gae as packed
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.reference import Gae, Shaping, accumulation_dtype


def gae_padded(
    rewards: Tensor | Shaping,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    whitened: bool = False,
) -> Gae:
    """GAE of padded rows; results outside the mask are 0.

    Args:
        rewards: [B, L], or what they are made of (scores [B], at each row's last kept token, and
            log-probabilities [B, L]); the result's are 0 outside the mask only in that case.
        values, mask: [B, L].
        bootstrap: [B], the value after a row's last kept token; None means 0 (it ended).
        whitened: whiten the advantages over all kept tokens; returns come from unwhitened ones.

    Raises:
        ValueError: shapes that do not fit together.
    """
    given = rewards.logprobs if isinstance(rewards, Shaping) else rewards
    if given.dim() != 2 or given.shape != values.shape or given.shape != mask.shape:
        raise ValueError(
            f"rewards, values and mask must all be [B, L], not {tuple(given.shape)}, "
            f"{tuple(values.shape)} and {tuple(mask.shape)}"
        )
    per_row = {"bootstrap": bootstrap}
    if isinstance(rewards, Shaping):
        per_row["scores"] = rewards.scores
        if rewards.ref_logprobs.shape != given.shape:
            raise ValueError(
                f"ref_logprobs must be {tuple(given.shape)}, not "
                f"{tuple(rewards.ref_logprobs.shape)}"
            )
    for name, numbers in per_row.items():
        if numbers is not None and numbers.shape != given.shape[:1]:
            raise ValueError(
                f"{name} must be one per row ({given.shape[0]},), not {tuple(numbers.shape)}"
            )
    run = padded_op if torch.compiler.is_compiling() else _padded
    if isinstance(rewards, Shaping):
        made_of = (rewards.logprobs, rewards.ref_logprobs, rewards.scores)
        settings = (rewards.coefficient, rewards.estimator)
        return Gae(*run(*made_of, *settings, values, mask, bootstrap, gamma, lam, whitened))
    advantages, returns, _ = run(
        rewards, None, None, 0.0, "k1", values, mask, bootstrap, gamma, lam, whitened
    )
    return Gae(advantages, returns, rewards)


def discounted_returns_padded(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1} over the kept tokens of each row, [B, L]; 0 elsewhere.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if rewards.dim() != 2 or rewards.shape != mask.shape:
        raise ValueError(
            f"rewards and mask must both be [B, L], not {tuple(rewards.shape)} and "
            f"{tuple(mask.shape)}"
        )
    run = padded_op if torch.compiler.is_compiling() else _padded
    plain = (rewards, None, None, 0.0, "k1", None, mask, None, gamma, 1.0, False)
    returns: Tensor = run(*plain)[0]
    return returns


@torch.no_grad()
def _padded(
    rewards: Tensor,
    ref_logprobs: Tensor | None,
    scores: Tensor | None,
    coefficient: float,
    estimator: str,
    values: Tensor | None,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns and (where they are made here, else nothing) rewards [B, L]; without
    values discounted returns and nothing else. With scores, `rewards` are the log-probabilities
    that make them up (`Shaping`)."""
    given: Tensor | Shaping = rewards
    if scores is not None and ref_logprobs is not None:
        given = Shaping(scores, rewards, ref_logprobs, coefficient, estimator)
    kept, nothing = mask.bool(), rewards.new_empty(0, dtype=accumulation_dtype(rewards))
    if accumulation_dtype(rewards) != torch.float32 or choose(rewards.device) is not Path.TRITON:
        return _packed(given, values, kept, bootstrap, gamma, lam, whitened)
    from rlhfuse.kernels import triton_gae_padded, triton_whiten  # triton is optional

    found = triton_gae_padded.scan_padded(
        given, values, bootstrap, kept, gamma=gamma, decay=gamma * lam
    )
    white = found.advantages
    if whitened:
        white = triton_whiten.whiten(white, found.moments, mask=kept)[0]
    returns = torch.empty_like(nothing) if values is None else found.returns
    return white, returns, nothing if scores is None else found.rewards


def _packed(
    rewards: Tensor | Shaping,
    values: Tensor | None,
    kept: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    if values is None:
        assert isinstance(rewards, Tensor)
        returns = packed.discounted_returns(rewards[kept], cu_seqlens, gamma=gamma)
        return _spread(returns, kept), returns[:0].clone(), returns[:0].clone()
    given: Tensor | Shaping
    if isinstance(rewards, Shaping):
        logprobs, ref_logprobs = rewards.logprobs[kept], rewards.ref_logprobs[kept]
        given = replace(rewards, logprobs=logprobs, ref_logprobs=ref_logprobs)
    else:
        given = rewards[kept]
    estimate = packed.whitened_gae if whitened else packed.gae
    found = estimate(given, values[kept], cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    advantages, returns = _spread(found.advantages, kept), _spread(found.returns, kept)
    made = _spread(found.rewards, kept) if isinstance(rewards, Shaping) else advantages.new_empty(0)
    return advantages, returns, made


def _spread(numbers: Tensor, kept: Tensor) -> Tensor:
    """Packed numbers in their places, 0 elsewhere."""
    places = numbers.new_zeros(kept.shape)
    places[kept] = numbers
    return places


padded_op = torch.library.custom_op("rlhfuse::gae_padded", _padded, mutates_args=())


@padded_op.register_fake
def _(
    rewards: Tensor,
    ref_logprobs: Tensor | None,
    scores: Tensor | None,
    coefficient: float,
    estimator: str,
    values: Tensor | None,
    mask: Tensor,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    whitened: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(rewards)
    full, nothing = rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(0, dtype=dtype)
    returns = nothing.clone() if values is None else full.clone()
    return full, returns, nothing.clone() if scores is None else full.clone()
