"""Whitening, mean and variance on the CPU: values and gradients against the definitions."""

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.statistics import masked_statistics, statistics_op
from rlhfuse.kernels.whiten import whiten_batch, whiten_masked, whiten_op
from tests.kernels.against_float64 import relative


def case(count: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(count)
    values, above = torch.randn(2, count, generator=rng)
    return values * 0.5 + 50, torch.rand(count, generator=rng) < 0.6, above


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_flows_through_mean_and_variance(
    masked: bool, shift_mean: bool, dtype: torch.dtype
) -> None:
    values, mask, above = case(700)
    kept = mask if masked else None
    wide, near = values.double().requires_grad_(), values.to(dtype).requires_grad_()
    truth = reference.whiten(wide, kept, shift_mean=shift_mean)
    true_grads = torch.autograd.grad(truth, wide, above.double())
    if masked:
        found = whiten_masked(near, mask, shift_mean=shift_mean)
    else:
        found = whiten_batch(near, torch.tensor([0, 300, 700]), shift_mean=shift_mean)
    (grad,) = torch.autograd.grad(found, near, above.to(dtype))
    assert relative(found, truth.detach()) < 1e-6
    assert relative(grad, true_grads[0]) < 1e-6
    # A shift of all values moves no whitened one.
    assert abs(float(grad.sum())) < 1e-3 or not shift_mean


@pytest.mark.parametrize("masked", [True, False])
def test_mean_and_variance_and_their_gradient(masked: bool) -> None:
    values, mask, _ = case(900)
    kept = mask.view(30, 30).t() if masked else None
    square = values.view(30, 30).t()
    wide, near = square.double().requires_grad_(), square.clone().requires_grad_()
    count, mean, variance = reference.mean_and_variance(wide, kept)
    (true_grad,) = torch.autograd.grad(mean * 3 - variance * 0.7, wide)
    found = masked_statistics(near, kept)
    (grad,) = torch.autograd.grad(found.mean * 3 - found.variance * 0.7, near)
    assert int(found.count.detach()) == count
    assert relative(found.mean, mean.detach()) < 1e-12
    assert relative(found.variance, variance.detach()) < 1e-9
    assert relative(grad, true_grad) < 1e-6


def test_nothing_kept_one_kept_and_nothing_there() -> None:
    values, mask, above = case(20)
    for size, kept in ((20, 0), (20, 1), (0, 0)):
        near, own = values[:size].clone().requires_grad_(), torch.zeros_like(mask[:size])
        own[:kept] = True
        found, white = masked_statistics(near, own), whiten_masked(near, own)
        (grad,) = torch.autograd.grad((white * above[:size]).sum() + found.variance, near)
        assert int(found.count.detach()) == kept
        assert not found.variance
        assert not white.any()
        assert not grad.any()
    with pytest.raises(ValueError, match="one shape"):
        masked_statistics(values, mask[:3])
    with pytest.raises(ValueError, match="no values"):
        reference.mean_and_variance(values, torch.zeros_like(mask))


def test_the_operators_pass_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    values, mask, above = case(50)
    near = values.clone().requires_grad_()

    def graph(values: Tensor) -> Tensor:
        found = masked_statistics(values * 2, mask)
        white = whiten_masked(values * 2, mask, shift_mean=False)
        return (white * above).sum() + found.mean * found.variance

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    (plain,) = torch.autograd.grad(graph(near), near)
    (traced,) = torch.autograd.grad(compiled(near), near)
    assert torch.equal(plain, traced)
    torch.library.opcheck(statistics_op, (near, mask))
    torch.library.opcheck(whiten_op, (near.view(5, 10).t(), None, mask.view(10, 5), True, 1e-8))
