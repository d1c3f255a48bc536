"""How many kernels run, Triton's and torch's: see `triton_cases.py`, run the same way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhfuse.kernels import triton_whiten
from rlhfuse.kernels.gae import discounted_returns, gae, whitened_gae
from rlhfuse.kernels.padded import discounted_returns_padded, gae_padded
from rlhfuse.kernels.policy_loss import value_terms
from rlhfuse.kernels.reference import Shaping
from rlhfuse.kernels.statistics import masked_statistics
from rlhfuse.kernels.whiten import whiten_batch, whiten_masked
from tests.kernels.against_float64 import DEVICE

# They launch nothing: allocations and views.
QUIET = ("empty", "view", "detach", "unbind", "select", "slice", "alias", "as_strided")
OURS = ("rlhfuse::",)


class _Counted(TorchDispatchMode):
    """Names of torch's operators that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name()
        if not name.startswith(OURS) and not any(quiet in name for quiet in QUIET):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that run inside: Triton's by name, and torch's."""
    from triton.runtime.interpreter import GridExecutor

    run: Callable[..., Any] = GridExecutor.__call__
    with _Counted() as mode, monkeypatch.context() as patch:

        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            mode.names.append(self.fn.__name__)
            with torch._C._DisableTorchDispatch():  # the interpreter's own copies
                return run(self, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launch)
        yield mode.names


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts in Triton's interpreter")
def test_one_launch_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU it is there since the stream's first launch.
    ready = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(triton_whiten, "counter", lambda _: ready)
    rng = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 4, 30, generator=rng)
    mask, scores = torch.rand(4, 30, generator=rng) < 0.6, torch.randn(4, generator=rng)
    cu_seqlens, near = torch.tensor([0, 50, 50, 120]).int(), values.clone().requires_grad_()
    flat, white = (rewards.view(-1), values.view(-1)), values.view(-1)
    padded = Shaping(scores, rewards, values, 0.1, "k3")
    packed = Shaping(scores[:3], *flat, 0.1, "k3")
    packed_gae = partial(gae, gamma=0.99, lam=0.95)
    rows_gae = partial(gae_padded, gamma=0.99, lam=0.95)
    white_gae = partial(whitened_gae, gamma=0.99, lam=0.95)
    forward: dict[str, Callable[[], object]] = {
        "_whiten": lambda: whiten_masked(values, mask),
        "_whiten ": lambda: whiten_batch(white, cu_seqlens),
        "_statistics": lambda: masked_statistics(values, mask),
        "_scan": lambda: packed_gae(*flat, cu_seqlens),
        "_scan ": lambda: packed_gae(packed, white, cu_seqlens),
        "_scan  ": lambda: discounted_returns(white, cu_seqlens, gamma=0.9),
        "_scan_padded": lambda: rows_gae(rewards, values, mask),
        "_scan_padded ": lambda: rows_gae(padded, values, mask),
        "_scan_padded  ": lambda: discounted_returns_padded(rewards, mask, gamma=0.9),
        "_value_forward": lambda: value_terms(values, values, rewards, clip=0.2),
    }
    for name, call in forward.items():
        with counted(monkeypatch) as names:
            call()
        assert names == [name.strip()]
    # Whitened advantages: the scan leaves the statistics, by which one more launch whitens.
    for call in (
        lambda: white_gae(*flat, cu_seqlens),
        lambda: rows_gae(rewards, values, mask, whitened=True),
    ):
        with counted(monkeypatch) as names:
            call()
        assert len(names) == 2

    above = torch.randn(4, 30, generator=rng)
    differentiable: dict[str, tuple[Tensor, Tensor]] = {
        "_whiten_backward": (whiten_masked(near, mask), above),
        "_value_backward": (value_terms(near, values, rewards, clip=0.2).loss, above),
    }
    for name, (out, over) in differentiable.items():
        with counted(monkeypatch) as names:
            torch.autograd.grad(out, near, over)
        assert names == [name]
    found = masked_statistics(near, mask)
    with counted(monkeypatch) as names:
        torch.autograd.grad(found.variance, near)
    assert names.count("_statistics_backward") == 1
