"""Triton's log-probabilities among kept tokens: see `triton_cases.py`, run the same way."""

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference, triton_kept
from rlhfuse.kernels.linear_logprob import linear_logprob, linear_logprob_op
from rlhfuse.kernels.linear_loss import linear_loss
from rlhfuse.kernels.reference import KeptTokens
from rlhfuse.kernels.replay import replay
from tests.kernels.against_float64 import DEVICE, HALF, relative

pytestmark = pytest.mark.usefixtures("poisoned")


def on_device(kept: KeptTokens) -> KeptTokens:
    return KeptTokens(kept.ids.to(DEVICE), kept.cu.to(DEVICE))


def case(
    num_tokens: int, size: int, vocab: int, most: int
) -> tuple[list[Tensor], Tensor, KeptTokens]:
    """Hidden states, head and bias; labels, some to ignore (one with nothing kept); and lists of 1
    to `most` tokens, each with its label, in no order."""
    rng = torch.Generator().manual_seed(num_tokens + vocab)
    hidden = torch.randn(size, num_tokens, generator=rng).t()  # columns lie together
    weight = torch.randn(size, vocab, generator=rng).t() * (3 / size**0.5)
    bias = torch.randn(vocab, generator=rng) - 20  # every logit negative
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    labels[:1], labels[1::7] = vocab - 1, -100
    lists = []
    for row, label in enumerate(labels.tolist()):
        count = int(torch.randint(1, most + 1, (1,), generator=rng))
        some = set(torch.randperm(vocab, generator=rng)[:count].tolist()) | {label}
        own = sorted(some - {-100}, key=lambda token: (token * 7919) % (vocab + 1))
        lists.append([] if row == 1 else own)
    ids = torch.tensor([token for own in lists for token in own], dtype=torch.int32)
    cu = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return [hidden, weight, bias], labels, KeptTokens(ids, cu)


CASES = [
    (0, 16, 32, 5, torch.float32, False),
    (1, 8, 1, 1, torch.float32, True),
    (9, 40, 257, 40, torch.float32, True),
    (15, 200, 50, 50, torch.float32, False),
    (9, 40, 257, 40, torch.bfloat16, False),
    (5, 64, 500, 300, torch.float16, True),
]


@pytest.mark.parametrize(("num_tokens", "size", "vocab", "most", "dtype", "per_token"), CASES)
def test_renormalised_log_probabilities_equal_float64(
    num_tokens: int, size: int, vocab: int, most: int, dtype: torch.dtype, per_token: bool
) -> None:
    tensors, labels, kept = case(num_tokens, size, vocab, most)
    narrow = [tensor.to(dtype) for tensor in tensors]
    rng = torch.Generator().manual_seed(3)
    temperature = torch.rand(num_tokens, generator=rng) + 0.5 if per_token else 0.7
    above = torch.randn(2, num_tokens, generator=rng)
    wide = [tensor.double().requires_grad_() for tensor in narrow]
    live = labels >= 0
    truth = reference.linear_logprob(
        wide[0][live], wide[1], labels[live], bias=wide[2], entropy=True,
        temperature=temperature[live] if isinstance(temperature, Tensor) else temperature,
        kept=_of(kept, live),
    )  # fmt: skip
    assert truth.entropy is not None
    loss = (truth.logprob * above[0][live] + truth.entropy * above[1][live]).sum()
    true_grads = torch.autograd.grad(loss, wide)

    near = [tensor.to(DEVICE).requires_grad_() for tensor in narrow]
    found = linear_logprob(
        near[0], near[1], labels.to(DEVICE), bias=near[2], entropy=True, kept=on_device(kept),
        temperature=temperature.to(DEVICE) if isinstance(temperature, Tensor) else temperature,
    )  # fmt: skip
    assert found.entropy is not None
    over = above.to(DEVICE)
    grads = torch.autograd.grad((found.logprob * over[0] + found.entropy * over[1]).sum(), near)
    there = live.to(DEVICE)
    if vocab > 1:
        assert relative(found.logprob[there], truth.logprob.detach()) < 1e-6
        assert relative(found.entropy[there], truth.entropy.detach()) < 1e-6
        for ours, true in zip(grads, true_grads, strict=True):
            assert relative(ours, true) < (5e-6 if dtype == torch.float32 else 4e-3)
    assert not found.logprob[~there].any()
    assert not found.entropy[~there].any()
    assert not grads[0][~there].any()


def _of(kept: KeptTokens, live: Tensor) -> KeptTokens:
    """The lists of some rows."""
    counts = kept.cu.diff()
    ids = kept.ids[torch.repeat_interleave(live, counts)]
    return KeptTokens(ids, torch.nn.functional.pad(counts[live].cumsum(0), (1, 0)))


def test_what_is_not_trained_gets_no_gradient_and_the_bias_may_be_alone() -> None:
    tensors, labels, kept = case(9, 24, 60, 12)
    near = [tensor.to(DEVICE) for tensor in tensors]
    everything = [tensor.clone().requires_grad_() for tensor in near]

    def gradients(leaves: list[Tensor], *wanted: int) -> tuple[Tensor, ...]:
        out = linear_logprob(
            leaves[0], leaves[1], labels.to(DEVICE), bias=leaves[2], kept=on_device(kept)
        )
        return torch.autograd.grad(out.logprob.sum(), [leaves[number] for number in wanted])

    whole = gradients(everything, 0, 1, 2)
    for number in range(3):
        leaves = [part.clone().requires_grad_(at == number) for at, part in enumerate(near)]
        (alone,) = gradients(leaves, number)
        torch.testing.assert_close(alone, whole[number], rtol=1e-5, atol=1e-6)
    again = gradients(everything, 0, 1, 2)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)


def test_a_label_that_was_not_kept_is_impossible() -> None:
    tensors, labels, kept = case(4, 8, 20, 5)
    labels[:] = torch.arange(4)
    ids, cu = torch.tensor([0, 9, 7, 8, 2, 3]).int(), torch.tensor([0, 2, 4, 5, 6])
    source = triton_kept.Source(
        tensors[0].to(DEVICE), tensors[1].to(DEVICE), tensors[2].to(DEVICE), 1.0, None
    )
    found = triton_kept.fold(source, labels.to(DEVICE), ids.to(DEVICE), cu.to(DEVICE))[0]
    assert found.isneginf().tolist() == [False, True, False, False]
    assert kept.ids.dtype == torch.int32


# Two chunks; slabs of the vocabulary.
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 1030), (HALF, 70)])
def test_a_loss_of_whole_and_kept_distributions_equals_float64(
    dtype: torch.dtype, vocab: int
) -> None:
    tensors, labels, kept = case(133, 16, vocab, 30)
    labels[1] = -100
    narrow = [tensor.to(dtype) for tensor in tensors]
    rng = torch.Generator().manual_seed(5)
    factors = torch.randn(3, 133, generator=rng)
    live = labels >= 0
    wide = [tensor.double().requires_grad_() for tensor in narrow]
    heads = [
        reference.linear_logprob(
            wide[0][live], wide[1], labels[live], bias=wide[2], entropy=True, kept=only
        )
        for only in (None, _of(kept, live))
    ]
    spread = heads[0].entropy
    assert spread is not None
    true_loss = (heads[0].logprob * factors[0, live] + spread * factors[1, live]).sum()
    true_loss = true_loss + (heads[1].logprob.exp() * factors[2, live]).sum()
    true_grads = torch.autograd.grad(true_loss, wide)

    over = factors.to(DEVICE)

    def token_loss(rows: slice, logprob: Tensor, entropy: Tensor, replayed: Tensor) -> Tensor:
        keep = (labels[rows] >= 0).to(DEVICE)
        loss = (logprob * over[0, rows] + entropy * over[1, rows]).sum()
        return loss + torch.where(keep, replayed.exp() * over[2, rows], 0.0).sum()

    near = [tensor.to(DEVICE).requires_grad_() for tensor in narrow]
    found = linear_loss(
        near[0], near[1], labels.to(DEVICE), token_loss, bias=near[2], entropy=True,
        kept=on_device(kept),
    )  # fmt: skip
    grads = torch.autograd.grad(found.loss, near)
    assert relative(found.replayed[live.to(DEVICE)], heads[1].logprob.detach()) < 1e-6
    assert relative(found.loss, true_loss.detach()) < 1e-5
    for ours, true in zip(grads, true_grads, strict=True):
        assert relative(ours, true) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_replay_finds_what_was_kept_and_its_log_probabilities() -> None:
    tensors, labels, _ = case(20, 16, 90, 10)
    labels = labels.clamp_min(0)
    hidden, weight = (tensor.contiguous().to(DEVICE) for tensor in tensors[:2])
    most = torch.full((20,), 7, device=DEVICE)
    seen = replay(
        hidden, weight, labels.to(DEVICE), lambda _, logits: logits > 1.0, most=most,
        temperature=0.8,
    )  # fmt: skip
    kept = KeptTokens(seen.kept.ids.cpu(), seen.kept.cu.cpu())
    wide = [tensor.double() for tensor in tensors[:2]]
    truth = reference.linear_logprob(wide[0], wide[1], labels, temperature=0.8, kept=kept)
    assert relative(seen.replayed, truth.logprob) < 1e-6
    assert int(kept.cu.diff().max()) <= 8


def test_the_operator_passes_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    tensors, labels, kept = case(9, 24, 60, 12)
    near = [tensor.to(DEVICE).contiguous().requires_grad_() for tensor in tensors]
    marked, lists = labels.clamp_min(-1).to(DEVICE), on_device(kept)
    arguments = (*near, marked, 0.7, None, True, 0, lists.ids, lists.cu)
    torch.library.opcheck(linear_logprob_op, arguments)

    def loss(rows: Tensor, head: Tensor) -> Tensor:
        out = linear_logprob(rows * 2, head, labels.to(DEVICE), entropy=True, kept=lists)
        assert out.entropy is not None
        return (out.logprob + out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(loss(*near[:2]), near[:2])
    traced = torch.autograd.grad(compiled(*near[:2]), near[:2])
    for one, other in zip(plain, traced, strict=True):
        assert torch.equal(one, other)
