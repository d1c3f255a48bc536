"""Triton's GAE, moments, whitening and value loss: see `triton_cases.py`, run the same way."""

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference, triton_gae
from rlhfuse.kernels.gae import discounted_returns, gae, gae_op, whitened_gae
from rlhfuse.kernels.policy_loss import value_terms, value_terms_op
from rlhfuse.kernels.reference import Shaping
from rlhfuse.kernels.whiten import whiten_batch, whiten_masked, whiten_op
from tests.kernels.against_float64 import DEVICE, relative

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the carry."""
    monkeypatch.setattr(triton_gae, "_AHEAD", 512)


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(lengths))
    rewards, values = torch.randn(2, sum(lengths), generator=rng)
    bootstrap = torch.randn(len(lengths), generator=rng)
    return rewards, values, bootstrap, torch.tensor([0, *lengths]).cumsum(0).int()


# The last two: a sequence over several programs and over several steps of the carry, cut in
# the middle of a block; many short ones in one block.
LENGTHS = [[], [0], [1], [0, 3, 0, 300, 128, 1], [50, 1300, 0, 77], [1, 2, 0, 1] * 20]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("gamma", "lam", "with_bootstrap"), [(1.0, 1.0, True), (0.99, 0.95, False), (0.9, 0.0, True)]
)
def test_gae_and_moments_equal_float64(
    lengths: list[int], gamma: float, lam: float, with_bootstrap: bool
) -> None:
    rewards, values, bootstrap, cu_seqlens = batch(lengths)
    final = bootstrap if with_bootstrap else None
    truth = reference.gae(
        rewards.double(), values.double(), cu_seqlens, gamma=gamma, lam=lam, bootstrap=final
    )
    on_device = None if final is None else final.to(DEVICE)
    cu_device = cu_seqlens.to(DEVICE)
    found = gae(
        rewards.to(DEVICE), values.to(DEVICE), cu_device, gamma=gamma, lam=lam, bootstrap=on_device
    )
    assert relative(found.advantages, truth.advantages) < 1e-6
    assert relative(found.returns, truth.returns) < 1e-6
    returns = discounted_returns(rewards.to(DEVICE), cu_device, gamma=gamma)
    true_returns = reference.discounted_returns(rewards.double(), cu_seqlens, gamma)
    assert relative(returns, true_returns) < 1e-6
    moments = triton_gae.scan(
        rewards.to(DEVICE), values.to(DEVICE), on_device, cu_device, gamma=gamma, decay=gamma * lam
    ).moments
    block = triton_gae.block_size(sum(lengths))
    for row, own in zip(moments.tolist(), truth.advantages.split(block), strict=sum(lengths) > 0):
        assert row[0] == own.numel()
        if own.numel():
            spread = float((own - own.mean()).square().sum())
            assert abs(row[1] - float(own.mean())) <= 1e-6 * float(own.abs().max())
            assert abs(row[2] - spread) <= 1e-5 * spread + 1e-9


@pytest.mark.skipif(DEVICE.type == "cpu", reason="40 s in the interpreter (where it holds)")
def test_a_long_sequence_without_discount_stays_accurate() -> None:
    rewards, values, _, cu_seqlens = batch([3, 131_072, 5])
    on_device = [part.to(DEVICE) for part in (rewards, values, cu_seqlens)]
    found = gae(*on_device, gamma=1.0, lam=1.0)
    # With gamma = lam = 1 the return is the plain sum of what is still to come.
    own = rewards.double()[3:-5].flip(0).cumsum(0).flip(0)
    assert relative(found.returns[3:-5], own) < 2e-6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_shaped_rewards_and_whitening_equal_the_steps_apart(estimator: str) -> None:
    noise, values, scores, cu_seqlens = batch([200, 0, 1, 700])
    logprobs = noise - 2
    ref_logprobs = logprobs + torch.linspace(-3, 0.01, logprobs.numel())
    wide = Shaping(scores.double(), logprobs.double(), ref_logprobs.double(), 0.3, estimator)
    rewards = reference.shaped_rewards(wide, cu_seqlens)
    truth = reference.gae(rewards, values.double(), cu_seqlens, gamma=0.99, lam=0.97)
    shaping = Shaping(
        scores.to(DEVICE), logprobs.to(DEVICE), ref_logprobs.to(DEVICE), 0.3, estimator
    )
    on_device = values.to(DEVICE), cu_seqlens.to(DEVICE)
    found = whitened_gae(shaping, *on_device, gamma=0.99, lam=0.97)
    assert relative(found.rewards, rewards) < 1e-6
    assert relative(found.returns, truth.returns) < 1e-6
    assert relative(found.advantages, reference.whiten(truth.advantages)) < 2e-6
    plain = gae(shaping, *on_device, gamma=0.99, lam=0.97)
    assert relative(plain.advantages, truth.advantages) < 1e-6


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("count", [0, 1, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_terms_equal_float64(clip: float | None, count: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(count)
    values, old, returns, above = torch.randn(4, count, generator=rng)
    values = values.to(dtype)
    if count > 1:
        old[1] = values[1]  # the clip range's middle: both branches are equal
    wide = values.double().requires_grad_()
    truth = reference.value_terms(wide, old.double(), returns.double(), clip=clip)
    (true_grad,) = torch.autograd.grad((truth.loss * above).sum(), wide)
    near = values.to(DEVICE).requires_grad_()
    found = value_terms(near, old.to(DEVICE), returns.to(DEVICE), clip=clip)
    (grad,) = torch.autograd.grad((found.loss * above.to(DEVICE)).sum(), near)
    assert relative(found.loss, truth.loss.detach()) < 1e-6
    assert torch.equal(found.clipped.cpu(), truth.clipped)
    assert relative(grad, true_grad) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_operators_pass_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    rewards, values, bootstrap, cu_seqlens = (part.to(DEVICE) for part in batch([0, 9, 4]))
    near, mask = values.clone().requires_grad_(), rewards > 0

    def graph(values: Tensor) -> Tensor:
        shaping = Shaping(bootstrap, rewards, values.detach(), 0.3, "k3")
        out = whitened_gae(shaping, values.detach(), cu_seqlens, gamma=0.99, lam=0.95)
        white = whiten_masked(out.returns, mask) + whiten_batch(out.returns, cu_seqlens)
        terms = value_terms(values * 2, rewards, out.advantages + white, clip=0.2)
        return terms.loss.sum()

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    (plain,) = torch.autograd.grad(graph(near), near)
    (traced,) = torch.autograd.grad(compiled(near), near)
    assert torch.equal(plain, traced)
    torch.library.opcheck(value_terms_op, (near, rewards, rewards * 2, 0.2))
    short = ("test_schema", "test_faketensor")  # graphs are traced above
    torch.library.opcheck(whiten_op, (rewards, None, mask, True, 1e-8), test_utils=short)
    arguments = (rewards, None, None, 0.0, "k1", values, cu_seqlens, bootstrap, 0.9, 0.8, True)
    torch.library.opcheck(gae_op, arguments, test_utils=short)
    assert not whiten_masked(values, torch.zeros_like(mask)).any()  # nothing is kept
