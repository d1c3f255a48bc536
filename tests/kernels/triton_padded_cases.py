"""Triton's GAE of padded rows: see `triton_cases.py`, run the same way."""

import itertools

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference, triton_gae_padded
from rlhfuse.kernels.padded import discounted_returns_padded, gae_padded, padded_op
from rlhfuse.kernels.reference import Shaping
from tests.kernels.against_float64 import DEVICE, relative

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the carry."""
    monkeypatch.setattr(triton_gae_padded, "_AHEAD", 32)


def batch(rows: int, length: int, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values [B, L]; bootstrap [B]; a mask with a whole, an empty and a padded row."""
    rng = torch.Generator().manual_seed(rows * length)
    rewards, values = torch.randn(2, rows, length, generator=rng)
    mask = torch.rand(rows, length, generator=rng) < rate
    mask[:1], mask[1:2] = True, False
    mask[2:3, : length // 3] = True
    mask[2:3, length // 3 :] = False
    rewards[~mask] = torch.nan  # nobody may read them
    values[~mask] = torch.nan
    return rewards, values, torch.randn(rows, generator=rng), mask


WAYS = [(1.0, 1.0, True), (0.99, 0.95, False), (0.9, 0.0, True)]
SMALL = [(0, 5, 0.5), (3, 0, 0.5), (1, 1, 1.0)]
# One program for many rows; one row over several programs and steps of the carry, with long gaps.
LARGE = [(40, 7, 0.6), (4, 70, 0.7), (3, 200, 0.02)]


@pytest.mark.parametrize(
    ("shape", "way"),
    [*itertools.product(SMALL, WAYS), *zip(LARGE, WAYS, strict=True), (LARGE[1], WAYS[0])],
)
def test_padded_gae_equals_float64(
    shape: tuple[int, int, float], way: tuple[float, float, bool]
) -> None:
    gamma, lam, with_bootstrap = way
    rewards, values, bootstrap, mask = batch(*shape)
    final = bootstrap if with_bootstrap else None
    truth = reference.gae_padded(
        rewards.double(), values.double(), mask, gamma=gamma, lam=lam, bootstrap=final
    )
    near = [part.to(DEVICE) for part in (rewards, values, mask)]
    on_device = None if final is None else final.to(DEVICE)
    found = gae_padded(*near, gamma=gamma, lam=lam, bootstrap=on_device)
    assert relative(found.advantages, truth.advantages) < 1e-6
    assert relative(found.returns, truth.returns) < 1e-6
    assert not found.advantages[~near[2]].any()
    assert not found.returns[~near[2]].any()
    white = gae_padded(*near, gamma=gamma, lam=lam, bootstrap=on_device, whitened=True)
    assert torch.equal(white.returns, found.returns)
    if int(mask.sum()) > 1:
        assert relative(white.advantages, reference.whiten(truth.advantages, mask)) < 2e-6
    returns = discounted_returns_padded(near[0], near[2], gamma=gamma)
    nothing = torch.zeros_like(values.double())
    plain = reference.gae_padded(rewards.double(), nothing, mask, gamma=gamma, lam=1.0)
    assert relative(returns, plain.returns) < 1e-6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shaped_rewards_equal_float64(estimator: str, dtype: torch.dtype) -> None:
    noise, values, scores, mask = batch(5, 60, 0.5)
    logprobs = noise - 2
    ref_logprobs = (logprobs + torch.linspace(-3, 0.01, 300).view(5, 60)).to(dtype)
    own = logprobs.to(dtype)
    wide = Shaping(scores.double(), own.double(), ref_logprobs.double(), 0.3, estimator)
    truth = reference.gae_padded(
        wide, values.double(), mask, gamma=0.99, lam=0.97, bootstrap=scores
    )
    near = Shaping(scores.to(DEVICE), own.to(DEVICE), ref_logprobs.to(DEVICE), 0.3, estimator)
    found = gae_padded(
        near, values.to(DEVICE), mask.to(DEVICE), gamma=0.99, lam=0.97,
        bootstrap=scores.to(DEVICE),
    )  # fmt: skip
    assert relative(found.rewards, truth.rewards) < 1e-6
    assert relative(found.advantages, truth.advantages) < 1e-6
    assert relative(found.returns, truth.returns) < 1e-6


def test_many_rows_and_rows_that_lie_apart() -> None:
    # The interpreter pays by the place.
    rewards, values, _, mask = batch(66_000 if DEVICE.type == "cuda" else 300, 2, 0.6)
    truth = reference.gae_padded(rewards[:200], values[:200], mask[:200], gamma=0.9, lam=0.9)
    apart = [part.t().contiguous().t().to(DEVICE) for part in (rewards, values, mask)]
    found = gae_padded(*apart, gamma=0.9, lam=0.9)
    assert relative(found.advantages[:200], truth.advantages.double()) < 1e-6
    own = mask[-1, -1].item()
    last = rewards[-1, -1] - values[-1, -1] if own else torch.zeros(())
    assert float(found.advantages[-1, -1]) == float(last)


def test_the_operator_passes_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    rewards, values, bootstrap, mask = (part.to(DEVICE) for part in batch(4, 9, 0.6))
    rewards, values = rewards.nan_to_num(), values.nan_to_num()

    def graph(rewards: Tensor, values: Tensor) -> Tensor:
        shaping = Shaping(bootstrap, rewards, values, 0.3, "k3")
        out = gae_padded(shaping, values, mask, gamma=0.99, lam=0.95, whitened=True)
        plain = gae_padded(rewards, values, mask, gamma=0.99, lam=0.95, bootstrap=bootstrap)
        returns = discounted_returns_padded(rewards, mask, gamma=0.9)
        return out.advantages + out.rewards + plain.returns + returns

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values), graph(rewards, values))
    short = ("test_schema", "test_faketensor")  # graphs are traced above
    for made_of in ((rewards, values, bootstrap, 0.3, "k2"), (rewards, None, None, 0.0, "k1")):
        arguments = (*made_of, values, mask, bootstrap, 0.9, 0.8, True)
        torch.library.opcheck(padded_op, arguments, test_utils=short)
