"""One mini-batch of training: parallel sizes, micro-batches and schedules, serial and fused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from rlhfuse import packing
from rlhfuse.config import Config
from rlhfuse.hardware import Cluster
from rlhfuse.planner import costs
from rlhfuse.planner.costs import Parallel
from rlhfuse.planner.workload import Workload
from rlhfuse.schedules.bounds import latency_bound
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.timing import makespan

ITERATIONS = 60  # rounds of the search for the schedule that is kept
FEW_ITERATIONS = 4  # to compare candidates
SHORT_LIST = 4
MOST_PACKED = 1 << 15  # samples times replicas that are packed to find the heaviest replica
PER_SIZE = 4  # layouts considered per tensor-parallel size


@dataclass(frozen=True, slots=True)
class Trained:
    """How one model is trained: devices, and micro-batches per replica and mini-batch.
    `time_s`: one mini-batch alone by 1F1B, gradient exchange and optimizer included."""

    role: str
    parallel: Parallel
    num_microbatches: int
    time_s: float
    exchange_s: float
    held_bytes: tuple[float, float]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """One mini-batch. `serial`: each model in the layout that is best for it alone, one after the
    other. `fused`: one block of ranks of the layouts that are best together; `block_ranks` of
    them, each a group of `tp` devices; `fused_s` exchange included."""

    serial: tuple[Trained, ...]
    serial_s: float
    fused: tuple[Trained, ...]
    fused_s: float
    schedule: Schedule  # of one block, fused (or the actor's alone)
    separate: tuple[Schedule, ...]  # model after model, in the layouts of `serial`
    split_schedule_s: float  # makespan with the weight gradient split off
    block_ranks: int
    alone: tuple[Trained, ...] = ()  # layouts of a model that is trained alone

    @property
    def held_bytes(self) -> tuple[float, float]:
        """(weights and gradients, optimizer) of one device."""
        held = [t.held_bytes for t in self.fused]
        return sum(h[0] for h in held), sum(h[1] for h in held)


class TrainingPlanner:
    """Searches the parallel sizes for one workload on one cluster."""

    def __init__(
        self, config: Config, workload: Workload, cluster: Cluster, *, quick: bool = False
    ) -> None:
        """`quick`: a short search, to compare with other plans that were searched as shortly."""
        self._config, self._workload, self._cluster = config, workload, cluster
        self._quick = quick
        self._weights: dict[tuple[int, int], tuple[float, ...]] = {}
        self._replicas: dict[int, tuple[tuple[int, ...], float]] = {}
        self._total = workload.tokens_per_minibatch

    def plan(self) -> TrainingPlan:
        """The best serial layouts, and the best that can run fused.

        Raises:
            ValueError: a model fits in no layout.
        """
        found = {role: self._candidates(role) for role in self._workload.trained}
        best = tuple(min(c, key=lambda t: t.time_s) for c in found.values())
        separate = tuple(self._alone(t) for t in best)
        serial_s = sum(t.time_s for t in best)
        if len(best) == 1:
            problem = self.problem(best)
            split = min(makespan(separate[0]), makespan(_fuse(problem, FEW_ITERATIONS, True)))
            return TrainingPlan(
                best, serial_s, best, serial_s, separate[0], separate, split,
                best[0].parallel.pp, tuple(found[best[0].role]),
            )  # fmt: skip
        fused, schedule = self._fuse_best(found, best)
        fused_s = makespan(schedule) + sum(t.exchange_s for t in fused)
        split = makespan(schedule)
        if not self._quick:
            split = makespan(_fuse(schedule.problem, ITERATIONS // 2, True))
        ranks = schedule.problem.num_ranks
        return TrainingPlan(best, serial_s, fused, fused_s, schedule, separate, split, ranks)

    def _alone(self, trained: Trained) -> Schedule:
        return serial(self.problem((trained,)))

    def _fuse_best(
        self, found: Mapping[str, Sequence[Trained]], best: tuple[Trained, ...]
    ) -> tuple[tuple[Trained, ...], Schedule]:
        """Pairs of layouts by their bounds, then by a short search, then one long search.

        Where tensor-parallel sizes differ, a rank has the larger one's devices, and several
        replicas of the other model run there side by side.
        """
        actors, critics = (found[role] for role in self._workload.trained)
        rated: list[tuple[float, int, tuple[Trained, Trained]]] = []
        for pair in ((a, c) for a in actors for c in critics):
            if self._cap(pair) > 0:
                bound = latency_bound(self.problem(pair), split_weight=False)
                rated.append((bound + sum(t.exchange_s for t in pair), len(rated), pair))
        rated.sort(key=lambda item: item[:2])
        short = [pair for _, _, pair in rated[: 1 if self._quick else SHORT_LIST]]
        if best in [pair for _, _, pair in rated] and best not in short:
            short.append((best[0], best[1]))
        tried: list[tuple[float, int, tuple[Trained, Trained], Schedule]] = []
        for pair in short:
            try:
                schedule = _fuse(self.problem(pair), FEW_ITERATIONS, False)
            except ValueError:
                continue  # both together exceed the memory
            rest = sum(t.exchange_s for t in pair)
            tried.append((makespan(schedule) + rest, len(tried), pair, schedule))
        if not tried:
            raise ValueError("plan: actor and critic together exceed the memory in every layout")
        _, _, pair, schedule = min(tried, key=lambda item: item[:2])
        return pair, schedule if self._quick else _fuse(self.problem(pair), ITERATIONS, False)

    def problem(self, pair: Sequence[Trained]) -> Problem:
        """One block: as many pipelines of each model as share its ranks, all later ones in
        reverse order, so that one fills the other's bubbles (RLHFuse, arXiv 2409.13221)."""
        ranks = lcm(*(t.parallel.pp for t in pair))
        pipelines, hop = [], 0.0
        for number, trained in enumerate(pair):
            order = list(range(ranks)) if number == 0 else list(range(ranks))[::-1]
            pp, count = trained.parallel.pp, trained.num_microbatches
            times = self._times(trained.role, trained.parallel, count)
            hop = max(hop, times.hop_s)
            for copy in range(ranks // pp):
                name = trained.role if ranks == pp else f"{trained.role}{copy}"
                pipelines.append(
                    Pipeline.make(
                        name,
                        order[copy * pp : (copy + 1) * pp],
                        count,
                        times.forward,
                        times.backward,
                        weight=times.weight,
                        activation=times.activation,
                        microbatch_weights=self._micro_weights(trained.parallel.dp, count),
                    )
                )
        return Problem(ranks, tuple(pipelines), self._cap(pair), hop)

    def _cap(self, pair: Sequence[Trained]) -> float:
        """Bytes of a device that the states of both models leave for activations."""
        held = sum(sum(t.held_bytes) for t in pair)
        return costs.USABLE * self._cluster.device.memory_bytes - held

    def _times(self, role: str, parallel: Parallel, count: int) -> costs.StageTimes:
        model = self._config.actor if role == "actor" else self._config.critic
        return costs.stage_times(
            self._workload.models[role],
            role,
            self._cluster,
            parallel,
            self._replica(parallel.dp)[1] / count,
            self._workload.mean_total,
            recompute=model.gradient_checkpointing,
        )

    def _replica(self, dp: int) -> tuple[tuple[int, ...], float]:
        """(tokens of each sample, their sum scaled to a mean mini-batch) of the replica that has
        the most to do: all others wait for it."""
        if dp not in self._replicas:
            size = self._workload.samples_per_minibatch
            lengths = sorted(
                self._workload.lengths[i] + self._workload.prompts[i] for i in range(size)
            )
            # Of very many replicas an even part: what is typical of all is typical of it.
            part = 1
            while size * dp > MOST_PACKED * part**2 and dp % (2 * part) == size % (2 * part) == 0:
                part *= 2
            some = lengths[::part]
            mine = packing.balanced(list(enumerate(some)), dp // part)[0]
            scale = self._total / part / sum(some)
            self._replicas[dp] = (
                tuple(some[i] for i in mine),
                scale * sum(some[i] for i in mine),
            )
        return self._replicas[dp]

    def _micro_weights(self, dp: int, count: int) -> tuple[float, ...]:
        """Tokens of that replica's micro-batches, relative to their mean."""
        if (dp, count) not in self._weights:
            mine = self._replica(dp)[0]
            cut = packing.microbatches(list(enumerate(mine)), num_microbatches=count)
            sums = [sum(mine[i] for i in part) for part in cut]
            mean = sum(sums) / len(sums)
            self._weights[dp, count] = tuple(s / mean for s in sums)
        return self._weights[dp, count]

    def _candidates(self, role: str) -> list[Trained]:
        """For every tensor-parallel size the layouts and micro-batch counts that fit and are
        best by the 1F1B formula, with their exact times alone."""
        by_tp: dict[int, list[Trained]] = {}
        for parallel in self._layouts(role):
            for count in self._counts(role, parallel):
                trained = self._rate(role, parallel, count)
                if trained is not None:
                    by_tp.setdefault(parallel.tp, []).append(trained)
        if not by_tp:
            cluster = self._cluster
            raise ValueError(
                f"plan: training the {role} fits in no layout of {cluster.num_devices} x "
                f"{cluster.device.name} ({cluster.device.memory_bytes / 1e9:.0f} GB each); use "
                f"more devices (plan.num_nodes), or {role}.gradient_checkpointing=true"
            )
        return [
            replace(t, time_s=makespan(self._alone(t)) + t.exchange_s)
            for same in by_tp.values()
            for t in sorted(same, key=lambda t: t.time_s)[: 2 if self._quick else PER_SIZE]
        ]

    def _layouts(self, role: str) -> list[Parallel]:
        """What is asked for, or all sizes; on CPUs no tensor parallelism."""
        cluster, plan = self._cluster, self._config.plan
        model = self._workload.models[role]
        actor = role == "actor"
        tp, pp = (plan.actor_tp, plan.actor_pp) if actor else (plan.critic_tp, plan.critic_pp)
        if cluster.device.name == "cpu":
            placed = self._config.placement
            tp, pp = 1, pp or (placed.actor_pp if actor else placed.critic_pp)
        sizes = [tp] if tp else [1, 2, 4, 8]
        depths = [pp] if pp else [1, 2, 4, 8, 16]
        return [
            Parallel(tp, pp, cluster.num_devices // (tp * pp))
            for tp in sizes
            if tp <= cluster.node_size and model.splits(tp)
            for pp in depths
            if pp <= model.num_layers and cluster.num_devices % (tp * pp) == 0
            if cluster.num_devices // (tp * pp) <= self._workload.samples_per_minibatch
        ]

    def _counts(self, role: str, parallel: Parallel) -> list[int]:
        """Micro-batches per replica: as configured, or a few numbers up to its samples."""
        mine, tokens = self._replica(parallel.dp)
        samples = len(mine)
        model = self._config.actor if role == "actor" else self._config.critic
        if model.num_microbatches:
            return [min(samples, model.num_microbatches)]
        most = max(1, min(samples, 4 * parallel.pp))
        least = -(-tokens // model.ppo_max_token_len_per_gpu)
        counts = {2**i for i in range(11) if 2**i <= most} | {most}
        return sorted(n for n in counts if n >= min(least, most))

    def _rate(self, role: str, parallel: Parallel, count: int) -> Trained | None:
        """By the 1F1B formula; None where one micro-batch per stage does not fit."""
        times = self._times(role, parallel, count)
        model = self._workload.models[role]
        held = costs.held_bytes(model, role, self._cluster, parallel)
        room = costs.USABLE * self._cluster.device.memory_bytes - sum(held)
        if min(times.activation) <= 0 or room < max(times.activation) * max(
            self._micro_weights(parallel.dp, count)
        ):
            return None
        # Fewer micro-batches in flight than stages leave a bubble in every round.
        flight = min(parallel.pp, max(1, int(room / max(times.activation))))
        slow = max(f + b for f, b in zip(times.forward, times.backward, strict=True))
        rounds = count * parallel.pp / flight
        rounds += (parallel.pp - 1) * max(self._micro_weights(parallel.dp, count))
        exchange = costs.exchange_s(model, role, self._cluster, parallel)
        hops = 2 * (parallel.pp - 1) * times.hop_s
        return Trained(role, parallel, count, rounds * slow + hops + exchange, exchange, held)


def _fuse(problem: Problem, iterations: int, split_weight: bool) -> Schedule:
    return fuse(problem, iterations=iterations, split_weight=split_weight)
