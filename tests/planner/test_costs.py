"""Costs from data keep the laws of the hardware: no faster than its peaks, nothing lost."""

from dataclasses import replace
from itertools import product

import msgspec
import pytest

from rlhfuse.config import PlanConfig
from rlhfuse.hardware import DEVICES, Cluster, Device, device
from rlhfuse.model_shape import KNOWN, ModelShape, shape_of
from rlhfuse.planner import costs
from rlhfuse.planner.costs import Parallel

GPUS = [d for d in DEVICES if d.name != "cpu"]
ROLES = ("critic", "reference", "reward")


def _models(name: str) -> dict[str, ModelShape]:
    return dict.fromkeys(("actor", *ROLES), shape_of(name))


@pytest.mark.parametrize("kind", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_no_faster_than_the_peaks(kind: Device, tp: int) -> None:
    model = shape_of("llama-13b")
    cost = costs.rollout_costs(_models("llama-13b"), ROLES, Cluster(kind, 64, 8), tp, 1, 300)
    for batch in (1, 16, 256, 4096):
        read = 2 * model.num_parameters() / (tp * kind.memory_bandwidth)
        products = 2 * batch * model.num_parameters() / (tp * kind.flops)
        assert cost.step_s(batch) > max(read, 0.9 * products)
    flops = 2 * model.num_parameters(scalar_head=True)
    assert cost.score_token_s["critic"] > 0.9 * flops / (tp * kind.flops)
    # Cached keys and values are read whole by every step.
    held = 2 * 2 * model.num_layers * model.hidden_size
    assert cost.decode_context_s > held / (tp * kind.memory_bandwidth)


def test_better_hardware_is_never_slower() -> None:
    base = device("h100")
    better = [
        replace(base, flops=2 * base.flops),
        replace(base, memory_bandwidth=2 * base.memory_bandwidth),
        replace(base, link_bandwidth=2 * base.link_bandwidth),
        replace(base, network_bandwidth=2 * base.network_bandwidth),
    ]
    model = shape_of("llama-33b")
    for kind, tp in product(better, (1, 4)):
        slow, fast = Cluster(base, 64, 8), Cluster(kind, 64, 8)
        one = costs.rollout_costs(_models("llama-33b"), ROLES, slow, tp, 1, 300)
        two = costs.rollout_costs(_models("llama-33b"), ROLES, fast, tp, 1, 300)
        assert two.step_s(64, 20_000) <= one.step_s(64, 20_000)
        assert two.migrate_token_s <= one.migrate_token_s
        a = costs.stage_times(model, "actor", slow, Parallel(tp, 4, 2), 2000, 400, recompute=False)
        b = costs.stage_times(model, "actor", fast, Parallel(tp, 4, 2), 2000, 400, recompute=False)
        assert sum(b.forward + b.backward) <= sum(a.forward + a.backward)
        assert b.hop_s <= a.hop_s


@pytest.mark.parametrize("model", KNOWN, ids=lambda m: m.name)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8, 16])
def test_layers_are_split_whole_and_evenly(model: ModelShape, pp: int) -> None:
    for scalar_head in (False, True):
        layers = costs.split_layers(model, pp, scalar_head=scalar_head)
        head = model.head_flops(scalar_head=scalar_head) / model.layer_flops(0.0)
        assert sum(layers) == model.num_layers
        assert len(layers) == pp
        assert min(layers) >= 1
        dearest = max([*layers[:-1], layers[-1] + head])
        # No cut is cheaper than the mean, and none of ours a layer dearer than it.
        assert (model.num_layers + head) / pp <= dearest + 1e-9
        assert dearest <= max((model.num_layers + head) / pp + 1, 1 + head)


@pytest.mark.parametrize("parallel", [Parallel(1, 1, 1), Parallel(2, 4, 8), Parallel(8, 2, 1)])
def test_memory_of_all_devices_is_the_models(parallel: Parallel) -> None:
    model, cluster = shape_of("llama-7b"), Cluster(device("h100"), 64, 8)
    weights, optimizer = costs.held_bytes(model, "actor", cluster, parallel)
    devices = parallel.tp * parallel.pp * parallel.dp
    # Every replica holds weights and gradient sums; the optimizer's state is there once.
    assert weights * devices == pytest.approx(parallel.dp * 6 * model.num_parameters())
    assert optimizer * devices == pytest.approx(12 * model.num_parameters())


def test_stages_add_up_to_the_model() -> None:
    model, cluster = shape_of("llama-13b"), Cluster(device("h100"), 64, 8)
    whole = costs.stage_times(
        model, "actor", cluster, Parallel(1, 1, 8), 4096, 400, recompute=False
    )
    for pp in (2, 4, 8):
        parts = costs.stage_times(
            model, "actor", cluster, Parallel(1, pp, 1), 4096, 400, recompute=False
        )
        assert sum(parts.forward) == pytest.approx(whole.forward[0])
        assert sum(parts.backward) == pytest.approx(whole.backward[0])
        assert sum(parts.activation) == pytest.approx(whole.activation[0])
        assert all(w < b for w, b in zip(parts.weight, parts.backward, strict=True))


def test_every_device_can_be_named_in_a_configuration() -> None:
    for known in DEVICES:
        assert msgspec.convert({"hardware": known.name}, PlanConfig).hardware == known.name
        assert known.source
