"""Large memory: like torch's in all but its pages, and no more of it than is worked in."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhfuse.kernels import fresh as fresh_module
from rlhfuse.kernels import head_chunks
from rlhfuse.kernels.fresh import fresh
from rlhfuse.kernels.linear_logprob import linear_logprob


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 7), (3, 5), (1025, 4099), (1 << 22,)])
def test_fresh_memory_is_as_torchs_and_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.empty(1, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = fresh(*shape, like=like), fresh(*shape, like=like)
    finally:
        torch.use_deterministic_algorithms(False)
    for found in (first, second):
        assert found.shape == shape
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
        assert bool(found.isnan().all())  # what is not written is seen
    first.fill_(1.0)
    assert bool(second.isnan().all())
    second.fill_(2.0)
    assert bool((first == 1.0).all())


class Sizes(TorchDispatchMode):
    """Notes which operator gave how many elements that are not an argument's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {part.data_ptr() for part in tree_leaves(args) if isinstance(part, Tensor)}
        for part in tree_leaves(out):
            if isinstance(part, Tensor) and part.data_ptr() not in given:
                self.made.append((str(func), part.numel()))
        return out


def test_the_backward_pass_makes_nothing_as_large_as_the_logits_that_were_kept() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=rng).requires_grad_() for n in (300, 61))
    labels = torch.randint(0, 61, (300,), generator=rng)
    out = linear_logprob(hidden, weight, labels, entropy=True)
    assert out.entropy is not None
    loss = (out.logprob + out.entropy).sum()
    with Sizes() as sizes:
        grads = torch.autograd.grad(loss, [hidden, weight])
    assert ("rlhfuse.linear_logprob_backward.default", weight.numel()) in sizes.made
    assert max(count for _, count in sizes.made) < 300 * 61
    again = linear_logprob(hidden, weight, labels, entropy=True)
    assert again.entropy is not None
    apart = [
        torch.autograd.grad(part.sum(), [hidden, weight], retain_graph=True)
        for part in (again.logprob, again.entropy)  # the other's gradient is not even given
    ]
    for both, one, other in zip(grads, *apart, strict=True):
        torch.testing.assert_close(both, one + other)


def test_pages_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "_CHUNK_BYTES", 4 << 20)  # chunks of 64 rows
    rng = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 80, generator=rng).requires_grad_() for n in (150, 16_001))
    labels = torch.randint(0, 16_001, (150,), generator=rng)
    found = []
    for large in (1 << 22, 1 << 40):
        monkeypatch.setattr(fresh_module, "_LARGE", large)
        out = linear_logprob(hidden, weight, labels).logprob
        found.append((out.detach(), *torch.autograd.grad(out.sum(), [hidden, weight])))
    for pages, plain in zip(*found, strict=True):
        assert torch.equal(pages, plain)
