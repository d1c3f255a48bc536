"""How fast the embedded engine and the scorers are on this machine: decode, prefill, scoring.

    OMP_NUM_THREADS=1 python bench/bench_decode.py [--model FOLDER] [-o OUT.json]

Without a model folder: a random Llama of 4 layers, 256 wide, vocabulary 2048. Medians; the best of
the repetitions beside them shows what other load on the machine cost.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfuse.engines.base import Request, SamplingParams
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage
from rlhfuse.scoring import Tokens, token_logprobs

Row = dict[str, float | int | str]
NOTHING = np.zeros(0, dtype=np.int32)


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each repetition."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def engine_with(model: ModelStage, rows: int, context: int, room: int) -> TorchEngine:
    """An engine whose `rows` samples have `context` tokens of prompt and `room` to generate."""
    rng = np.random.default_rng(0)
    engine = TorchEngine(model, max_num_seqs=rows, max_model_len=context + room)
    for i in range(rows):
        prompt = rng.integers(1, model.config.vocab_size, context, dtype=np.int32)
        params = SamplingParams(max_tokens=room)
        engine.add(Request(sample_id=i, prompt=prompt, seed=i, params=params, response=NOTHING))
    return engine


def decode_rows(model: ModelStage, steps: int) -> list[Row]:
    """Milliseconds of a decode step by batch size and context."""
    table: list[Row] = []
    for context in (64, 256):
        for rows in (1, 4, 8, 16, 32, 64):
            engine = engine_with(model, rows, context, steps + 8)
            for _ in range(4):
                engine.step()
            times = seconds(engine.step, steps)
            median = statistics.median(times)
            table.append(
                {
                    "what": "decode step",
                    "rows": rows,
                    "context": context,
                    "median_ms": 1e3 * median,
                    "best_ms": 1e3 * min(times),
                    "tokens_per_s": rows / median,
                }
            )
    return table


def prefill_rows(model: ModelStage, repeats: int) -> list[Row]:
    """Milliseconds of a step that prefills every prompt at once."""
    table: list[Row] = []
    for rows, context in ((1, 16), (8, 16), (64, 16), (1, 256), (8, 256)):
        engines = [engine_with(model, rows, context, 8) for _ in range(repeats)]
        times = [seconds(engine.step, 1)[0] for engine in engines]
        median = statistics.median(times)
        table.append(
            {
                "what": "prefill step",
                "rows": rows,
                "context": context,
                "median_ms": 1e3 * median,
                "best_ms": 1e3 * min(times),
                "tokens_per_s": rows * context / median,
            }
        )
    return table


def scoring_rows(model: ModelStage, repeats: int) -> list[Row]:
    """Milliseconds of scoring 64 samples of 16 + about 60 tokens, by token budget."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.exponential(60, 64).astype(int), 4, 256)
    vocab = model.config.vocab_size
    samples = [
        Tokens(
            rng.integers(1, vocab, 16, dtype=np.int32), rng.integers(1, vocab, n, dtype=np.int32)
        )
        for n in lengths
    ]
    tokens = int(lengths.sum()) + 16 * len(samples)
    table: list[Row] = []
    for budget in (256, 1024, 4096):

        def score(budget: int = budget) -> object:
            return token_logprobs(model, samples, temperature=1.0, token_budget=budget)

        times = seconds(score, repeats)
        median = statistics.median(times)
        table.append(
            {
                "what": "scoring",
                "rows": len(samples),
                "context": budget,
                "median_ms": 1e3 * median,
                "best_ms": 1e3 * min(times),
                "tokens_per_s": tokens / median,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            config = LlamaConfig(
                vocab_size=2048,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=8,
            )
            LlamaForCausalLM(config).save_pretrained(folder)
        model = load_model(args.model or folder, head=Head.LM)
    table = decode_rows(model, args.steps)
    table += prefill_rows(model, args.repeats) + scoring_rows(model, args.repeats)
    print(f"{'':14}{'rows':>6}{'context':>9}{'median ms':>11}{'best ms':>9}{'tokens/s':>10}")
    for row in table:
        print(
            f"{row['what']:14}{row['rows']:6}{row['context']:9}{row['median_ms']:11.2f}"
            f"{row['best_ms']:9.2f}{row['tokens_per_s']:10.0f}"
        )
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    result = json.dumps({"hardware": machine, "rows": table}, indent=2)
    if args.output is not None:
        args.output.write_text(result + "\n")
    else:
        print(result)


if __name__ == "__main__":
    main()
