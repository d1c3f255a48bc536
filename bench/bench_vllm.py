"""One vLLM instance on a CPU: sampler, near ties, migration, sleep and weight update.

    OMP_NUM_THREADS=1 python -m bench.bench_vllm [ties] [exactness] [sampler] [migration] [memory]
        [weights] [--repetitions 5]

A random Llama, 4 layers, 256 wide; one thread. Nothing is simulated. Medians over the repetitions,
the least and the most beside.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.record import Row, print_table, spread, write_result
from rlhfuse.config import VllmConfig
from rlhfuse.engines.base import Engine, Request, SamplingParams
from rlhfuse.engines.canonical import canonical_logits
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.engines.vllm_adapter import VllmEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head

VOCAB, LAYERS, WIDTH, MAX_LEN = 2048, 4, 256, 1280
MIB = 2**20
NEAR_TIES = 0.005  # of all tokens, the most that `ties` found


def make_model(path: Path) -> None:
    """A random model whose next token is neither certain nor uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.08,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def vllm_engine(path: Path, *, options: VllmConfig | None = None, rows: int = 64) -> VllmEngine:
    return VllmEngine(
        load_model(path, head=Head.LM),
        path,
        max_num_seqs=rows,
        max_model_len=MAX_LEN,
        cache_tokens=rows * 256 + MAX_LEN,
        policy_version=0,
        options=options,
    )


def requests(
    count: int, *, prompt_tokens: int, kinds: Sequence[SamplingParams], first_id: int = 0
) -> list[Request]:
    rng = np.random.default_rng(first_id + 1)
    return [
        Request(
            sample_id=first_id + i,
            prompt=rng.integers(1, VOCAB, prompt_tokens, dtype=np.int32),
            seed=int(rng.integers(1 << 62)),
            params=kinds[i % len(kinds)],
            response=np.zeros(0, dtype=np.int32),
        )
        for i in range(count)
    ]


def generate(engine: Engine, asked: Sequence[Request], rows: int) -> dict[int, list[int]]:
    """All samples, at most `rows` at a time: continuous batching."""
    tokens: dict[int, list[int]] = {request.sample_id: [] for request in asked}
    queue = list(asked)[::-1]
    while queue or engine.num_running:
        while queue and engine.num_running < rows:
            engine.add(queue.pop())
        for output in engine.step():
            tokens[output.sample_id] += output.tokens
    return tokens


# --- near ties -----------------------------------------------------------------------------


def ties(path: Path, _repetitions: int) -> list[Row]:
    """2,048 samples on vLLM in two kinds of company, and on the embedded engine; half of them
    untruncated, half with top-p 0.9 at temperature 0.8. Results are written as they come."""
    kinds = [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, top_p=0.9, temperature=0.8),
    ]
    first, second = vllm_engine(path), vllm_engine(path)
    embedded = TorchEngine(
        load_model(path, head=Head.LM), max_num_seqs=64, max_model_len=MAX_LEN, policy_version=0
    )
    rows: list[Row] = []
    for part in range(4):
        asked = requests(512, prompt_tokens=16, kinds=kinds, first_id=part * 512)
        before = replace(first.counts)
        other = second.counts.redrawn
        tokens = generate(first, asked, 64)
        elsewhere = generate(second, asked[::-1], 23)
        there = generate(embedded, asked, 64)
        drawn = first.counts.tokens - before.tokens
        near = first.counts.near_ties - before.near_ties
        rows.append(
            {
                "samples": len(asked),
                "tokens": drawn,
                "near_ties": near,
                "near_tie_rate": near / drawn,
                "redrawn": first.counts.redrawn - before.redrawn,
                "redrawn_in_other_batch": second.counts.redrawn - other,
                "differ_in_other_batch": _differing(tokens, elsewhere),
                "differ_on_torch_engine": _differing(tokens, there),
            }
        )
        write_result("vllm_ties", rows)
        print_table(rows)
    return rows


def _differing(ours: dict[int, list[int]], theirs: dict[int, list[int]]) -> int:
    return sum(tokens != theirs[sample_id] for sample_id, tokens in ours.items())


def exactness(path: Path, repetitions: int) -> list[Row]:
    """What exact tokens cost: milliseconds to decide one near tie by the length of its prefix, and
    at the rate of near ties beside a decode step of one sample there."""
    engine = vllm_engine(path)
    model = load_model(path, head=Head.LM)
    params = SamplingParams(max_tokens=64)
    rows: list[Row] = []
    for context in (32, 64, 128, 256, 512, 1024):
        before = replace(engine.counts)
        (request,) = requests(1, prompt_tokens=context, kinds=[params], first_id=context)
        engine.add(request)
        engine.step()
        steps = []
        while engine.num_running:
            start = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - start)
        assert engine.counts.tokens == before.tokens + 64
        decisions = []
        for _ in range(2 * repetitions):
            start = time.perf_counter()
            canonical_logits(model, request.prompt)
            decisions.append(time.perf_counter() - start)
        decide, step = spread(decisions)[0], spread(steps)[0]
        rows.append(
            {
                "context_tokens": context,
                "decide_ms": decide * 1e3,
                "decide_least_ms": min(decisions) * 1e3,
                "decide_most_ms": max(decisions) * 1e3,
                "decode_step_ms": step * 1e3,
                "cost_at_rate": NEAR_TIES * decide / step,
            }
        )
    return rows


# --- the sampler ---------------------------------------------------------------------------


def sampler(path: Path, repetitions: int) -> list[Row]:
    """Seconds per decode step at a batch size, with each sampler: medians over the steps of a
    repetition, and over repetitions."""
    own = VllmConfig(position_keyed="off")
    engines = (vllm_engine(path, options=own), vllm_engine(path))
    rows: list[Row] = []
    for batch in (1, 16, 64):
        for kind, params in (
            ("plain", SamplingParams(max_tokens=160)),
            ("top-p 0.9", SamplingParams(max_tokens=160, top_p=0.9)),
            ("penalties", SamplingParams(max_tokens=160, repetition_penalty=1.1)),
        ):
            pairs = [_in_turn(engines, batch, params) for _ in range(repetitions)]
            theirs, ours = ([pair[i] for pair in pairs] for i in (0, 1))
            overhead = spread([b / a - 1 for a, b in pairs])
            rows.append(
                {
                    "batch": batch,
                    "sampling": kind,
                    "vllm_ms_per_step": spread(theirs)[0] * 1e3,
                    "ours_ms_per_step": spread(ours)[0] * 1e3,
                    "vllm_tokens_per_s": batch / spread(theirs)[0],
                    "ours_tokens_per_s": batch / spread(ours)[0],
                    "ours_least_tokens_per_s": batch / max(ours),
                    "ours_most_tokens_per_s": batch / min(ours),
                    "overhead": overhead[0],
                    "overhead_least": overhead[1],
                    "overhead_most": overhead[2],
                    "repetitions": repetitions,
                }
            )
            print_table(rows[-1:])
    return rows


def _in_turn(
    engines: tuple[VllmEngine, VllmEngine], batch: int, params: SamplingParams
) -> tuple[float, float]:
    """Median seconds of a step of each engine, step by step in turn: what disturbs one disturbs
    both."""
    for engine in engines:
        for request in requests(batch, prompt_tokens=16, kinds=[params]):
            engine.add(request)
        for _ in range(3):
            engine.step()
    steps: tuple[list[float], list[float]] = ([], [])
    for _ in range(40):
        for engine, seconds in zip(engines, steps, strict=True):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
    for engine in engines:
        engine.abort(range(batch))
    return spread(steps[0])[0], spread(steps[1])[0]


# --- migration -----------------------------------------------------------------------------


def migration(path: Path, repetitions: int) -> list[Row]:
    """From the export's start to the first token elsewhere, less a decode step alone."""
    rows: list[Row] = []
    source, target = vllm_engine(path), vllm_engine(path)
    params = SamplingParams(max_tokens=24)
    for context in (32, 64, 128, 256, 512, 1024):
        times: dict[bool, list[float]] = {False: [], True: []}
        sizes: list[int] = []
        lost = 0
        for repetition in range(repetitions + 1):  # the first is not counted
            (request,) = requests(
                1, prompt_tokens=context - 8, kinds=[params], first_id=context * 100 + repetition
            )
            expected = generate(source, [request], 1)[request.sample_id]
            for with_cache in (False, True):
                source.load_weights(load_model(path, head=Head.LM).named_hf_parameters(), 0)
                target.load_weights(load_model(path, head=Head.LM).named_hf_parameters(), 0)
                seconds, tokens, size = _move(source, target, request, with_cache=with_cache)
                times[with_cache].append(seconds)
                sizes.append(size)
                lost += len(expected) - len(tokens) if tokens != expected else 0
                assert tokens == expected, "a migrated sample came out differently"
        rows.append(
            {
                "context_tokens": context,
                **dict(_milliseconds("reprefill", times[False][1:])),
                **dict(_milliseconds("blocks", times[True][1:])),
                "block_bytes": max(sizes),
                "tokens_lost": lost,
                "repetitions": repetitions,
            }
        )
        print_table(rows[-1:])
    return rows


def _milliseconds(name: str, seconds: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Columns of a median, the least and the most."""
    for part, value in zip(("", "_least", "_most"), spread(seconds), strict=True):
        yield f"{name}{part}_ms", value * 1e3


def _move(
    source: VllmEngine, target: VllmEngine, request: Request, *, with_cache: bool
) -> tuple[float, list[int], int]:
    tokens: list[int] = []
    source.add(request)
    for _ in range(8):
        for output in source.step():
            tokens += output.tokens
    start = time.perf_counter()
    (moved,) = source.export([request.sample_id], with_cache=with_cache)
    target.add(moved.request, moved.cache)
    while not (outputs := target.step()):
        pass
    first = time.perf_counter()
    tokens += outputs[0].tokens
    steps: list[float] = []
    while target.num_running:
        begin = time.perf_counter()
        for output in target.step():
            tokens += output.tokens
        steps.append(time.perf_counter() - begin)
    return first - start - spread(steps)[0], tokens, len(moved.cache)


# --- memory and weights --------------------------------------------------------------------


def memory(path: Path, repetitions: int) -> list[Row]:
    """Resident bytes of this process around a sleep."""
    engine = VllmEngine(
        load_model(path, head=Head.LM),
        path,
        max_num_seqs=64,
        max_model_len=MAX_LEN,
        cache_tokens=256 * 1024,
        policy_version=0,
    )
    engine.sleep()
    engine.wake()  # touches all of the cache: until then the system had not handed it out
    process = psutil.Process()
    freed, slept, woke = [], [], []
    for _ in range(repetitions):
        awake = process.memory_info().rss
        start = time.perf_counter()
        engine.sleep()
        slept.append(time.perf_counter() - start)
        asleep = process.memory_info().rss
        freed.append((awake - asleep) / MIB)
        start = time.perf_counter()
        engine.wake()
        woke.append(time.perf_counter() - start)
    return [
        {
            "awake_mib": awake / MIB,
            "asleep_mib": asleep / MIB,
            "freed_mib": spread(freed)[0],
            "freed_least_mib": min(freed),
            "after_wake_mib": process.memory_info().rss / MIB,
            **dict(_milliseconds("sleep", slept)),
            **dict(_milliseconds("wake", woke)),
            "repetitions": repetitions,
        }
    ]


def weights(path: Path, repetitions: int) -> list[Row]:
    """An update of `model` and vLLM in place, with its probe; against making vLLM anew."""
    engine = vllm_engine(path)
    tensors = dict(load_model(path, head=Head.LM).named_hf_parameters())
    seconds, anew = [], []
    for version in range(1, repetitions + 2):
        start = time.perf_counter()
        engine.load_weights(tensors.items(), version)
        seconds.append(time.perf_counter() - start)
    others = []  # alive to the end: where one engine goes, vLLM ends what all of them share
    for _ in range(repetitions):
        start = time.perf_counter()
        others.append(vllm_engine(path))
        anew.append(time.perf_counter() - start)
    return [
        {
            "megabytes": sum(t.nbytes for t in tensors.values()) / 1e6,
            **dict(_milliseconds("update", seconds[1:])),
            **dict(_milliseconds("new_engine", anew)),
            "repetitions": repetitions,
        }
    ]


PARTS: dict[str, Callable[[Path, int], list[Row]]] = {
    "ties": ties,
    "exactness": exactness,
    "sampler": sampler,
    "migration": migration,
    "memory": memory,
    "weights": weights,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model(path)
        for name in asked.parts or PARTS:
            rows = PARTS[name](path, asked.repetitions)
            write_result(f"vllm_{name}", rows)
            print(name)
            print_table(rows)


if __name__ == "__main__":
    main()
