"""GAE of padded rows on the CPU."""

import math

import pytest
import torch

from rlhfuse.kernels import reference
from rlhfuse.kernels.padded import discounted_returns_padded, gae_padded, padded_op
from rlhfuse.kernels.reference import Shaping


def batch() -> tuple[torch.Tensor, ...]:
    """Rewards, values, mask [6, 90] with an empty and a whole row, bootstrap [6]."""
    rng = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(2, 6, 90, generator=rng)
    mask = torch.rand(6, 90, generator=rng) < 0.7
    mask[2], mask[3] = False, True
    return rewards, values, mask, torch.randn(6, generator=rng)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("shaped", [True, False])
def test_padded_rows_skip_what_is_masked(
    path: str, shaped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHFUSE_KERNELS", path)
    rewards, values, mask, bootstrap = batch()
    given = Shaping(bootstrap, rewards, values, 0.3, "k1") if shaped else rewards
    found = gae_padded(given, values, mask, gamma=0.97, lam=0.9, bootstrap=bootstrap)
    returns = discounted_returns_padded(rewards, mask, gamma=0.97)
    for row in range(6):
        advantage, following, summed = 0.0, float(bootstrap[row]), 0.0
        score = float(bootstrap[row])
        for t in range(89, -1, -1):
            if not mask[row, t]:
                assert float(found.advantages[row, t]) == float(found.returns[row, t]) == 0.0
                assert float(returns[row, t]) == 0.0
                continue
            summed = float(rewards[row, t]) + 0.97 * summed
            reward = float(rewards[row, t])
            if shaped:
                reward = score - 0.3 * (reward - float(values[row, t]))
                score = 0.0
                assert math.isclose(float(found.rewards[row, t]), reward, rel_tol=1e-5)
            delta = reward + 0.97 * following - float(values[row, t])
            advantage = delta + 0.97 * 0.9 * advantage
            following = float(values[row, t])
            pairs = (
                (found.advantages, advantage),
                (found.returns, advantage + following),
                (returns, summed),
            )
            for tensor, number in pairs:
                assert math.isclose(float(tensor[row, t]), number, rel_tol=1e-5, abs_tol=1e-5)


def test_whitening_is_over_what_is_kept_and_a_compiled_graph_changes_nothing() -> None:
    rewards, values, mask, bootstrap = batch()
    plain = gae_padded(rewards, values, mask, gamma=0.97, lam=0.9)
    white = gae_padded(rewards, values, mask, gamma=0.97, lam=0.9, whitened=True)
    assert torch.equal(white.returns, plain.returns)
    truth = reference.whiten(plain.advantages.double(), mask)
    torch.testing.assert_close(white.advantages.double(), truth, rtol=1e-5, atol=1e-6)

    def graph(rewards: torch.Tensor) -> torch.Tensor:
        shaping = Shaping(bootstrap, rewards, values, 0.3, "k3")
        out = gae_padded(shaping, values, mask, gamma=0.99, lam=0.95, whitened=True)
        return out.advantages + out.rewards + discounted_returns_padded(rewards, mask, gamma=0.9)

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), graph(rewards))
    short = ("test_schema", "test_faketensor")
    for made_of in ((rewards, values, bootstrap, 0.3, "k2"), (rewards, None, None, 0.0, "k1")):
        arguments = (*made_of, values, mask, bootstrap, 0.9, 0.8, True)
        torch.library.opcheck(padded_op, arguments, test_utils=short)


def test_shapes_that_do_not_fit_are_named() -> None:
    rewards, values, mask, bootstrap = batch()
    with pytest.raises(ValueError, match="mask"):
        gae_padded(rewards, values, mask[:, 1:], gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="bootstrap must be one per row"):
        gae_padded(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=bootstrap[1:])
    short = Shaping(bootstrap[1:], rewards, values, 0.3)
    with pytest.raises(ValueError, match="scores must be one per row"):
        gae_padded(short, values, mask, gamma=1.0, lam=1.0)
    cut = Shaping(bootstrap, rewards, values[:, 1:], 0.3)
    with pytest.raises(ValueError, match="ref_logprobs"):
        gae_padded(cut, values, mask, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="rewards and mask"):
        discounted_returns_padded(rewards, mask[1:], gamma=1.0)
