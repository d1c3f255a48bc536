"""Log-probabilities from hidden states and a head against float64, and the company law."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhfuse.kernels import head_chunks, reference
from rlhfuse.kernels.linear_logprob import linear_logprob, linear_logprob_op
from rlhfuse.kernels.linear_loss import linear_loss
from rlhfuse.kernels.logprob import token_logprob
from tests.kernels.against_float64 import relative

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def chunks_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred tokens are several chunks."""
    monkeypatch.setattr(head_chunks, "_MAX_ROWS", 512)


LINEAR_CASES = [
    (0, 48, 1031, "plain", torch.float32),
    (1, 48, 1, "plain", torch.float32),
    (15, 48, 1031, "ignored", torch.float32),
    (700, 48, 1031, "per token", torch.float32),
    (257, 24, 2048, "negative", torch.float32),
    (530, 16, 127, "masked", torch.float32),
    (9, 8, 262_144, "last", torch.float32),
    (66_000, 8, 5, "plain", torch.float32),
    (90, 64, 3001, "per token", torch.bfloat16),
    (90, 64, 3001, "masked", torch.float16),
]


def linear_case(
    num_tokens: int, hidden_size: int, vocab: int, kind: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, float | Tensor, Tensor]:
    """Hidden states, weight and bias (logits of deviation 3, as a model's), labels, temperature,
    and what comes from above; hidden states and weight do not lie end to end."""
    rng = torch.Generator().manual_seed(num_tokens + vocab)
    hidden = torch.randn(hidden_size, num_tokens, generator=rng).t()
    weight = torch.randn(hidden_size, vocab, generator=rng).t() * (3 / hidden_size**0.5)
    bias = torch.randn(vocab, generator=rng) * 0.3 - (100.0 if kind == "negative" else 0.0)
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    if kind == "masked":  # half of the vocabulary cannot occur
        bias[: vocab // 2] = -torch.inf
        labels = vocab // 2 + labels // 2
    elif kind == "ignored":
        labels[::2] = -100
    elif kind == "last":
        labels.fill_(vocab - 1)
    temperature: float | Tensor = 0.8
    if kind == "per token":
        temperature = torch.rand(num_tokens, generator=rng) + 0.5
    tensors = [tensor.to(dtype) for tensor in (hidden, weight, bias)]
    return tensors, labels, temperature, torch.randn(2, num_tokens, generator=rng)


def linear_gradients(
    function: object, tensors: list[Tensor], labels: Tensor, temperature: float | Tensor,
    above: Tensor, **options: int,
) -> list[Tensor]:  # fmt: skip
    """Log-probabilities and entropies, then the gradients by hidden states, weight and bias."""
    hidden, weight, bias = (tensor.detach().requires_grad_() for tensor in tensors)
    assert callable(function)
    out = function(
        hidden, weight, labels, bias=bias, temperature=temperature, entropy=True, **options
    )
    loss = (out.logprob * above[0] + out.entropy * above[1]).sum()
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    return [out.logprob.detach(), out.entropy.detach(), *grads]


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_logprob_equals_float64_and_recomputing_changes_no_bit(
    case: tuple[int, int, int, str, torch.dtype],
) -> None:
    *_, vocab, _, dtype = case
    tensors, labels, temperature, above = linear_case(*case)

    def run(function: object, tensors: list[Tensor], **options: int) -> list[Tensor]:
        return linear_gradients(function, tensors, labels, temperature, above, **options)

    truth = run(reference.linear_logprob, [tensor.double() for tensor in tensors])
    plain = run(reference.linear_logprob, tensors)
    kept, again = run(linear_logprob, tensors), run(linear_logprob, tensors, keep_logits_bytes=0)
    for found, true in zip(kept[:2], truth[:2], strict=True):
        assert found.dtype == torch.float32
        assert relative(found, true) < 1e-6 or vocab == 1
    for found, recomputed, other, true in zip(
        kept[2:], again[2:], plain[2:], truth[2:], strict=True
    ):
        assert torch.equal(found, recomputed)
        bound = 2e-6 if dtype == torch.float32 else 4e-3
        # Sums of many terms of both signs: there plain torch's error may be the greater one.
        assert relative(found, true) < max(bound, relative(other, true)) or vocab == 1


def test_a_heads_gradients_in_bf16_are_no_worse_than_plain_torchs() -> None:
    rng = torch.Generator().manual_seed(9)
    factors = torch.randn(600, 64, generator=rng), torch.randn(1003, 64, generator=rng) * 0.4
    labels, above = torch.randint(0, 1003, (600,), generator=rng), torch.randn(600, generator=rng)

    def grads(dtype: torch.dtype, kind: str) -> tuple[Tensor, ...]:
        hidden, weight = (part.bfloat16().to(dtype).requires_grad_() for part in factors)
        if kind == "plain":
            rows = torch.log_softmax(hidden @ weight.T, -1)
            loss = (rows.gather(1, labels[:, None]).squeeze(1) * above.to(dtype)).sum()
        elif kind == "apart":
            loss = (linear_logprob(hidden, weight, labels).logprob * above).sum()
        else:
            loss = linear_loss(
                hidden, weight, labels, lambda part, logp, *_: (logp * above[part]).sum()
            ).loss
        return torch.autograd.grad(loss, [hidden, weight])

    truth, theirs = grads(torch.float64, "plain"), grads(torch.bfloat16, "plain")
    for kind in ("apart", "fused"):
        for ours, plain, true in zip(grads(torch.bfloat16, kind), theirs, truth, strict=True):
            assert relative(ours, true) < min(4e-3, relative(plain, true))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**31), st.sampled_from([(8, 5), (64, 512), (96, 4097)]))
def test_a_tokens_result_does_not_depend_on_its_company(
    num_chosen: int, seed: int, shape: tuple[int, int]
) -> None:
    hidden_size, vocab = shape
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(600, hidden_size, generator=rng)
    weight = torch.randn(vocab, hidden_size, generator=rng)
    labels = torch.randint(0, vocab, (600,), generator=rng)
    everyone = linear_logprob(hidden, weight, labels, temperature=0.9, entropy=True)
    chosen = torch.randperm(600, generator=rng)[:num_chosen]
    mine = hidden[chosen]
    if seed % 2:  # the memory layout must not matter either
        mine = mine.t().contiguous().t()
    few = linear_logprob(mine, weight, labels[chosen], temperature=0.9, entropy=True)
    assert everyone.entropy is not None
    assert few.entropy is not None
    assert torch.equal(few.logprob, everyone.logprob[chosen])
    assert torch.equal(few.entropy, everyone.entropy[chosen])


@pytest.mark.parametrize("keep_logits_bytes", [0, 64 << 20])
def test_replay_renormalises_over_the_kept_tokens(keep_logits_bytes: int) -> None:
    rng = torch.Generator().manual_seed(2)
    num_tokens, vocab = 530, 97
    hidden = torch.randn(num_tokens, 20, generator=rng)
    weight = torch.randn(vocab, 20, generator=rng) * 0.7
    ids = [torch.randperm(vocab, generator=rng)[: 1 + t % 9] for t in range(num_tokens)]
    kept = reference.KeptTokens(
        torch.cat(ids).int(), torch.tensor([0, *(len(own) for own in ids)]).cumsum(0).int()
    )
    labels = torch.stack([own[-1] for own in ids])
    grads = torch.randn(2, num_tokens, generator=rng)
    near, wide = (
        [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        for dtype in (torch.float32, torch.float64)
    )
    results = []
    for leaves, out in (
        (
            near,
            linear_logprob(
                near[0],
                near[1],
                labels,
                entropy=True,
                kept=kept,
                keep_logits_bytes=keep_logits_bytes,
            ),
        ),
        (
            wide,
            reference.linear_logprob(wide[0], wide[1], labels, entropy=True, kept=kept),
        ),
    ):
        assert out.entropy is not None
        loss = (out.logprob * grads[0] + out.entropy * grads[1]).sum()
        results.append([out.logprob, out.entropy, *torch.autograd.grad(loss, leaves)])
    for found, truth in zip(*results, strict=True):
        assert relative(found, truth.detach()) < 1e-6
    wrong = labels.scatter(0, torch.tensor([7]), 96 - ids[7][0])
    with pytest.raises(ValueError, match="token 7 is not among"):
        linear_logprob(hidden, weight, wrong, kept=kept)
    alone = [t for t in range(num_tokens) if len(ids[t]) == 1]
    assert not results[0][0][alone].any()  # the only token that was left has probability 1


def test_a_tied_weight_collects_both_gradients() -> None:
    rng = torch.Generator().manual_seed(1)
    table = torch.randn(40, 12, generator=rng).double().requires_grad_()
    ids = torch.randint(0, 40, (30,), generator=rng)
    (found,) = torch.autograd.grad(linear_logprob(table[ids], table, ids).logprob.sum(), table)
    (truth,) = torch.autograd.grad(
        reference.linear_logprob(table[ids], table, ids).logprob.sum(), table
    )
    assert relative(found, truth) < 1e-12


def test_a_weight_of_another_width_is_named() -> None:
    with pytest.raises(ValueError, match="weight"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3).long())


@pytest.mark.parametrize("keep_rows", [0, 16])
def test_the_linear_operator_passes_opcheck_and_torch_compile(keep_rows: int) -> None:
    rng = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 8, generator=rng).requires_grad_() for n in (16, 21))
    bias = torch.randn(21, generator=rng).requires_grad_()
    labels = torch.randint(-1, 21, (16,), generator=rng)
    arguments = (hidden, weight, bias, labels, 0.7, None, True, keep_rows, None, None)
    torch.library.opcheck(linear_logprob_op, arguments)

    def loss(rows: Tensor, head: Tensor) -> Tensor:
        out = linear_logprob(rows * 2, head, labels.clamp_min(0), bias=bias, entropy=True)
        assert out.entropy is not None
        return (out.logprob + out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(loss(hidden, weight), [hidden, weight, bias])
    traced = torch.autograd.grad(compiled(hidden, weight), [hidden, weight, bias])
    for one, other in zip(plain, traced, strict=True):
        assert torch.equal(one, other)


def test_autocast_narrows_the_factors_and_never_the_logits() -> None:
    rng = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 64, generator=rng).requires_grad_() for n in (30, 500))
    labels = torch.randint(0, 500, (30,), generator=rng)
    wide = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, weight)]
    truth = reference.linear_logprob(wide[0], wide[1], labels, temperature=0.7)
    true_grads = torch.autograd.grad(truth.logprob.sum(), wide)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(hidden, weight, labels, temperature=0.7)
        fused = linear_loss(
            hidden, weight, labels, lambda _, logp, *__: logp.sum(), temperature=0.7
        )
        rows = token_logprob(hidden, labels % 64)
        # Also the backward passes run in here: a product of theirs must not be narrowed either.
        grads = torch.autograd.grad(found.logprob.sum(), [hidden, weight])
        fused_grads = torch.autograd.grad(fused.loss, [hidden, weight])
    assert found.logprob.dtype == rows.logprob.dtype == torch.float32
    assert relative(found.logprob, truth.logprob.detach()) < 1e-6
    assert relative(fused.logprob, truth.logprob.detach()) < 1e-6
    for ours, true in zip([*grads, *fused_grads], [*true_grads] * 2, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, true) < 4e-3


def test_deterministic_mode_changes_no_bit() -> None:
    rng = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 24, generator=rng).requires_grad_() for n in (40, 300))
    labels = torch.randint(0, 300, (40,), generator=rng)

    def gradients() -> tuple[Tensor, ...]:
        out = linear_logprob(hidden, weight, labels, entropy=True)
        rows = token_logprob(hidden @ weight.T, labels, entropy=True)
        assert out.entropy is not None
        assert rows.entropy is not None
        loss = (out.logprob + out.entropy + rows.logprob * rows.entropy).sum()
        return torch.autograd.grad(loss, [hidden, weight])

    again = gradients()
    torch.use_deterministic_algorithms(False)
    plain = gradients()
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
