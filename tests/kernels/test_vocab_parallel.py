"""linear_logprob with the vocabulary cut over ranks equals the whole one."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlhfuse.kernels import head_chunks, reference
from rlhfuse.kernels.linear_logprob import linear_logprob
from tests.kernels.against_float64 import relative
from tests.training.ranks import run_ranks

CUT = 70  # unequal parts: 70 and 33 tokens of the vocabulary
VOCAB, HIDDEN, TOKENS = 103, 24, 600
BATCHES = ("plain", "ignored", "masked", "empty")


@pytest.fixture(autouse=True)
def chunks_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred tokens are several chunks."""
    monkeypatch.setattr(head_chunks, "_MAX_ROWS", 512)


def batch(kind: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    num_tokens = 0 if kind == "empty" else TOKENS
    hidden = torch.randn(num_tokens, HIDDEN, generator=rng)
    weight = torch.randn(VOCAB, HIDDEN, generator=rng) * 0.6  # logits of deviation 3
    bias = torch.randn(VOCAB, generator=rng) - 30  # every logit negative
    labels = torch.randint(0, VOCAB, (num_tokens,), generator=rng)
    if kind == "ignored":
        labels[:] = -100
    elif kind == "masked":
        bias[CUT:] = -torch.inf  # the second rank's part cannot occur at all
        labels %= CUT
    else:
        labels[::7], labels[1::7] = VOCAB - 1, -100
    temperatures = torch.rand(num_tokens, generator=rng) + 0.5
    return [hidden, weight, bias], labels, temperatures, torch.randn(2, num_tokens, generator=rng)


def gradients(
    function: object, tensors: list[Tensor], labels: Tensor, temperatures: Tensor, grads: Tensor,
    **options: object,
) -> list[Tensor]:  # fmt: skip
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    assert callable(function)
    out = function(
        leaves[0], leaves[1], labels, bias=leaves[2], temperature=temperatures, entropy=True,
        **options,
    )  # fmt: skip
    loss = (out.logprob * grads[0] + out.entropy * grads[1]).sum()
    found = torch.autograd.grad(loss, leaves)
    return [out.logprob.detach(), out.entropy.detach(), *found]


def on_rank(rank: int) -> list[list[Tensor]]:
    part = slice(0, CUT) if rank == 0 else slice(CUT, None)
    results = []
    for kind in BATCHES:
        (hidden, weight, bias), labels, temperatures, grads = batch(kind)
        mine = [hidden, weight[part], bias[part]]
        group = dist.group.WORLD
        results.append(gradients(linear_logprob, mine, labels, temperatures, grads, tp_group=group))
    kept = reference.KeptTokens(torch.zeros(1).int(), torch.tensor([0, 1]).int())
    few = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long()
    with pytest.raises(ValueError, match="kept"):
        linear_logprob(*few, kept=kept, tp_group=group)
    return results


def test_two_ranks_equal_the_whole_vocabulary() -> None:
    first, second = run_ranks(2, on_rank)
    for index, kind in enumerate(BATCHES):
        tensors, labels, temperatures, grads = batch(kind)
        wide = [tensor.double() for tensor in tensors]
        truth = gradients(
            reference.linear_logprob, wide, labels, temperatures.double(), grads.double()
        )
        if kind == "masked":  # the definition's own gradient by an -inf bias is 0
            assert torch.isfinite(truth[4]).all()
        ours, theirs = first[index], second[index]
        for same in range(3):  # logprob, entropy and the gradient by hidden are whole everywhere
            assert torch.equal(ours[same], theirs[same])
        joined = [*ours[:3], *(torch.cat([ours[i], theirs[i]]) for i in (3, 4))]
        bounds = (1e-6, 1e-6, 2e-6, 2e-6, 2e-6)
        for found, true, bound in zip(joined, truth, bounds, strict=True):
            assert relative(found, true) < bound, kind
