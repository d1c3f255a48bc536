"""Both log-probability functions against float64, and the company law: bit-identical results."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhfuse.kernels import compiled_rows, reference, rows, team
from rlhfuse.kernels import linear_logprob as linear_module
from rlhfuse.kernels.linear_logprob import linear_logprob, linear_logprob_op
from rlhfuse.kernels.linear_loss import linear_loss
from rlhfuse.kernels.logprob import token_logprob, token_logprob_op


def relative(found: Tensor, truth: Tensor) -> float:
    assert not found.isnan().any()
    return float((found.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic mode: torch fills every fresh tensor with NaN, so that unwritten results are
    seen. And some hundred tokens are several chunks."""
    monkeypatch.setattr(linear_module, "_MAX_ROWS", 512)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels \[T\]"):
        token_logprob(torch.zeros(3, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match="temperature"):
        token_logprob(torch.zeros(3, 4), torch.zeros(3).long(), temperature=torch.ones(2))
    with pytest.raises(ValueError, match="weight"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3).long())


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
