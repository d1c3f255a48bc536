"""Are the kernels never slower than plain torch on this machine, and how accurate are they?

    python bench/bench_kernels.py --threads 1 --json bench/results/kernels_cpu_1t.json

Each pair runs alternately in one process, now one first and now the other: two warm-up calls, then
the median of the ratios of runs side by side, with their quartiles (of four times as many runs
where that median is within a fifth of 1); times are medians. Errors are relative norms against
float64. The GPU's table is `python -m bench.bench_kernels_cuda`; here its goals are
marked as missing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhfuse.algorithms.losses import (
    PolicyInputs,
    PolicyLossSettings,
    linear_policy_loss,
    policy_loss,
)
from rlhfuse.kernels import reference
from rlhfuse.kernels.gae import gae
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.logprob import token_logprob
from rlhfuse.kernels.whiten import whiten_batch

Run = Callable[[], Tensor]
_CLOSE = (0.8, 1.2)
GPU_GOALS = (
    "token_logprob >= 85 % of copy bandwidth",
    "linear_logprob forward >= 600 TFLOP/s, <= 64 MB extra",
    "linear_policy_loss <= 1.2 x the three-product floor",
    "gae one launch, <= 10 us device time up to 1M tokens in 512 sequences",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: medians in milliseconds, and of the runs' ratios with their quartiles;
    floating-point operations where they count."""

    name: str
    shape: str
    ours_ms: float
    plain_ms: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    repetitions: int
    ours_error: float
    plain_error: float
    gflops: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    name: str
    shape: str
    ours: Run
    plain: Run
    truth: Tensor
    flops: float | None = None


def measure(pair: Pair, repeats: int, clock: Callable[[], float]) -> Row:
    """Alternate the two, so that a slow moment of the machine meets both."""
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    errors = {}
    for name, run in (("ours", pair.ours), ("plain", pair.plain)):
        for _ in range(2):
            result = run()
        errors[name] = float(
            (result.detach().double() - pair.truth).norm() / pair.truth.norm().clamp_min(1e-30)
        )

    def ratios(rounds: int) -> list[float]:
        for number in range(rounds):
            order = [("ours", pair.ours), ("plain", pair.plain)]
            for name, run in order if number % 2 else reversed(order):
                start = clock()
                run()
                times[name].append(clock() - start)
        return [plain / ours for ours, plain in zip(times["ours"], times["plain"], strict=True)]

    found = ratios(repeats)
    if _CLOSE[0] < statistics.median(found) < _CLOSE[1]:
        found = ratios(3 * repeats)
    lower, middle, upper = statistics.quantiles(found, n=4, method="inclusive")
    ours, plain = (statistics.median(times[name]) * 1e3 for name in ("ours", "plain"))
    rate = None if pair.flops is None else pair.flops / ours / 1e6
    return Row(
        pair.name, pair.shape, ours, plain, middle, lower, upper, len(found), errors["ours"],
        errors["plain"], rate,
    )  # fmt: skip


def plain_logprob(logits: Tensor, labels: Tensor, temperature: float, entropy: bool) -> Tensor:
    """What people write: log_softmax, gather, and the entropy from both."""
    log_probs = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
    chosen = log_probs.gather(1, labels[:, None]).squeeze(1)
    if not entropy:
        return chosen
    return torch.stack([chosen, -(log_probs.exp() * log_probs).sum(-1)])


def both(logits: Tensor, labels: Tensor, temperature: float, entropy: bool) -> Tensor:
    out = token_logprob(logits, labels, temperature=temperature, entropy=entropy)
    return out.logprob if out.entropy is None else torch.stack([out.logprob, out.entropy])


def logits_pairs(num_tokens: int, vocab: int, temperature: float = 0.9) -> list[Pair]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, vocab, generator=rng) * 3
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    leaf = logits.clone().requires_grad_()
    wide = logits.double().requires_grad_()
    shape = f"T={num_tokens} V={vocab} t={temperature}"

    def ours(rows: Tensor, entropy: bool) -> Tensor:
        return both(rows, labels, temperature, entropy)

    def plain(rows: Tensor, entropy: bool) -> Tensor:
        return plain_logprob(rows, labels, temperature, entropy)

    def gradient(run: Callable[[Tensor, bool], Tensor], at: Tensor, entropy: bool) -> Tensor:
        (grad,) = torch.autograd.grad(run(at, entropy).sum(), at)
        return grad

    pairs = []
    for entropy in (False, True):
        name = "token_logprob" + ("+entropy" if entropy else "")
        forward = partial(ours, logits, entropy), partial(plain, logits, entropy)
        pairs.append(Pair(f"{name} forward", shape, *forward, plain(wide.detach(), entropy)))
        backward = partial(gradient, ours, leaf, entropy), partial(gradient, plain, leaf, entropy)
        truth = gradient(plain, wide, entropy)
        pairs.append(Pair(f"{name} forward+backward", shape, *backward, truth))
    return pairs


def kept_pair(num_tokens: int, hidden_size: int, vocab: int, num_kept: int) -> Pair:
    """The log-probability among what a sampler kept, of random tokens and the label."""
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng)
    weight = torch.randn(vocab, hidden_size, generator=rng) * 0.1
    ids = torch.rand(num_tokens, vocab, generator=rng).topk(num_kept).indices
    labels, cu = ids[:, 0].clone(), torch.arange(num_tokens + 1) * num_kept
    kept = reference.KeptTokens(ids.flatten().int(), cu)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logits = h @ w.T
        dropped = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids, False)
        return plain_logprob(logits.masked_fill(dropped, -torch.inf), labels, 1.0, False)

    def by_weight(run: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Run:
        leaves = [part.to(dtype).requires_grad_() for part in (hidden, weight)]
        return lambda: torch.autograd.grad(run(leaves[0], leaves[1]).sum(), leaves)[1]

    return Pair(
        f"linear_logprob, {num_kept} kept, forward+backward",
        f"T={num_tokens} H={hidden_size} V={vocab}",
        by_weight(lambda h, w: linear_logprob(h, w, labels, kept=kept).logprob, torch.float32),
        by_weight(plain, torch.float32),
        by_weight(plain, torch.float64)(),
        6.0 * num_tokens * hidden_size * vocab,
    )


def linear_pairs(num_tokens: int, hidden_size: int, vocab: int) -> list[Pair]:
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, generator=rng) * 0.1).requires_grad_()
    labels = torch.randint(0, vocab, (num_tokens,), generator=rng)
    shape = f"T={num_tokens} H={hidden_size} V={vocab}"
    product = 2.0 * num_tokens * hidden_size * vocab
    with torch.no_grad():
        now = linear_logprob(hidden, weight, labels).logprob
    inputs = PolicyInputs(
        logprobs=torch.empty(0),
        old_logprobs=now + 0.1 * torch.randn(num_tokens, generator=rng),
        advantages=torch.randn(num_tokens, generator=rng),
        cu_seqlens=torch.tensor([0, num_tokens]).int(),
    )
    settings = PolicyLossSettings()

    def apart(h: Tensor, w: Tensor) -> Tensor:
        logprobs = plain_logprob(h @ w.T, labels, 1.0, False)
        full = PolicyInputs(
            logprobs=logprobs,
            old_logprobs=inputs.old.to(h.dtype),
            advantages=inputs.advantages.to(h.dtype),
            cu_seqlens=inputs.cu_seqlens,
        )
        return policy_loss(full, settings, normalizer=float(num_tokens)).loss

    def fused() -> Tensor:
        return linear_policy_loss(
            hidden, weight, labels, inputs, settings, normalizer=float(num_tokens)
        ).loss

    def head(h: Tensor, w: Tensor) -> Tensor:
        return plain_logprob(h @ w.T, labels, 1.0, False)

    def by_weight(loss: Tensor, w: Tensor) -> Tensor:
        return torch.autograd.grad(loss, [w, hidden] if w is weight else [w])[0]

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    with torch.no_grad():
        truth = head(*wide)

    @torch.no_grad()
    def forward_ours() -> Tensor:
        return linear_logprob(hidden, weight, labels).logprob

    @torch.no_grad()
    def forward_plain() -> Tensor:
        return head(hidden, weight)

    return [
        Pair("linear_logprob forward", shape, forward_ours, forward_plain, truth, product),
        Pair(
            "linear_logprob forward+backward",
            shape,
            lambda: by_weight(linear_logprob(hidden, weight, labels).logprob.sum(), weight),
            lambda: by_weight(head(hidden, weight).sum(), weight),
            by_weight(head(*wide).sum(), wide[1]),
            3 * product,
        ),
        Pair(
            "linear_policy_loss forward+backward",
            shape,
            lambda: by_weight(fused(), weight),
            lambda: by_weight(apart(hidden, weight), weight),
            by_weight(apart(*wide), wide[1]),
            3 * product,
        ),
    ]


def gae_pairs(num_sequences: int, length: int) -> list[Pair]:
    rng = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, num_sequences, length, generator=rng)
    cu_seqlens = (torch.arange(num_sequences + 1) * length).int()
    flat = rewards.flatten(), values.flatten()

    def loop() -> Tensor:
        advantage = following = torch.zeros(num_sequences)
        columns = []
        for t in range(length - 1, -1, -1):
            delta = rewards[:, t] + 0.99 * following - values[:, t]
            advantage = delta + 0.99 * 0.95 * advantage
            following = values[:, t]
            columns.append(advantage)
        return torch.stack(columns[::-1], 1).flatten()

    truth = gae(flat[0].double(), flat[1].double(), cu_seqlens, gamma=0.99, lam=0.95).advantages
    head = slice(0, 2 * length)
    check = reference.gae(
        flat[0][head].double(), flat[1][head].double(), cu_seqlens[:3], gamma=0.99, lam=0.95
    )
    assert torch.allclose(truth[head], check.advantages, rtol=1e-12, atol=1e-12)
    mean, variance = flat[0].double().mean(), flat[0].double().var()
    shape = f"{num_sequences} x {length}"
    return [
        Pair(
            "gae against a loop over time",
            shape,
            lambda: gae(*flat, cu_seqlens, gamma=0.99, lam=0.95).advantages,
            loop,
            truth,
        ),
        Pair(
            "whiten",
            shape,
            lambda: whiten_batch(flat[0], cu_seqlens),
            lambda: (flat[0] - flat[0].mean()) * torch.rsqrt(flat[0].var() + 1e-8),
            (flat[0].double() - mean) * (variance + 1e-8).rsqrt(),
        ),
    ]


def all_pairs(quick: bool) -> list[Pair]:
    if quick:
        heads = [*linear_pairs(64, 32, 512), kept_pair(64, 32, 512, 8)]
        return [*logits_pairs(64, 512), *heads, *gae_pairs(8, 128)]
    return [
        *logits_pairs(2048, 4096),
        *logits_pairs(256, 32_000),
        *logits_pairs(256, 32_000, temperature=1.0),
        *linear_pairs(1024, 256, 4096),
        *linear_pairs(512, 256, 32_000),
        kept_pair(512, 256, 32_000, 32),
        *gae_pairs(64, 256),
        *gae_pairs(64, 4096),
        *gae_pairs(512, 1024),
    ]


def machine(threads: int) -> dict[str, str | int]:
    """What the numbers belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # One thread: its own processor seconds, which other load on the machine hardly touches.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rows = []
    for pair in all_pairs(options.quick):
        row = measure(pair, options.repeats, clock)
        rows.append(row)
        print(
            f"{row.name:38} {row.shape:22} {row.ours_ms:9.2f} ms  plain {row.plain_ms:9.2f} ms  "
            f"x{row.speedup:6.2f} ({row.speedup_lower:.2f} to {row.speedup_upper:.2f})  "
            f"error {row.ours_error:.1e} (plain {row.plain_error:.1e})"
        )
    result = {
        "machine": machine(options.threads),
        "clock": "processor seconds" if options.threads == 1 else "wall seconds",
        "command": " ".join(["python", *sys.argv]),
        "rows": [asdict(row) for row in rows],
        "not_measured_here": list(GPU_GOALS),
        "measured_by": "python -m bench.bench_kernels_cuda",
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
