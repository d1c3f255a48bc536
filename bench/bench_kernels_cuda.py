"""The kernels on a CUDA GPU beside plain torch, torch.compile, Liger-Kernel, verl and TRL.

    python -m bench.bench_kernels_cuda

Not run so far: no GPU was at hand. Every figure comes from this one run, ceilings included (copy
bandwidth, bf16 matrix products); whoever cannot be imported or fails is listed with its reason.
Times are medians of CUDA events after warm-up, `gae` also replayed from a CUDA graph. `--device
cpu` tries the program on tiny shapes; its times mean nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.record import Row, print_table, write_result
from rlhfuse.algorithms.losses import (
    PolicyInputs,
    PolicyLossSettings,
    linear_policy_loss,
    policy_loss,
)
from rlhfuse.kernels.gae import whitened_gae
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.logprob import token_logprob

Run = Callable[[], Tensor]
CHECKED = 64  # rows whose log-probabilities are compared with float64


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device does at best: bytes and floating-point operations a second."""

    copy: float
    product: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What counts: bytes moved or operations done in one run, against a ceiling."""

    name: str
    shape: str
    bytes_moved: float = 0.0
    operations: float = 0.0


def seconds(run: Run, device: torch.device, repeats: int = 20) -> float:
    """Median time of one run on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return float(statistics.median(times))


def graphed(run: Run, device: torch.device) -> Run:
    """The same work replayed from a CUDA graph: device time without launches."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def extra_memory(run: Run, device: torch.device) -> float:
    """MiB that a run needs at its peak beyond what was there before it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device, size: int) -> Ceilings:
    source = torch.empty(size * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = seconds(lambda: left @ left, device)
    return Ceilings(2.0 * source.nbytes / copy, 2.0 * size**3 / product)


def row(
    goal: Goal, who: str, run: Run, truth: Tensor | None, device: torch.device, most: Ceilings
) -> Row:
    """One line of the table; a contender that fails says why."""
    try:
        found = run()
        error = -1.0
        if truth is not None:
            error = float((found[: len(truth)].double() - truth).abs().max())
        del found
        memory, spent = extra_memory(run, device), seconds(run, device)
    except Exception as reason:  # a contender's failure is a result
        return _line(goal, who, f"{type(reason).__name__}: {reason}"[:80])
    share = goal.bytes_moved / spent / most.copy + goal.operations / spent / most.product
    rate = goal.operations / spent / 1e12
    return _line(goal, who, "", spent * 1e3, memory, error, share, rate)


def _line(
    goal: Goal, who: str, missing: str, ms: float = -1.0, extra_mib: float = -1.0,
    max_error: float = -1.0, of_ceiling: float = -1.0, tflops: float = -1.0,
) -> Row:  # fmt: skip
    return {
        "goal": goal.name, "shape": goal.shape, "who": who, "ms": ms, "extra_mib": extra_mib,
        "max_error": max_error, "of_ceiling": of_ceiling, "tflops": tflops, "missing": missing,
    }  # fmt: skip


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, labels[:, None]).squeeze(1)


def plain_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain(hidden @ weight.T, labels)


def _theirs(module: str, name: str) -> Any:
    """A peer's function; its absence shows when it is called."""
    return getattr(import_module(module), name)


def logits_rows(device: torch.device, tokens: int, vocab: int, most: Ceilings) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, vocab, device=device, generator=generator).bfloat16() * 3
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    truth = plain64(logits[:CHECKED], labels[:CHECKED])
    leaf = logits.requires_grad_()
    shape, compiled = f"T={tokens} V={vocab}", torch.compile(plain)
    contenders: dict[str, Callable[[], Tensor]] = {
        "rlhfuse": lambda: token_logprob(leaf, labels, entropy=True).logprob,
        "torch": lambda: plain(leaf, labels),
        "torch.compile": lambda: compiled(leaf, labels),
        "Liger": lambda: _theirs(
            "liger_kernel.transformers.grpo_loss", "fused_selective_log_softmax"
        )(torch.cat([leaf, leaf[:1]])[None].detach(), labels[None], 1.0)[0],
        "TRL": lambda: _theirs("trl.trainer.utils", "selective_log_softmax")(leaf, labels),
    }
    once = 2.0 * tokens * vocab
    for who, run in contenders.items():
        with torch.no_grad():
            yield row(Goal("token_logprob forward", shape, once), who, run, truth, device, most)
        if who == "Liger":  # no gradient
            continue
        goal = Goal("token_logprob forward+backward", shape, 3 * once)
        yield row(goal, who, _with_gradient(run, [leaf]), None, device, most)


def plain64(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1).gather(1, labels[:, None]).squeeze(1)


def _with_gradient(run: Run, leaves: list[Tensor]) -> Run:
    def both() -> Tensor:
        return torch.autograd.grad(run().sum(), leaves)[0]

    return both


def head_rows(
    device: torch.device, tokens: int, size: int, vocab: int, most: Ceilings
) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(tokens, size, device=device, generator=generator).bfloat16()
    weight = torch.randn(vocab, size, device=device, generator=generator).bfloat16() / size**0.5
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    truth = plain64(hidden[:CHECKED].double() @ weight.double().T, labels[:CHECKED])
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    shape, compiled = f"T={tokens} H={size} V={vocab}", torch.compile(plain_head)
    contenders: dict[str, Callable[[], Tensor]] = {
        "rlhfuse": lambda: linear_logprob(hidden, weight, labels, entropy=True).logprob,
        "torch": lambda: plain(hidden @ weight.T, labels),
        "torch.compile": lambda: compiled(hidden, weight, labels),
        "Liger": lambda: (
            -_theirs("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")(
                hidden, weight, labels, reduction="none"
            )
        ),
        "verl": lambda: _theirs("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")(
            hidden, weight, labels, 1.0, "none", None
        )[0],
        "TRL": lambda: _theirs("trl.trainer.utils", "_ChunkedLogProbFunction").apply(  # of 1.13
            hidden, weight, None, labels, 1.0, 8192
        )[0],
    }
    product = 2.0 * tokens * size * vocab
    for who, run in contenders.items():
        with torch.no_grad():
            goal = Goal("linear_logprob forward", shape, operations=product)
            yield row(goal, who, run, truth, device, most)
        goal = Goal("linear_logprob forward+backward", shape, operations=4 * product)
        yield row(goal, who, _with_gradient(run, leaves), None, device, most)
    inputs = PolicyInputs(
        logprobs=torch.empty(0),
        old_logprobs=torch.full((tokens,), -10.0, device=device),
        advantages=torch.randn(tokens, device=device, generator=generator),
        cu_seqlens=torch.tensor([0, tokens], device=device, dtype=torch.int32),
    )
    settings = PolicyLossSettings()

    def fused() -> Tensor:
        return linear_policy_loss(
            hidden, weight, labels, inputs, settings, normalizer=float(tokens)
        ).loss

    def apart(head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        full = replace(inputs, logprobs=head(hidden, weight, labels))
        return policy_loss(full, settings, normalizer=float(tokens)).loss

    goal = Goal("linear_policy_loss forward+backward", shape, operations=3 * product)
    for who, run in {
        "rlhfuse": fused,
        "torch": lambda: apart(plain_head),
        "torch.compile": lambda: apart(compiled),
    }.items():
        yield row(goal, who, _with_gradient(run, leaves), None, device, most)


def gae_rows(device: torch.device, sequences: int, length: int, most: Ceilings) -> Iterator[Row]:
    rewards, values = torch.randn(2, sequences * length, device=device)
    bounds = (torch.arange(sequences + 1, device=device) * length).int()

    def run() -> Tensor:
        return whitened_gae(rewards, values, bounds, gamma=0.99, lam=0.95).advantages

    goal = Goal("gae, whitened", f"{sequences} x {length}", 24.0 * rewards.numel())
    yield row(goal, "rlhfuse", run, None, device, most)
    yield row(goal, "rlhfuse, CUDA graph", graphed(run, device), None, device, most)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is here: nothing measured", file=sys.stderr)
        return 1
    small = device.type == "cpu"
    most = ceilings(device, 256 if small else 8192)
    print(f"copy {most.copy / 1e12:.2f} TB/s, bf16 product {most.product / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for vocab in (300,) if small else (32_000, 128_256, 151_936):
        for tokens in (128,) if small else (8192, 16_384, 65_536):
            rows += logits_rows(device, tokens, vocab, most)
            rows += head_rows(device, tokens, 64 if small else 4096, vocab, most)
    for sequences, length in ((4, 64),) if small else ((64, 1024), (512, 2048), (512, 8192)):
        rows += gae_rows(device, sequences, length, most)
    print_table(rows)
    if not small:
        limits = {"copy_bytes_per_s": most.copy, "product_flops_per_s": most.product}
        print(f"wrote {write_result('kernels_cuda', [row_ | limits for row_ in map(dict, rows)])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
