"""The loss fused with the head equals head and loss apart, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhfuse.algorithms.losses import (
    PolicyInputs,
    PolicyLossSettings,
    linear_policy_loss,
    policy_loss,
)
from rlhfuse.algorithms.tally import named
from rlhfuse.kernels import linear_logprob as linear_module
from rlhfuse.kernels.linear_logprob import linear_logprob

SETTINGS = [
    PolicyLossSettings(),
    PolicyLossSettings(aggregation="seq-mean-token-mean", clip_high=0.3, dual_clip=1.5),
    PolicyLossSettings(entropy_coef=0.02, kl_coef=0.1, kl_estimator="k3"),
    PolicyLossSettings(aggregation="seq-mean-token-sum-norm", fixed_length=900),
    PolicyLossSettings(kl_coef=0.1, kl_estimator="k1", kl_gradient_k2=True),
    PolicyLossSettings(ratio_level="sequence", aggregation="seq-mean-token-mean", kl_coef=0.1),
]


@pytest.fixture(autouse=True)
def chunks_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred tokens are several chunks."""
    monkeypatch.setattr(linear_module, "_MAX_ROWS", 512)


def case(num_tokens: int) -> tuple[list[Tensor], Tensor, PolicyInputs]:
    rng = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 24), (517, 24), (517,))
    tensors = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    labels = torch.randint(0, 517, (num_tokens,), generator=rng)
    hidden, weight, bias = (tensor.detach() for tensor in tensors)
    now = linear_logprob(hidden, weight, labels, bias=bias, temperature=0.9).logprob
    noise = torch.randn(4, num_tokens, generator=rng)
    third = num_tokens // 3
    inputs = PolicyInputs(
        logprobs=torch.empty(0),
        old_logprobs=now + 0.3 * noise[0],
        advantages=noise[1],
        cu_seqlens=torch.tensor([0, third, third, num_tokens]).int(),
        ref_logprobs=now + 0.5 * noise[2],
        weights=noise[3].exp().clamp(max=2.0),
    )
    return tensors, labels, inputs


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_tokens", [0, 5, 600])
def test_fused_equals_apart(settings: PolicyLossSettings, num_tokens: int) -> None:
    tensors, labels, inputs = case(num_tokens)
    hidden, weight, bias = tensors
    fused = linear_policy_loss(
        hidden, weight, labels, inputs, settings, normalizer=700.0, bias=bias, temperature=0.9,
        entropy=True,
    )  # fmt: skip
    # The upstream factor is a power of two, so that it rounds nothing.
    fused_grads = torch.autograd.grad(fused.loss * 4.0, tensors)
    out = linear_logprob(hidden, weight, labels, bias=bias, temperature=0.9, entropy=True)
    apart = policy_loss(
        replace(inputs, logprobs=out.logprob, entropy=out.entropy), settings, normalizer=700.0
    )
    grads = torch.autograd.grad(apart.loss * 4.0, tensors)
    torch.testing.assert_close(fused.loss, apart.loss)
    for found, expected in zip(fused_grads, grads, strict=True):
        assert torch.equal(found, expected)
        assert bool(expected.any()) == (num_tokens > 0)
    assert named(fused.stats.tally()) == named(apart.stats.tally())


def test_without_gradients_it_is_the_plain_loss() -> None:
    tensors, labels, inputs = case(300)
    hidden, weight, _ = (tensor.detach() for tensor in tensors)
    loss = linear_policy_loss(hidden, weight, labels, inputs, SETTINGS[2], normalizer=9.0).loss
    out = linear_logprob(hidden, weight, labels, entropy=True)
    full = replace(inputs, logprobs=out.logprob, entropy=out.entropy)
    torch.testing.assert_close(loss, policy_loss(full, SETTINGS[2], normalizer=9.0).loss)
    assert not loss.requires_grad
