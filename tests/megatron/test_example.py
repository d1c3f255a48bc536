"""The examples train, and the changed line changes nothing but the schedule."""

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from rlhfuse.megatron import get_forward_backward_func, stock
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.examples import actor_critic, pretrain
from tests.training.ranks import run_ranks

Reports = list[dict[str, list[Any]]]


def train(rank: int) -> tuple[Reports, list[list[float]], list[list[float]]]:
    """Of the actor and the critic; of the plain script, as it is and with the line put back."""
    losses = []
    with on_cpu():
        torch.manual_seed(0)
        reports = actor_critic.train(2, steps=2)
        for function in (get_forward_backward_func, stock.get_stock_func):
            parallel_state.destroy_model_parallel()
            vars(pretrain)["get_forward_backward_func"] = function
            torch.manual_seed(0)
            losses.append(pretrain.train(2, steps=2))
    return reports, losses[0], losses[1]


@pytest.mark.slow
def test_examples_train_and_the_changed_line_changes_no_loss() -> None:
    (first, *_), (last, ours, stocks) = run_ranks(2, train, limit_s=60)
    for name, with_loss, without in (("actor", last, first), ("critic", first, last)):
        before, after = (
            sum(report["loss"] for report in step[name]) for step in (with_loss[0], with_loss[1])
        )
        assert after < before, name
        assert [step[name] for step in without] == [[], []]
    assert ours == stocks
    assert sum(ours[1]) < sum(ours[0])
