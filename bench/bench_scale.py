"""How fast the rollout simulator and the scheduler's decisions are, on one core.

    python -m bench.bench_scale [--million]

The large-batch setting of `bench/rollout_settings.py` (7B, PPO with four models, responses up to
2048 tokens), tail policy on. Decision time: seconds inside `RolloutScheduler.handle`, event by
event, while 5,000 to 15,000 samples run; their number is in the row.
"""

import argparse
import resource
import statistics
import time
from dataclasses import replace
from math import inf

from bench.record import Row, print_table, write_result
from bench.rollout_settings import Setting, settings
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.forecast import warm_up
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import InterStage
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.simulator import samples_of, simulate
from rlhfuse.rollout.world import Simulator


def setting_of(samples: int, instances: int) -> Setting:
    large = next(s for s in settings() if s.name == "PPO 7B, 2K, large batch")
    policy = replace(large.policy, inter_stage=InterStage.ON, max_running=512)
    return replace(large, num_groups=samples, instances=instances, policy=policy)


def throughput(samples: int, instances: int) -> Row:
    setting = setting_of(samples, instances)
    lengths, history = setting.lengths(0), setting.lengths(1, 4096)
    start_s = time.perf_counter()
    cpu_s = time.process_time()
    _, stats = simulate(
        setting.cost, setting.policy, lengths, setting.prompts, instances, setting.roles,
        history=history, record=False,
    )  # fmt: skip
    wall_s = time.perf_counter() - start_s
    return {
        "samples": samples,
        "instances": instances,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(time.process_time() - cpu_s, 2),
        "events": stats.num_events,
        "moved": stats.num_moved,
        "simulated_s": round(stats.end_s, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


class TimedScheduler(RolloutScheduler):
    """Notes how long each event took, and how many samples were generating."""

    taken: list[tuple[int, float]]

    def quiet(self) -> tuple[int, float]:
        """Every event by itself, as a live loop tells them."""
        return 0, inf

    def handle(self, event: ev.Event) -> list[ev.Command]:
        start_s = time.perf_counter()
        commands = super().handle(event)
        self.taken.append((self.num_generating, time.perf_counter() - start_s))
        return commands


def decisions(samples: int, instances: int) -> Row:
    """Times of events while 5,000 to 15,000 samples run."""
    setting = setting_of(samples, instances)
    predictor = LengthModel(setting.policy.max_response_tokens, setting.lengths(1, 4096))
    scheduler = TimedScheduler(
        instances, setting.roles, setting.cost, setting.policy, lengths=predictor
    )
    scheduler.taken = []
    world = Simulator(
        scheduler, setting.cost, setting.lengths(0), samples_of(setting.prompts), instances,
        record=False,
    )  # fmt: skip
    world.run()
    near = [seconds for running, seconds in scheduler.taken[1:] if 5_000 <= running <= 15_000]
    cuts = statistics.quantiles(near, n=1000)
    return {
        "samples": samples,
        "instances": instances,
        "events": len(near),
        "median_ms": round(1e3 * statistics.median(near), 4),
        "p99_ms": round(1e3 * cuts[989], 4),
        "p999_ms": round(1e3 * cuts[998], 3),
        "worst_ms": round(1e3 * max(near), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true", help="also 1,000,000 over 4,096")
    asked = parser.parse_args()
    warm_up()
    throughput(2_000, 32)  # first calls are slower
    rows = [throughput(100_000, 1024)]
    print_table(rows)
    deciding = [decisions(15_000, 128)]
    print_table(deciding)
    if asked.million:
        rows.append(throughput(1_000_000, 4096))
        print_table(rows)
    write_result("rollout_scale", rows)
    write_result("rollout_decisions", deciding)


if __name__ == "__main__":
    main()
