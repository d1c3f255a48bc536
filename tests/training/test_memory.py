"""An allocation that fails is told with what the rank holds and what to change."""

import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rlhfuse.training.failure import StepFailed
from rlhfuse.training.memory import MIB, Held, advice, in_use, loading, out_of_memory, take_peak
from rlhfuse.training.records import SampleData
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    VOCABULARY,
    cut,
    make_config,
    make_plans,
    make_problem,
    make_trainer,
    save_models,
    serial_rounds,
)


def long_samples(count: int, length: int) -> list[SampleData]:
    rng = np.random.default_rng(0)
    numbers = np.zeros(length, dtype=np.float32)
    return [
        SampleData(
            sample_id=i,
            group=i,
            prompt=rng.integers(1, VOCABULARY, 2, dtype=np.int32),
            response=rng.integers(1, VOCABULARY, length, dtype=np.int32),
            score=float(i),
            old_logprobs=numbers - 5.0,
            rollout_logprobs=numbers - 5.0,
            reference_logprobs=numbers - 5.0,
            values=numbers,
        )
        for i in range(count)
    ]


def test_memory_that_runs_out_in_a_task_names_what_is_held(tmp_path: Path) -> None:
    config = make_config(save_models(tmp_path))
    samples = long_samples(16, 2000)
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(1, 2)))

    def run(rank: int) -> str:
        trainer = make_trainer(config, rank, 1)
        # The kernel gives no more than this: 16,000 tokens in a micro-batch need more.
        limit = psutil.Process().memory_info().vms + 100 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        with pytest.raises(StepFailed) as caught:
            trainer.update(0, samples, plans, KL_COEF, [])
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return str(caught.value)

    (message,) = run_ranks(1, run)
    assert message.startswith("rank 0 failed at actor:0")
    for word in ("out of memory", "weights ", "activations of ", "num_microbatches"):
        assert word in message.split("\n")[0], message


def test_an_allocation_that_fails_is_known_as_such() -> None:
    with pytest.raises(RuntimeError) as torch_says:
        torch.empty(1 << 50)
    with pytest.raises(MemoryError) as python_says:
        bytearray(1 << 62)
    for error in (torch_says.value, python_says.value, torch.OutOfMemoryError("CUDA: 2 GiB")):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(OSError(28, "No space left on device"))


@pytest.mark.parametrize(
    ("held", "total", "way"),
    [
        (Held(weights=10 * MIB, microbatches=4), 90 * MIB, "gradient_checkpointing"),
        (Held(weights=10 * MIB, optimizer=70 * MIB), 90 * MIB, "shard_optimizer"),
        (Held(weights=40 * MIB, gradients=30 * MIB), 90 * MIB, "actor_pp"),
        (Held(weights=10 * MIB, deferred=70 * MIB), 90 * MIB, "split_weight"),
    ],
)
def test_the_way_out_fits_what_is_held_most(held: Held, total: int, way: str) -> None:
    text = advice(MemoryError(), held, total, torch.device("cpu"))
    assert way in text
    assert "MiB" in text
    assert min(take_peak(torch.device("cpu")), in_use(torch.device("cpu"))) > MIB


def test_models_that_do_not_fit_are_a_user_s_mistake() -> None:
    with (
        pytest.raises(ValueError, match=r"reading the actor .* placement\.actor_pp"),
        loading("actor", torch.device("cpu")),
    ):
        torch.empty(1 << 50)
    with pytest.raises(KeyError), loading("actor", torch.device("cpu")):
        raise KeyError("other")
