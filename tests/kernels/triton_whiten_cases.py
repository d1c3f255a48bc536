"""Triton's whitening, mean and variance: see `triton_cases.py`, run the same way."""

import multiprocessing
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference, triton_whiten
from rlhfuse.kernels.statistics import masked_statistics, statistics_op
from rlhfuse.kernels.whiten import whiten_batch, whiten_masked, whiten_op
from tests.kernels.against_float64 import DEVICE, relative

pytestmark = pytest.mark.usefixtures("poisoned")

interpreted = pytest.mark.skipif(DEVICE.type != "cpu", reason="of Triton's interpreter")


def case(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values far from 0, a mask that keeps at least one, and a gradient from above."""
    rng = torch.Generator().manual_seed(count)
    values, above = torch.randn(2, count, generator=rng)
    mask = torch.rand(count, generator=rng) < 0.6
    mask[:1] = True
    return values * 0.5 + 50, mask, above


@pytest.mark.parametrize("count", [1, 7, 2048, 5000])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whitening_equals_float64(count: int, shift_mean: bool, masked: bool) -> None:
    values, mask, above = case(count)
    kept = mask if masked else None
    wide = values.double().requires_grad_()
    truth = reference.whiten(wide, kept, shift_mean=shift_mean)
    (true_grad,) = torch.autograd.grad(truth, wide, above.double())
    near = values.to(DEVICE).requires_grad_()
    if masked:
        found = whiten_masked(near, mask.to(DEVICE), shift_mean=shift_mean)
    else:
        cu_seqlens = torch.tensor([0, 0, count], device=DEVICE)
        found = whiten_batch(near, cu_seqlens, shift_mean=shift_mean)
    (grad,) = torch.autograd.grad(found, near, above.to(DEVICE))
    if int(mask.sum() if masked else count) > 1:
        assert relative(found, truth.detach()) < 1e-6
        assert relative(grad, true_grad) < 1e-6
    assert not found[~mask.to(DEVICE)].any() or not masked
    assert not grad[~mask.to(DEVICE)].any() or not masked


@pytest.mark.parametrize("count", [1, 7, 2048, 5000])
@pytest.mark.parametrize("masked", [True, False])
def test_mean_and_variance_equal_float64(count: int, masked: bool) -> None:
    values, mask, _ = case(count)
    kept = mask if masked else None
    wide = values.double().requires_grad_()
    number, *truth = reference.mean_and_variance(wide, kept)
    factors = torch.tensor([3.0, -0.7], dtype=torch.float64)
    (true_grad,) = torch.autograd.grad(truth[0] * 3.0 - truth[1] * 0.7, wide)
    near = values.to(DEVICE).requires_grad_()
    found = masked_statistics(near, None if kept is None else mask.to(DEVICE))
    loss = torch.stack([found.mean, found.variance]) @ factors.to(DEVICE)
    (grad,) = torch.autograd.grad(loss, near)
    assert float(found.count.detach()) == number
    assert relative(found.mean, truth[0].detach()) < 1e-9
    assert relative(found.variance, truth[1].detach()) < 1e-6 or number == 1
    assert relative(grad, true_grad) < 1e-6
    assert not grad[~mask.to(DEVICE)].any() or not masked


def test_nothing_kept_and_nothing_there() -> None:
    values, mask, above = (part.to(DEVICE) for part in case(300))
    for size in (300, 0):
        near = values[:size].clone().requires_grad_()
        none = torch.zeros_like(mask[:size])
        found, white = masked_statistics(near, none), whiten_masked(near, none)
        (grad,) = torch.autograd.grad((white * above[:size]).sum() + found.mean, near)
        assert found.count == found.mean == found.variance == 0
        assert not white.any()
        assert not grad.any()
    assert whiten_batch(values[:0], torch.tensor([0, 0], device=DEVICE)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_that_lie_apart(dtype: torch.dtype) -> None:
    values, mask, above = case(4200)
    narrow = (values - 50).to(dtype).view(60, 70)
    kept, over = mask.view(60, 70).t(), above.view(60, 70).t()
    wide = narrow.double().t().requires_grad_()
    truth = reference.whiten(wide, kept)
    (true_grad,) = torch.autograd.grad(truth, wide, over.double())
    near = narrow.to(DEVICE).requires_grad_()
    found = whiten_masked(near.t(), kept.to(DEVICE))
    (grad,) = torch.autograd.grad(found, near, over.to(DEVICE))
    assert found.dtype == torch.float32
    assert relative(found, truth.detach()) < 1e-6
    assert relative(grad.t(), true_grad) < 4e-3


def test_one_launch_is_the_two_of_several_ranks_to_the_bit() -> None:
    values, mask, _ = (part.to(DEVICE) for part in case(9001))
    whole, seen = triton_whiten.whiten(values, mask=mask)
    parts = triton_whiten.moments(values, mask)
    apart, also = triton_whiten.whiten(values, parts, mask=mask)
    assert torch.equal(whole, apart)
    assert torch.equal(seen, also)
    # Two ranks: each whitens its own by the moments of both.
    cut = 3 * 2048
    both = torch.cat([triton_whiten.moments(values[part], mask[part]) for part in
                      (slice(0, cut), slice(cut, None))])  # fmt: skip
    halves = [
        triton_whiten.whiten(values[part], both, mask=mask[part])[0]
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(halves), whole)


def _as_one_program(number: int, programs: int, arguments: tuple[Tensor, ...]) -> None:
    """One program of a launch of several, beside the others, each of which is a process (so that
    what is put in other functions' places ends with it)."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.set_grid_dim = lambda *_: setattr(builder, "grid_dim", (programs, 1, 1))
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (number, 0, 0))
    values, mask, above, known, count, parts, sums, white, gradient, seen = arguments
    room = {(len(parts), 3): parts, (len(sums), 2): sums, tuple(white.shape): white, (3,): seen}
    torch.use_deterministic_algorithms(False)
    # Storages are shared already: copying them back would undo what others wrote meanwhile.
    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    patch.setattr(triton_whiten, "counter", lambda _: count)
    patch.setattr(triton_whiten, "side_by_side", lambda _: 1)
    patch.setattr(torch, "empty", lambda *shape, **_: room[_flat(shape)])
    patch.setattr(torch, "empty_like", lambda _: gradient)
    time.sleep(0.1 * number)  # the first ones have to wait
    triton_whiten.whiten(values, mask=mask)
    # A launch on a GPU begins when the one before has ended; here the others may still store.
    triton_whiten.whiten_backward(values, mask, known, above, shift_mean=True)


def _flat(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(shape[0]) if isinstance(shape[0], torch.Size) else shape


@interpreted
@pytest.mark.parametrize("programs", [2, 3])
def test_programs_that_run_side_by_side_meet(programs: int) -> None:
    values, mask, above = case(9001)
    truth, seen = triton_whiten.whiten(values, mask=mask)
    true_grad = triton_whiten.whiten_backward(values, mask, seen, above, shift_mean=True)
    blocks = -(-9001 // 2048)
    shared = [
        values, mask, above, seen, torch.zeros(1, dtype=torch.int32),
        torch.empty(blocks, 3, dtype=torch.float64), torch.empty(blocks, 2, dtype=torch.float64),
        torch.empty_like(truth), torch.empty_like(values), torch.empty(3, dtype=torch.float64),
    ]  # fmt: skip
    for part in shared:
        part.share_memory_()
    fork = multiprocessing.get_context("fork")
    for _ in range(2):  # the counter is as good as new afterwards
        for part in shared[5:]:
            part.fill_(torch.nan)
        team = [
            fork.Process(target=_as_one_program, args=(number, programs, tuple(shared)))
            for number in range(programs)
        ]
        for member in team:
            member.start()
        for member in team:
            member.join(timeout=120)
            assert member.exitcode == 0
        assert torch.equal(shared[7], truth)
        assert torch.equal(shared[8], true_grad)
        assert torch.equal(shared[9], seen)


@interpreted
def test_the_last_program_to_come_merges_and_the_counter_serves_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(triton_whiten, "counter", lambda _: count)
    for size in (9001, 300, 4096, 2049):  # launches of 5, 1, 2 and 2 programs
        values, mask, _ = case(size)
        found = triton_whiten.statistics(values, mask)
        number, *truth = reference.mean_and_variance(values, mask)
        assert float(found[0]) == number
        assert relative(found[1:], torch.stack(truth)) < 1e-6
        assert int(count) & 0x7FFFFFFF == 0


def test_the_operators_pass_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    values, mask, above = (part.to(DEVICE) for part in case(300))
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
    torch.library.opcheck(whiten_op, (near, None, mask, True, 1e-8))
