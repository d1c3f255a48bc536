"""How long does a plan take, what-if table and timelines included?

    python -m bench.bench_plan

256 and 16,384 GPUs; the larger cluster has 64 times the batch and mini-batch.
"""

import time

from bench.record import Row, print_table, write_result
from rlhfuse.config_file import load
from rlhfuse.planner.plan import make_plan
from rlhfuse.rollout.forecast import warm_up

CONFIG = "configs/plan_256_hopper.yaml"
LARGE = (
    "actor.path=llama-33b", "critic.path=llama-65b", "reward.path=llama-65b",
    "plan.num_nodes=2048", "data.train_batch_size=32768", "actor.ppo_mini_batch_size=4096",
    "critic.ppo_mini_batch_size=4096",
)  # fmt: skip


def row_of(name: str, overrides: tuple[str, ...]) -> Row:
    config = load(CONFIG, overrides)
    wall_s, cpu_s = time.monotonic(), time.process_time()
    summary = make_plan(config).summary
    return {
        "plan": name,
        "devices": summary.num_devices,
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.monotonic() - wall_s,
        "speedup": summary.speedup,
        "what_if_rows": len(summary.what_if),
    }


def main() -> None:
    warm_up()  # compiling is paid once per installation
    rows = [row_of("256", ()), row_of("16,384", LARGE)]
    print_table(rows)
    print(write_result("plan_speed", rows))


if __name__ == "__main__":
    main()
