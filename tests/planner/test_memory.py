"""The memory plan: what it counts is what is made, and what cannot fit is refused with numbers."""

from pathlib import Path

import msgspec
import pytest
import torch

from rlhfuse.config import Config
from rlhfuse.engines.kv_cache import CacheShape
from rlhfuse.model_shape import shape_of
from rlhfuse.models.loading import load_config, load_stage
from rlhfuse.models.stage import Head
from rlhfuse.placement import NodeInfo, Seat, StagePlacement, pipeline_ranks
from rlhfuse.planner.memory import (
    CONTROLLER_BYTES,
    DeviceMemory,
    check_room,
    memory_plan,
)
from rlhfuse.planner.training_memory import GIB, planned_peak, stage_parameters
from rlhfuse.planner.workload import workload_of
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import gpipe, one_f_one_b
from tests.end_to_end.tiny_run import make_assets, tiny_config
from tests.models.tiny import FAMILIES, save_tiny

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return tiny_config(folder, folder, num_devices=2)


def _plan(config: Config, *, cuda: bool = False) -> tuple[DeviceMemory, ...]:
    ranks = pipeline_ranks(config)
    pipelines = {
        name: StagePlacement(
            r, tuple((4 * i // len(r), 4 * (i + 1) // len(r)) for i in range(len(r)))
        )
        for name, r in ranks.items()
    }
    return memory_plan(config, workload_of(config), pipelines, cuda=cuda)


def _seats(count: int, memory: int, free: int = 1 << 50, gpu: int = 0) -> list[Seat]:
    node = NodeInfo("n", "127.0.0.1", "m", (0,), 0, memory, free, gpu)
    return [Seat(node, index, None) for index in range(count)]


def test_a_reference_beside_the_actor_adds_its_stages(config: Config) -> None:
    """Exactly their weights, each on its own device, whatever the scorers hold."""
    config = replace(config, actor=replace(config.actor, use_kl_loss=True))
    workload = workload_of(config)
    shape = workload.models["reference"]
    placed = StagePlacement((1, 0), ((0, 2), (2, 4)))
    without = memory_plan(config, workload, {}, cuda=False)
    beside = memory_plan(config, workload, {}, cuda=False, reference={"reference": placed})
    for stage, device in enumerate(placed.ranks):
        more = beside[device].held["weights"] - without[device].held["weights"]
        assert more == 4 * stage_parameters(shape, placed, stage, scalar_head=False)
        assert beside[device].turns["training"] > without[device].turns["training"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", list(Head))
def test_stage_parameters_are_those_of_the_model(
    tmp_path: Path, family: str, tied: bool, head: Head
) -> None:
    save_tiny(tmp_path, family, head=head, tied=tied)
    shape = shape_of(str(tmp_path))
    for layers in (((0, 4),), ((0, 3), (3, 4)), ((0, 1), (1, 2), (2, 4))):
        placed = StagePlacement(tuple(range(len(layers))), layers)
        for stage, (first, end) in enumerate(layers):
            made = load_stage(
                tmp_path,
                head=head,
                layers=range(first, end),
                first=stage == 0,
                last=stage == len(layers) - 1,
            )
            counted = stage_parameters(shape, placed, stage, scalar_head=head is not Head.LM)
            biases = sum(p.numel() for p in made.parameters() if p.dim() == 1)
            exact = sum(p.numel() for p in made.parameters())
            assert abs(counted - exact) <= biases, (stage, layers)


def test_keys_and_values_are_the_engines(config: Config) -> None:
    shape = CacheShape.of(load_config(config.actor.path), torch.float32)
    for device in _plan(config):
        assert device.turns["keys and values"] == 16 * (16 + 48) * shape.token_bytes


def test_parts_follow_the_placement(config: Config) -> None:
    """Weights and states are split over pipeline stages, and states over replicas."""
    whole = replace(config, placement=replace(config.placement, num_devices=1))
    copies = replace(config, placement=replace(config.placement, actor_pp=1, critic_pp=1))
    one, split, replicas = _plan(whole), _plan(config), _plan(copies)
    for part in ("gradients", "optimizer"):
        assert sum(device.held[part] for device in split) == one[0].held[part]
    assert replicas[0].held["gradients"] == one[0].held["gradients"]
    assert 2 * replicas[0].held["optimizer"] == pytest.approx(one[0].held["optimizer"], abs=2)
    narrow = _plan(config, cuda=True)[0]
    # On GPUs, where instances sleep, frozen scorers are there only while they score.
    frozen = 2 * narrow.turns["scoring"] - split[0].turns["scoring"]
    assert 0 < frozen == split[0].held["weights"] - 2 * narrow.held["weights"]
    awake = _plan(replace(config, rollout=replace(config.rollout, sleep="off")), cuda=True)[0]
    assert awake.held["weights"] * 2 == split[0].held["weights"]
    assert narrow.held["optimizer"] * 8 == split[0].held["optimizer"] * 12  # float32 masters
    lora = replace(config, actor=replace(config.actor, lora_rank=2))
    assert _plan(lora)[0].held["optimizer"] < split[0].held["optimizer"]


def test_turns_share_memory_only_where_instances_sleep(config: Config) -> None:
    awake = _plan(config)[0]
    asleep = _plan(replace(config, rollout=replace(config.rollout, sleep="on")))[0]
    cache, scoring, training = awake.turns.values()
    assert awake.total - asleep.total == min(cache, max(scoring, training))
    assert awake.least == asleep.least == asleep.total
    assert _plan(config, cuda=True)[0].sleeps


def test_an_impossible_plan_is_refused_with_the_numbers(config: Config) -> None:
    huge = _plan(replace(config, rollout=replace(config.rollout, cache_tokens=10**8)))
    with pytest.raises(ValueError, match=r"node 127.0.0.1 has 64.0 GiB to use, and the plan needs"):
        check_room(huge, _seats(2, 64 * GIB), cuda=False)
    with pytest.raises(ValueError, match=r"keys and values \d+.*rollout.cache_tokens") as told:
        check_room(huge[:1], _seats(1, 0, gpu=16 * GIB), cuda=True)
    assert "\n" not in str(told.value)
    plan = _plan(config)
    needed = sum(device.total for device in plan) + CONTROLLER_BYTES
    assert check_room(plan, _seats(2, needed), cuda=False) == ()
    with pytest.raises(ValueError, match=r"rollout\.sleep=on would make it fit"):
        check_room(plan, _seats(2, needed - 1), cuda=False)
    (warning,) = check_room(plan, _seats(2, 64 * GIB, free=needed - 1), cuda=False)
    assert "of 64.0 GiB are free" in warning
    assert check_room(huge, _seats(2, 0), cuda=False) == ()  # not known


def _peaks(config: Config, schedule: Schedule, **more: bool) -> list[int]:
    placed = {
        "actor": StagePlacement((0, 1), ((0, 2), (2, 4))),
        "critic": StagePlacement((1, 0), ((0, 2), (2, 4))),
    }
    shapes = workload_of(config).models
    return [
        planned_peak(
            config, shapes, placed, [schedule], rank, value_bytes=4, cuda=more.get("cuda", True)
        )
        for rank in range(2)
    ]


def _pipes(count: int, tokens: float) -> tuple[Pipeline, Pipeline]:
    return (
        Pipeline.make("actor", (0, 1), count, 1, 2, activation=tokens),
        Pipeline.make("critic", (1, 0), count, 1, 2, activation=tokens),
    )


def test_the_peak_of_training_follows_the_schedule(config: Config) -> None:
    """What comes on top of weights, gradients and states is what the memory model of the schedule
    says, micro-batch by micro-batch."""
    kept = 17 * 2 * workload_of(config).models["actor"].hidden_size * 4  # a token, two layers
    actor, critic = _pipes(4, 10.0)
    few, many = (order(Problem(2, (actor,))) for order in (one_f_one_b, gpipe))
    less, more = _peaks(config, few), _peaks(config, many)
    # 1F1B holds two micro-batches on the first rank and one on the second; GPipe all four.
    assert [b - a for a, b in zip(less, more, strict=True)] == [2 * 10 * kept, 3 * 10 * kept]
    both = Schedule(
        Problem(2, (actor, critic)),
        tuple(
            a + b for a, b in zip(few.rows, one_f_one_b(Problem(2, (critic,))).rows, strict=True)
        ),
    )
    assert all(a >= b for a, b in zip(_peaks(config, both), less, strict=True))
    assert _peaks(config, few, cuda=False)[0] - less[0] == 3 * 2**27  # programs
    again = replace(config, actor=replace(config.actor, gradient_checkpointing=True))
    assert all(a < b for a, b in zip(_peaks(again, many), more, strict=True))


def test_the_peak_of_training_counts_what_is_always_there(config: Config) -> None:
    """Weights, gradients and states, as the plan of the whole device does."""
    (actor, _) = _pipes(1, 0.0)
    schedule = one_f_one_b(Problem(2, (actor,)))
    width = workload_of(config).models["actor"]
    head = 4 * width.hidden_size * width.vocab_size  # on the last stage
    held = [m.held["gradients"] * 2 + m.held["optimizer"] for m in _plan(config)]
    assert _peaks(config, schedule) == [held[0], held[1] + head]
