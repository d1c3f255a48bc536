"""One workload on one cluster: the best layouts, and what a step takes, serial and fused."""

from dataclasses import dataclass, replace
from functools import cached_property

from rlhfuse.config import Config
from rlhfuse.cost import CostModel
from rlhfuse.hardware import Cluster
from rlhfuse.planner import costs
from rlhfuse.planner import rollout as ro
from rlhfuse.planner.early import EarlyTraining, best_early
from rlhfuse.planner.rollout import RolloutLayout, RolloutPrediction
from rlhfuse.planner.step import StageSeconds
from rlhfuse.planner.training import Trained, TrainingPlan, TrainingPlanner
from rlhfuse.planner.workload import Workload
from rlhfuse.schedules.checks import peak_memory

LEAST = 0.005  # of a stage: a smaller gain is none
MOST_SAMPLES = 4096  # more are simulated on a slice of the cluster


@dataclass(frozen=True)
class Evaluated:
    """Layouts and predictions. `offload_s`: moving training state out of the way and back;
    `early`: the step with groups that are trained while others generate, where that can be."""

    config: Config
    workload: Workload
    cluster: Cluster
    training: TrainingPlan
    rollout: RolloutPrediction
    offload_s: float
    early: EarlyTraining | None = None

    @property
    def intra_pays(self) -> bool:
        return self.training.fused_s < self.training.serial_s * (1 - LEAST)

    @property
    def minibatch_s(self) -> tuple[float, float]:
        """One mini-batch serial, and as the step should run."""
        serial_s = self.training.serial_s
        return serial_s, self.training.fused_s if self.intra_pays else serial_s

    @property
    def _other_s(self) -> float:
        return self.rollout.cost.weight_sync_s + self.offload_s

    @property
    def serial(self) -> StageSeconds:
        stats = self.rollout.serial
        train = self.workload.num_minibatches * self.minibatch_s[0]
        return StageSeconds(
            stats.generation_s, stats.end_s - stats.generation_s, train, self._other_s
        )

    @property
    def fused(self) -> StageSeconds:
        if self.early is not None and self.early_pays:
            generation_s = self.early.stats.generation_s
            return StageSeconds(generation_s, 0.0, self.early.end_s - generation_s, self._other_s)
        return self.without_early

    @property
    def without_early(self) -> StageSeconds:
        """As the step should run with all training after the last response."""
        stats = self.rollout.fused if self.inter_pays else self.rollout.serial
        train = self.workload.num_minibatches * self.minibatch_s[1]
        return StageSeconds(
            stats.generation_s, stats.end_s - stats.generation_s, train, self._other_s
        )

    @property
    def inter_pays(self) -> bool:
        return self.rollout.fused.end_s < self.rollout.serial.end_s * (1 - LEAST)

    @property
    def early_pays(self) -> bool:
        """Early training against the best step without it."""
        if self.early is None:
            return False
        later = self.without_early
        return self.early.end_s < (later.step - later.other) * (1 - LEAST)

    @property
    def trained(self) -> tuple[Trained, ...]:
        """How the models are trained in the step as it should run."""
        if self.early is not None and self.early_pays:
            return (self.early.trained,)
        return self.training.fused if self.intra_pays else self.training.serial

    @cached_property
    def activation_bytes(self) -> float:
        return max(peak_memory(self.training.schedule), default=0.0)


def evaluate(
    config: Config, workload: Workload, cluster: Cluster, *, quick: bool = False
) -> Evaluated:
    """Search what the configuration leaves open. `quick`: for comparisons, on a slice.

    Raises:
        ValueError: something fits in no layout.
    """
    training = TrainingPlanner(config, workload, cluster, quick=quick).plan()
    held = sum(training.held_bytes)
    offload_s = 0.0
    found = ro.candidates(config, workload, cluster, held)
    if not found:
        # Optimizer and training weights wait in host memory while samples are generated.
        offload_s = 2 * held / cluster.device.host_bandwidth
        found = ro.candidates(config, workload, cluster, 0.0)
    if not found:
        size = cluster.device.memory_bytes / 1e9
        raise ValueError(
            f"plan: {workload.models['actor'].name} does not fit in a generation instance within "
            f"a node of {cluster.node_size} x {cluster.device.name} ({size:.0f} GB each) with one "
            f"sample of rollout.response_length {workload.limit}"
        )
    layout, cost = _choose(config, workload, found)
    most = MOST_SAMPLES // 4 if quick else MOST_SAMPLES
    some, small = ro.sliced(workload, layout, most)
    policy = ro.policy_of(config, layout)
    rollout = replace(ro.predict_rollout(some, small, cost, policy), layout=layout)
    early = None
    if not offload_s:
        early = best_early(config, workload, cluster, training.alone, layout, most)
    return Evaluated(config, workload, cluster, training, rollout, offload_s, early)


def _choose(
    config: Config, workload: Workload, found: list[tuple[RolloutLayout, CostModel]]
) -> tuple[RolloutLayout, CostModel]:
    """The instance size with the fastest overlapped rollout, compared on a slice."""
    if len(found) == 1:
        return found[0]
    rated = []
    for number, (layout, cost) in enumerate(found):
        some, small = ro.sliced(workload, layout, MOST_SAMPLES // 8)
        policy = ro.policy_named(ro.policy_of(config, layout), "off")
        rated.append((ro.run(some, small, cost, policy)[1].end_s, number))
    return found[min(rated)[1]]


def memory_of(found: Evaluated) -> tuple[float, float, float, float, float]:
    """Bytes per device: (weights, optimizer, activations, keys and values, total)."""
    models, cluster, layout = found.workload.models, found.cluster, found.rollout.layout
    held = found.early.trained.held_bytes if found.early and found.early_pays else None
    trained, optimizer = held or found.training.held_bytes
    engine = costs.engine_bytes(models, cluster, layout.tp)
    activations = found.activation_bytes
    samples = -(-found.workload.num_samples // layout.instances)
    running = min(samples, found.config.rollout.max_num_seqs)
    limit = layout.cache_tokens
    asked = running * (found.workload.limit + max(found.workload.prompts))
    kv = min(asked, limit) * costs.cache_bytes(models, cluster, layout.tp)
    weights = trained + engine
    if found.offload_s:
        total = max(trained + optimizer + activations, engine + kv)
    else:
        total = weights + optimizer + max(activations, kv)
    return weights, optimizer, activations, kv, total
