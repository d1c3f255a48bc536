"""Log-probabilities from logits against float64; a row's bits do not depend on where it lies."""

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import compiled_rows, reference, rows, team
from rlhfuse.kernels.logprob import token_logprob, token_logprob_op
from tests.kernels.against_float64 import relative

pytestmark = pytest.mark.usefixtures("poisoned")


def make_logits(num_tokens: int, vocab: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab, generator=rng) * 3
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    if kind == "shifted":
        logits -= 100
    elif kind == "negative":
        logits = -logits.abs() - 5
    elif kind == "last":
        labels.fill_(vocab - 1)
    elif kind == "masked":
        logits[torch.rand(logits.shape, generator=rng) < 0.5] = -torch.inf
        logits.scatter_(1, labels[:, None], 0.5)
    elif kind == "ignored":
        labels[::2] = -100
        logits[::4] = torch.nan
    return logits, labels


CASES = [
    (1, 1, "plain"),
    (1, 5000, "plain"),
    (7, 127, "negative"),
    (33, 1025, "shifted"),
    (40, 128, "last"),
    (9, 3001, "masked"),
    (10, 64, "ignored"),
    (3, 70_000, "negative"),
    (2, 262_144, "last"),
    (66_000, 5, "plain"),
    (0, 16, "plain"),
]


@pytest.mark.parametrize(("num_tokens", "vocab", "kind"), CASES)
@pytest.mark.parametrize("per_token", [False, True])
def test_token_logprob_equals_float64(
    num_tokens: int, vocab: int, kind: str, per_token: bool
) -> None:
    logits, labels = make_logits(num_tokens, vocab, kind, seed=num_tokens + vocab)
    temperature = torch.rand(num_tokens) + 0.5 if per_token else 0.7
    grads = torch.randn(2, num_tokens)
    wide = logits.double().requires_grad_()
    truth = reference.token_logprob(wide, labels, temperature=temperature, entropy=True)
    assert truth.entropy is not None
    keep = labels != -100
    ((truth.logprob * grads[0] + truth.entropy * grads[1])[keep]).sum().backward()
    narrow = logits.clone().requires_grad_()
    found = token_logprob(narrow, labels, temperature=temperature, entropy=True)
    assert found.entropy is not None
    (found.logprob * grads[0] + found.entropy * grads[1]).sum().backward()
    assert relative(found.logprob, truth.logprob.detach()) < 1e-6
    assert relative(found.entropy, truth.entropy.detach()) < 1e-6 or vocab == 1
    assert narrow.grad is not None
    assert wide.grad is not None
    assert relative(narrow.grad[keep], wide.grad[keep]) < 2e-6 or vocab == 1
    assert not narrow.grad[~keep].any()
    alone = token_logprob(logits, labels, temperature=temperature)
    assert alone.entropy is None
    assert torch.equal(alone.logprob, found.logprob)


@pytest.mark.parametrize(("vocab", "temperature"), [(4000, 0.7), (32_000, 0.7), (32_000, 1.0)])
@pytest.mark.parametrize(("spread", "shift"), [(3.0, 0.0), (8.0, 0.0), (3.0, 20.0), (3.0, -90.0)])
def test_the_largest_error_is_about_one_rounding(
    vocab: int, temperature: float, spread: float, shift: float
) -> None:
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=rng) * spread + shift
    labels = torch.randint(0, vocab, (64,), generator=rng)
    found = token_logprob(logits, labels, temperature=temperature).logprob
    truth = reference.token_logprob(logits.double(), labels, temperature=temperature).logprob
    half_step = (torch.nextafter(found, torch.tensor(torch.inf)) - found).double() / 2
    assert bool(((found.double() - truth).abs() <= half_step + 2.5e-6).all())
    assert bool((found <= 0.0).all())
    assert float((found.double() - truth).abs().max()) < 5e-6 or spread > 3.0


@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_does_not_depend_on_its_place_or_on_how_many_threads_there_are(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "_PIECE", 5000)
    assert (team._fork() is not None) == torch.backends.openmp.is_available()
    monkeypatch.setattr(rows, "COMPILED_VOCAB", 0 if compiled else 1 << 30)
    rng = torch.Generator().manual_seed(7)
    before = torch.get_num_threads()
    for vocab in (33, 1003, 40_001):
        logits = torch.randn(23, vocab, generator=rng) * 3
        logits[5] -= 200  # its maximum must be taken off, that of its neighbours not
        labels = torch.randint(0, vocab, (23,), generator=rng)
        found = []
        try:
            for threads, own in ((1, slice(0, 23)), (2, slice(0, 23)), (2, slice(4, 7)),
                                  (3, slice(5, 6)), (1, slice(5, 23))):  # fmt: skip
                torch.set_num_threads(threads)
                leaf = logits[own].clone().requires_grad_()
                out = token_logprob(leaf, labels[own], temperature=0.9, entropy=True)
                assert out.entropy is not None
                (grad,) = torch.autograd.grad((out.logprob + 0.3 * out.entropy).sum(), leaf)
                found.append((own, out.logprob.detach(), out.entropy.detach(), grad))
        finally:
            torch.set_num_threads(before)
        for own, *parts in found[1:]:
            for part, whole in zip(parts, found[0][1:], strict=True):
                assert torch.equal(part, whole[own])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_compiled_equals_the_plain_path(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_rows, "_ROOM", 7000)  # rows that do not lie end to end: in parts
    rng = torch.Generator().manual_seed(9)
    results = []
    for kind in ("masked", "ignored", "shifted", "last"):
        logits, labels = make_logits(9, 2 * 3001, kind, seed=4)
        logits, above = logits.to(dtype)[:, ::2], torch.randn(2, 9, generator=rng)
        labels = torch.where(labels < 0, labels, labels // 2)
        if kind == "masked":
            logits.scatter_(1, labels[:, None], 0.5)
        for compiled_vocab in (1024, 4096):
            monkeypatch.setattr(rows, "COMPILED_VOCAB", compiled_vocab)
            leaf = logits.detach().requires_grad_()
            out = token_logprob(leaf, labels, temperature=0.9, entropy=True)
            assert out.entropy is not None
            loss = (out.logprob * above[0] + out.entropy * above[1]).sum()
            (grad,) = torch.autograd.grad(loss, leaf)
            results.append((out.logprob.detach(), out.entropy.detach(), grad))
    for compiled, plain in zip(results[::2], results[1::2], strict=True):
        for bound, ours, theirs in zip((1e-6, 1e-6, 4e-3), compiled, plain, strict=True):
            assert relative(ours, theirs.double()) < bound


def test_a_nan_is_seen_and_a_label_outside_the_vocabulary_refused() -> None:
    logits, labels = make_logits(4, 2000, "plain", seed=4)
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, labels, entropy=True)
    assert out.logprob.isnan().tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(out.logprob.sum(), leaf)
    assert grad.isnan().any(1).tolist() == [False, True, True, False]
    labels[3] = 2000
    with pytest.raises(ValueError, match="label 2000"):
        token_logprob(leaf, labels)


def test_gradients_in_bf16_are_no_worse_than_plain_torchs() -> None:
    rng = torch.Generator().manual_seed(8)
    logits = (torch.randn(40, 3001, generator=rng) * 3).bfloat16()
    labels = torch.randint(0, 3001, (40,), generator=rng)
    above = torch.randn(40, generator=rng)
    wide, plain, ours = (
        logits.detach().to(dtype).requires_grad_()
        for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)
    )
    for leaf in (wide, plain):
        chosen = torch.log_softmax(leaf, -1).gather(1, labels[:, None]).squeeze(1)
        (chosen * above.to(leaf.dtype)).sum().backward()
    (token_logprob(ours, labels).logprob * above).sum().backward()
    assert wide.grad is not None
    assert plain.grad is not None
    assert ours.grad is not None
    assert relative(ours.grad, wide.grad) < min(4e-3, relative(plain.grad, wide.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_folded_in_float32(dtype: torch.dtype) -> None:
    logits, labels = make_logits(50, 4099, "plain", seed=3)
    half = logits.to(dtype).requires_grad_()
    truth = reference.token_logprob(half.detach().double(), labels, temperature=0.7)
    found = token_logprob(half, labels, temperature=0.7)
    assert found.logprob.dtype == torch.float32
    assert relative(found.logprob.detach(), truth.logprob) < 1e-6
    found.logprob.sum().backward()
    assert half.grad is not None
    wide = half.detach().double().requires_grad_()
    reference.token_logprob(wide, labels, temperature=0.7).logprob.sum().backward()
    assert wide.grad is not None
    assert relative(half.grad, wide.grad) < 4e-3


def test_backward_in_place_writes_over_the_logits() -> None:
    logits, labels = make_logits(20, 300, "plain", seed=5)
    plain = logits.clone().requires_grad_()
    token_logprob(plain, labels).logprob.sum().backward()
    leaf = logits.clone().requires_grad_()
    rows = leaf * 1.0
    token_logprob(rows, labels, inplace_backward=True).logprob.sum().backward()
    assert leaf.grad is not None
    assert plain.grad is not None
    assert torch.equal(leaf.grad, plain.grad)
    assert torch.equal(rows.detach(), plain.grad)


def test_non_contiguous_rows() -> None:
    logits, labels = make_logits(60, 90, "plain", seed=6)
    strided = logits.t().contiguous().t()[::3]
    found = token_logprob(strided, labels[::3])
    assert torch.equal(found.logprob, token_logprob(logits[::3].clone(), labels[::3]).logprob)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels \[T\]"):
        token_logprob(torch.zeros(3, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match="temperature"):
        token_logprob(torch.zeros(3, 4), torch.zeros(3).long(), temperature=torch.ones(2))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_operator_passes_opcheck_and_torch_compile(per_token: bool) -> None:
    logits, labels = make_logits(5, 7, "plain", seed=1)
    logits.requires_grad_()
    temperatures = torch.rand(5) + 0.5 if per_token else None
    torch.library.opcheck(token_logprob_op, (logits, labels, 0.7, temperatures, True, False))

    def loss(rows: Tensor) -> Tensor:
        temperature = 0.7 if temperatures is None else temperatures
        out = token_logprob(rows * 2, labels, temperature=temperature, entropy=True)
        assert out.entropy is not None
        return (out.logprob + out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (plain,) = torch.autograd.grad(loss(logits), logits)
    (traced,) = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(plain, traced)
