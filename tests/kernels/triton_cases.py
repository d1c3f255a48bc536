"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter.

`test_triton.py` runs this file in a process of its own: whether Triton interprets is decided
when it is first imported.
"""

import pytest
import torch
from torch import Tensor

from rlhfuse.kernels import reference, triton_linear
from rlhfuse.kernels.linear_logprob import linear_logprob, linear_logprob_op
from rlhfuse.kernels.linear_loss import linear_loss
from rlhfuse.kernels.logprob import token_logprob, token_logprob_op
from tests.kernels.against_float64 import DEVICE, HALF, relative

pytestmark = pytest.mark.usefixtures("poisoned")


CASES = [
    (1, 1, "plain", torch.float32),
    (3, 127, "negative", torch.float32),
    (4, 4097, "shifted", torch.float32),
    (3, 9000, "masked", torch.float32),
    (6, 64, "ignored", torch.float32),
    (4, 2176, "negative", torch.bfloat16),
    (4, 1000, "last", torch.float16),
    (0, 16, "plain", torch.float32),
    (2, 262_144, "last", torch.float32),
]


@pytest.mark.parametrize(("num_tokens", "vocab", "kind", "dtype"), CASES)
@pytest.mark.parametrize(("per_token", "inplace"), [(False, True), (True, False)])
def test_token_logprob_equals_float64(
    num_tokens: int, vocab: int, kind: str, dtype: torch.dtype, per_token: bool, inplace: bool
) -> None:
    rng = torch.Generator().manual_seed(vocab)
    logits = torch.randn(num_tokens, vocab, generator=rng) * 3
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    if kind in ("negative", "shifted"):
        logits = -logits.abs() - (100 if kind == "shifted" else 5)
    elif kind == "last":
        labels.fill_(vocab - 1)
    elif kind == "masked":
        logits[torch.rand(logits.shape, generator=rng) < 0.5] = -torch.inf
        logits[:, :5000] = -torch.inf  # the whole first block
        logits.scatter_(1, labels[:, None], 0.5)
    elif kind == "ignored":
        labels[::2] = -100
        logits[::4] = torch.nan
    logits = logits.to(dtype)
    temperature = torch.rand(num_tokens, generator=rng) + 0.5 if per_token else 0.7
    grads = torch.randn(2, num_tokens, generator=rng)
    keep = labels != -100
    wide = logits.double().requires_grad_()
    truth = reference.token_logprob(wide, labels, temperature=temperature, entropy=True)
    assert truth.entropy is not None
    ((truth.logprob * grads[0] + truth.entropy * grads[1])[keep]).sum().backward()

    leaf = logits.to(DEVICE).requires_grad_()
    rows = (leaf.t() * 1).t()  # columns lie together: the kernels must not care
    found = token_logprob(
        rows,
        labels.to(DEVICE),
        temperature=temperature.to(DEVICE) if isinstance(temperature, Tensor) else temperature,
        entropy=True,
        inplace_backward=inplace,
    )
    assert found.entropy is not None
    (found.logprob * grads[0].to(DEVICE) + found.entropy * grads[1].to(DEVICE)).sum().backward()
    assert relative(found.logprob, truth.logprob.detach()) < 1e-6
    assert relative(found.entropy, truth.entropy.detach()) < 1e-6 or vocab == 1
    assert leaf.grad is not None
    assert wide.grad is not None
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    assert relative(leaf.grad[keep.to(DEVICE)], wide.grad[keep]) < bound or vocab == 1
    assert not leaf.grad[~keep.to(DEVICE)].any()


def test_rows_that_lie_gigabytes_apart() -> None:
    stride, vocab = (1 << 31) + 5, 19
    torch.use_deterministic_algorithms(False)  # memory that nobody touches is free
    room = torch.empty(stride + vocab, dtype=torch.bfloat16, device=DEVICE)
    rows, near = room.as_strided((2, vocab), (stride, 1)), torch.randn(2, vocab).bfloat16()
    rows.copy_(near)
    labels = torch.tensor([3, vocab - 1])
    found = token_logprob(rows, labels.to(DEVICE)).logprob
    assert relative(found, reference.token_logprob(near.double(), labels).logprob) < 1e-6


@pytest.mark.skipif(DEVICE.type == "cpu", reason="6 ms a row in the interpreter")
def test_more_rows_than_a_grids_second_axis_holds() -> None:
    logits, labels = torch.randn(70_000, 3), torch.randint(0, 3, (70_000,))
    found = token_logprob(logits.to(DEVICE), labels.to(DEVICE)).logprob
    assert relative(found, reference.token_logprob(logits.double(), labels).logprob) < 1e-6


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vocab", "dtype", "kind"),
    [
        (1, 16, 1, torch.float32, "plain"),
        (5, 40, 257, torch.float32, "per token"),
        (33, 32, 700, torch.float32, "masked"),
        (3, 64, 2200, HALF, "per token"),
        (3, 64, 2200, HALF, "masked"),
        (0, 16, 32, torch.float32, "per token"),
        (66_000, 4, 3, torch.float32, "many"),
        (2, 4, 262_144, torch.float32, "many"),
    ],
)
def test_linear_logprob_equals_float64(
    num_tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "many" and DEVICE.type == "cpu":  # the interpreter pays by the program
        block = (4096, 16) if num_tokens > vocab else (16, 8192)
        monkeypatch.setattr(triton_linear, "tiles", lambda _: (*block, 16, 4))
    rng = torch.Generator().manual_seed(vocab)
    # Columns lie together: the kernels must not care.
    hidden = torch.randn(hidden_size, num_tokens, generator=rng).to(dtype).t()
    scale = 3 / hidden_size**0.5  # logits of deviation 3, as a model's
    weight = (torch.randn(hidden_size, vocab, generator=rng) * scale).to(dtype).t()
    bias = (torch.randn(vocab, generator=rng) - 20).to(dtype)  # every logit negative
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    if kind == "masked":  # also whole tiles and splits of the vocabulary cannot occur
        bias[: vocab // 2] = -torch.inf
        labels = vocab // 2 + labels // 2
    labels[:1], labels[1:2] = vocab - 1, -100
    per_token = kind == "per token"
    temperature = torch.rand(num_tokens, generator=rng) + 0.5 if per_token else 0.7
    grads = torch.randn(2, num_tokens, generator=rng)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    truth = reference.linear_logprob(
        wide[0], wide[1], labels, bias=wide[2], temperature=temperature, entropy=True
    )
    assert truth.entropy is not None
    true_grads = torch.autograd.grad(
        (truth.logprob * grads[0] + truth.entropy * grads[1]).sum(), wide
    )
    near = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight, bias)]
    found = linear_logprob(
        near[0],
        near[1],
        labels.to(DEVICE),
        bias=near[2],
        temperature=temperature.to(DEVICE) if isinstance(temperature, Tensor) else temperature,
        entropy=True,
    )
    assert found.entropy is not None
    on_device = grads.to(DEVICE)
    near_grads = torch.autograd.grad(
        (found.logprob * on_device[0] + found.entropy * on_device[1]).sum(), near
    )
    assert relative(found.logprob, truth.logprob.detach()) < 1e-6 or vocab == 1
    assert relative(found.entropy, truth.entropy.detach()) < 1e-6 or vocab == 1
    # Sums of many terms of both signs: plain torch in float32 has an error of 3e-5 there, too.
    exact = 2e-4 if kind == "many" else 5e-6
    for ours, true in zip(near_grads, true_grads, strict=True):
        assert relative(ours, true) < (exact if dtype == torch.float32 else 4e-3) or vocab == 1


def test_slabs_and_chunks_of_the_backward_pass_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "_SLAB", 64)
    monkeypatch.setattr(triton_linear, "_CHUNK_TOKENS", 32)
    test_linear_logprob_equals_float64(45, 40, 150, torch.float32, "per token", monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "entropy", "per_token"), [(torch.float32, True, True), (HALF, False, False)]
)
def test_linear_loss_equals_float64(dtype: torch.dtype, entropy: bool, per_token: bool) -> None:
    num_tokens, hidden_size, vocab = 133, 16, 1030  # two chunks, five slabs
    rng = torch.Generator().manual_seed(8)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=rng) * 0.5).to(dtype)
    bias = (torch.randn(vocab, generator=rng) - 20).to(dtype)
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    labels[:1], labels[1:2] = vocab - 1, -100
    temperature = torch.rand(num_tokens, generator=rng) + 0.5 if per_token else 0.7
    factors = torch.randn(2, num_tokens, generator=rng)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    out = reference.linear_logprob(
        wide[0], wide[1], labels, bias=wide[2], temperature=temperature, entropy=True
    )
    assert out.entropy is not None
    true_loss = (out.logprob.exp() * factors[0]).sum()
    true_loss = true_loss + (out.entropy * factors[1]).sum() * float(entropy)
    true_grads = torch.autograd.grad(true_loss, wide)
    near = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight, bias)]
    on_device = factors.to(DEVICE)

    def token_loss(rows: slice, logprob: Tensor, spread: Tensor, _: Tensor) -> Tensor:
        loss = (logprob.exp() * on_device[0, rows]).sum()
        return loss + (spread * on_device[1, rows]).sum() if entropy else loss

    found = linear_loss(
        near[0],
        near[1],
        labels.to(DEVICE),
        token_loss,
        bias=near[2],
        temperature=temperature.to(DEVICE) if isinstance(temperature, Tensor) else temperature,
        entropy=entropy,
    )
    grads = torch.autograd.grad(found.loss, near)
    assert relative(found.logprob, out.logprob.detach()) < 1e-6
    assert relative(found.loss, true_loss.detach()) < 1e-5
    for ours, true in zip(grads, true_grads, strict=True):
        assert relative(ours, true) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_rows_that_are_all_ignored_count_nowhere() -> None:
    rng = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 16, generator=rng).to(DEVICE) for n in (5, 40))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.full((5,), -100, device=DEVICE)
    logits = torch.full((5, 40), torch.nan, device=DEVICE).requires_grad_()
    rows = token_logprob(logits, labels, entropy=True)
    head = linear_logprob(hidden, weight, labels, entropy=True)
    fused = linear_loss(hidden, weight, labels, lambda _, logp, *__: (logp * 3).sum())
    for out in (rows, head):
        assert out.entropy is not None
        assert not out.logprob.any()
        assert not out.entropy.any()
    assert rows.entropy is not None
    assert head.entropy is not None
    loss = (rows.logprob + rows.entropy + head.logprob + head.entropy).sum() + fused.loss
    assert not loss
    for gradient in torch.autograd.grad(loss, [logits, hidden, weight]):
        assert not gradient.any()


def test_the_operators_pass_opcheck_and_a_compiled_graph_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 8, generator=rng).to(DEVICE) for n in (6, 21))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(-1, 21, (6,), generator=rng).to(DEVICE)
    temperatures = torch.linspace(0.5, 1.5, 6, device=DEVICE)
    short = ("test_schema", "test_faketensor", "test_autograd_registration")  # traced below
    arguments = (labels % 8, 1.0, temperatures, True, False)
    torch.library.opcheck(token_logprob_op, (hidden, *arguments), test_utils=short)
    of_head = (hidden, weight, None, labels, 0.7, None, True, 0, None, None)
    torch.library.opcheck(linear_logprob_op, of_head, test_utils=short)

    def loss(rows: Tensor, head: Tensor) -> Tensor:
        out = linear_logprob(
            rows * 2, head, labels.clamp_min(0), temperature=temperatures, entropy=True
        )
        own = token_logprob(rows * 2, labels % 8, temperature=temperatures)
        assert out.entropy is not None
        return (out.logprob + out.entropy + own.logprob).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    traced = torch.autograd.grad(compiled(hidden, weight), [hidden, weight])
    for one, other in zip(plain, traced, strict=True):
        assert torch.equal(one, other)
