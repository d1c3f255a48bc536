"""Does the quick start learn, with every seed? Held-out reward before and after, KL, lengths.

python -m bench.bench_learning configs/quickstart.yaml --seeds 1 2 3
"""

import argparse
import json
import tempfile
from pathlib import Path

import msgspec

from bench.record import Row, print_table, write_result
from rlhfuse.config_file import load
from rlhfuse.launch import train_run
from rlhfuse.resolve import resolve


def run_seed(path: str, overrides: list[str], seed: int, folder: str) -> Row:
    """One run from start to end."""
    config = load(path, overrides)
    trainer = msgspec.structs.replace(
        config.trainer,
        seed=seed,
        default_local_dir=folder,
        experiment_name=f"seed_{seed}",
        logger=("jsonl",),
        report=False,
    )
    summary = train_run(resolve(msgspec.structs.replace(config, trainer=trainer)), resume=False)
    lines = (Path(summary.run) / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "timing_s/step" in row]
    tails = [row["response_length/p99"] / row["response_length/median"] for row in steps]
    assert summary.score_before is not None
    assert summary.score_after is not None
    return {
        "seed": seed,
        "steps": summary.steps,
        "seconds": summary.seconds,
        "reward_before": summary.score_before,
        "reward_after": summary.score_after,
        "kl_last": steps[-1]["critic/kl"],
        "kl_max": max(row["critic/kl"] for row in steps),
        "length_first": steps[0]["response_length/mean"],
        "length_last": steps[-1]["response_length/mean"],
        "p99_over_median_first": tails[0],
        "p99_over_median_last": tails[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_seed(args.config, args.overrides, seed, folder) for seed in args.seeds]
    print_table(rows)
    print(write_result("bench_learning", rows))


if __name__ == "__main__":
    main()
