"""The example trains both models."""

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.examples import actor_critic
from tests.training.ranks import run_ranks


def train(rank: int) -> list[dict[str, list[Any]]]:
    torch.manual_seed(0)
    with on_cpu():
        return actor_critic.train(2, steps=2)


@pytest.mark.slow
def test_losses_are_reported_where_each_model_ends_and_fall() -> None:
    first, last = run_ranks(2, train, limit_s=60)
    for name, with_loss, without in (("actor", last, first), ("critic", first, last)):
        before, after = (
            sum(report["loss"] for report in step[name]) for step in (with_loss[0], with_loss[1])
        )
        assert after < before, name
        assert [step[name] for step in without] == [[], []]
