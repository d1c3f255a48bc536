"""The loss fused with the head equals head and loss apart, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhfuse.algorithms.losses import (
    Loss,
    PolicyInputs,
    PolicyLossSettings,
    linear_policy_loss,
    policy_loss,
)
from rlhfuse.algorithms.tally import named
from rlhfuse.kernels import head_chunks, reference
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.replay import replay

SETTINGS = [
    PolicyLossSettings(),
    PolicyLossSettings(aggregation="seq-mean-token-mean", clip_high=0.3, dual_clip=1.5),
    PolicyLossSettings(entropy_coef=0.02, kl_coef=0.1, kl_estimator="k3"),
    PolicyLossSettings(aggregation="seq-mean-token-sum-norm", fixed_length=900),
    PolicyLossSettings(aggregation="seq-mean-token-sum", kl_coef=0.1, kl_estimator="k2"),
    PolicyLossSettings(kl_coef=0.1, kl_estimator="k1", kl_gradient_k2=True),
    PolicyLossSettings(ratio_level="sequence", aggregation="seq-mean-token-mean", kl_coef=0.1),
]


@pytest.fixture(autouse=True)
def chunks_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred tokens are several chunks."""
    monkeypatch.setattr(head_chunks, "_MAX_ROWS", 512)


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


REPLAYED = [
    PolicyLossSettings(),
    PolicyLossSettings(entropy_coef=0.02, kl_coef=0.1, aggregation="seq-mean-token-mean"),
    PolicyLossSettings(ratio_level="sequence", kl_coef=0.1),
]


@pytest.mark.parametrize("settings", REPLAYED)
@pytest.mark.parametrize("num_tokens", [0, 5, 600])
def test_ratios_among_what_the_sampler_kept(settings: PolicyLossSettings, num_tokens: int) -> None:
    """The ratio is that of the truncated distributions, entropy and KL of the whole ones."""
    tensors, labels, inputs = case(num_tokens)
    hidden, weight, _ = (tensor.detach() for tensor in tensors)
    most = torch.full((num_tokens,), 40)
    seen = replay(
        hidden, weight, labels, lambda _, logits: logits > 2.0, most=most, temperature=0.9
    )
    assert torch.equal(
        seen.logprob, linear_logprob(hidden, weight, labels, temperature=0.9).logprob
    )
    assert int(seen.kept.cu.diff().max()) <= 41 if num_tokens else not seen.kept.ids.numel()
    unmoved = replace(inputs, old_logprobs=seen.replayed, ref_logprobs=seen.logprob)

    def fused(inputs: PolicyInputs) -> Loss:
        leaves = (tensors[0], tensors[1])
        return linear_policy_loss(
            *leaves, labels, inputs, settings, normalizer=700.0, temperature=0.9, entropy=True,
            kept=seen.kept,
        )  # fmt: skip

    stats = named(fused(unmoved).stats.tally())
    if num_tokens:  # at the weights that drew the tokens, to the bit
        assert stats["actor/ratio_mean"] == stats["actor/ratio_max"] == 1.0
        assert stats["actor/kl_loss"] == 0.0
    moved = replace(unmoved, old_logprobs=seen.replayed + 0.3 * inputs.advantages)
    found = fused(moved)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    heads = [
        reference.linear_logprob(wide[0], wide[1], labels, temperature=0.9, entropy=True, kept=kept)
        for kept in (None, seen.kept)
    ]
    truth = policy_loss(
        replace(
            moved, logprobs=heads[1].logprob, full_logprobs=heads[0].logprob,
            entropy=heads[0].entropy,
        ),
        settings, normalizer=700.0,
    )  # fmt: skip
    torch.testing.assert_close(found.loss.double(), truth.loss.double(), rtol=1e-5, atol=1e-7)
    grads = torch.autograd.grad(found.loss, tensors[:2])
    for ours, true in zip(grads, torch.autograd.grad(truth.loss, wide), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=2e-6)
        assert bool(true.any()) == (num_tokens > 0)
