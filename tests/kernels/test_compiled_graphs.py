"""Neither torch.compile nor Triton compiles for a temperature or for a number of tokens."""

import importlib
import importlib.util

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rlhfuse.kernels import reference
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.logprob import token_logprob
from rlhfuse.kernels.policy_loss import value_terms_op

KERNELS = (
    "triton_gae",
    "triton_gae_padded",
    "triton_kept",
    "triton_linear",
    "triton_logprob",
    "triton_value",
    "triton_whiten",
)


@pytest.mark.parametrize("head", [True, False])
def test_torch_compile_traces_no_graph_for_a_temperature_or_a_length(head: bool) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(30, 8, generator=rng).requires_grad_()

    def run(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
        if head:
            return linear_logprob(rows, weight, labels, temperature=temperature).logprob
        return token_logprob(rows, labels, temperature=temperature).logprob

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for number in range(6):
        count, temperature = 5 + 3 * number, 0.5 + 0.13 * number
        rows = torch.randn(count, 8, generator=rng).requires_grad_()
        labels = torch.randint(0, 8, (count,), generator=rng)
        found, plain = compiled(rows, labels, temperature), run(rows, labels, temperature)
        assert torch.equal(found, plain)
        one, other = (torch.autograd.grad(out.sum(), rows)[0] for out in (found, plain))
        assert torch.equal(one, other)
    # The first, and one for any number and length.
    assert backend.frame_count <= 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("module", KERNELS)
def test_triton_specialises_on_no_number(module: str) -> None:
    """Numbers that differ between batches are arguments that Triton compiles for no value of:
    all but pointers, and strides, of which it asks whether they are aligned."""
    from triton.runtime.jit import JITFunction

    kernels = importlib.import_module(f"rlhfuse.kernels.{module}")
    own = [part for part in vars(kernels).values() if isinstance(part, JITFunction)]
    launched = [part for part in own if part.do_not_specialize or part.__name__.startswith("_by_")]
    assert launched
    for kernel in launched:
        for parameter in kernel.params:
            if parameter.is_constexpr or parameter.name.endswith(("_ptr", "stride")):
                continue
            assert parameter.do_not_specialize, (kernel.__name__, parameter.name)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_losss_operator_works_on_every_path(clip: float | None) -> None:
    rng = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 40, generator=rng)
    old[:20] = values[:20]  # the clip range's middle: both branches are equal
    leaf = values.clone().requires_grad_()
    torch.library.opcheck(value_terms_op, (leaf, old, returns, clip))
    loss, clipped = value_terms_op(leaf, old, returns, clip)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    wide = values.double().requires_grad_()
    truth = reference.value_terms(wide, old, returns, clip=clip)
    (true_grad,) = torch.autograd.grad(truth.loss.sum(), wide)
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(clipped, truth.clipped)
