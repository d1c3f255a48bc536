"""Two models under one schedule give what two runs of Megatron give, one after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from rlhfuse.megatron import stock
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.orders import Choice
from rlhfuse.megatron.values import make_value_model
from tests.megatron.laws import Found, History, compare_all, differences, rounding
from tests.megatron.tiny import Setting, Trained, init_parallel
from tests.training.ranks import run_ranks

Runs = Callable[[Mapping[str, dict[str, Any]]], dict[str, list[Any]]]


@dataclass(frozen=True)
class Pair:
    """An actor, a critic, and whether the critic's pipeline runs the other way."""

    actor: Setting
    critic: Setting
    reverse: bool = True
    apart: bool = False
    """One model in each call, as while the critic warms up."""

    @property
    def fused(self) -> bool:
        """Whether there is anything to fuse: two models, and bubbles."""
        return not self.apart and self.actor.pp > 1 and self.critic.pp > 1


SMALL = Setting(num_microbatches=2)
TWO_RANKS = {
    "equal counts": Pair(SMALL, replace(SMALL, value_head=True, seed=1)),
    "unequal models and counts": Pair(
        Setting(num_microbatches=4, overlap=True, distributed_optimizer=True, steps=2),
        Setting(num_microbatches=2, hidden=16, value_head=True, lengths=(8, 24), seed=1),
    ),
    "same direction, timers in common": Pair(
        replace(SMALL, timers=True),
        replace(SMALL, timers=True, value_head=True, seed=1),
        reverse=False,
    ),
    "two experts' models": Pair(
        Setting(experts=2, num_microbatches=2, steps=2),
        Setting(experts=4, num_microbatches=3, seed=1),
    ),
    "virtual chunks in the actor": Pair(
        Setting(chunks=2, num_microbatches=2), replace(SMALL, value_head=True, seed=1)
    ),
    "one model missing": Pair(SMALL, replace(SMALL, value_head=True, seed=1), apart=True),
    "one stage each": Pair(
        replace(SMALL, pp=1), replace(SMALL, pp=1, value_head=True, seed=1), reverse=False
    ),
    "further tokens predicted, scaled losses": Pair(
        replace(SMALL, mtp=1, loss_scale=4.0),
        replace(SMALL, mtp=1, num_microbatches=3, seed=1),
    ),
}
FOUR_RANKS = {
    "pp=4 with pp=2": Pair(
        Setting(pp=4, num_microbatches=3),
        Setting(pp=2, num_microbatches=2, value_head=True, seed=1),
    ),
    "tp=2, pp=2": Pair(replace(SMALL, tp=2), replace(SMALL, tp=2, value_head=True, seed=1)),
    "dp=2, per-token loss": Pair(
        replace(SMALL, per_token=True, overlap=True, steps=2),
        replace(SMALL, per_token=True, value_head=True, seed=1),
    ),
}
PAIRS = {**TWO_RANKS, **FOUR_RANKS}
CHOICES: tuple[Choice, ...] = ("fuse", "fuse-split")


def contexts_for(pair: Pair) -> dict[str, ModelContext]:
    return {
        "actor": ModelContext.create(partial(init_parallel, pair.actor)),
        "critic": ModelContext.create(partial(init_parallel, pair.critic), reverse=pair.reverse),
    }


def train(pair: Pair, contexts: Mapping[str, ModelContext], run: Runs) -> dict[str, History]:
    models: dict[str, Trained] = {}
    for name, setting in (("actor", pair.actor), ("critic", pair.critic)):
        with contexts[name].active():
            models[name] = Trained(setting, make_value_model if setting.value_head else None)
    if pair.actor.timers:  # one for the process, as megatron.training's
        models["critic"].config.timers = models["actor"].config.timers
    history: dict[str, History] = {name: [] for name in models}
    for step in range(pair.actor.steps):
        calls = {}
        for name, model in models.items():
            with contexts[name].active():
                model.zero()
                calls[name] = model.arguments(step)
        stores = run(calls)
        for name, model in models.items():
            with contexts[name].active():
                gradients = model.gradients()
                history[name].append((stores[name], gradients, model.step()))
    return history


def serial(
    contexts: Mapping[str, ModelContext], calls: Mapping[str, dict[str, Any]]
) -> dict[str, list[Any]]:
    stores = {}
    for name, arguments in calls.items():
        with contexts[name].active():
            stores[name] = stock.stock_func(None, None, None)(**arguments)
    return stores


def one_by_one(run: Runs, calls: Mapping[str, dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: run({name: call})[name] for name, call in calls.items()}


def compare(pair: Pair) -> dict[str, tuple[list[str], int]]:
    contexts = contexts_for(pair)
    before = dict(vars(parallel_state))
    expected = train(pair, contexts, partial(serial, contexts))
    found = {}
    for choice in CHOICES:
        fused = FusedScheduler(choice, record=True)
        run: Runs = partial(fused, contexts=contexts)
        history = train(pair, contexts, partial(one_by_one, run) if pair.apart else run)
        wrong = [
            f"{name}: {what}"
            for name, setting in (("actor", pair.actor), ("critic", pair.critic))
            for what in differences(expected[name], history[name], rounding(setting, choice))
        ]
        found[str(choice)] = (wrong, len({s.args["pipeline"] for s in fused.timeline.spans}))
        fused.close()
    assert vars(parallel_state) == before, "global state is as it was"
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[Found]:
    return run_ranks(2, lambda rank: compare_all(TWO_RANKS, compare), timeout_s=30, limit_s=90)


@pytest.fixture(scope="module")
def four_ranks() -> list[Found]:
    return run_ranks(4, lambda rank: compare_all(FOUR_RANKS, compare), timeout_s=30, limit_s=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(two_ranks: list[Found], name: str) -> None:
    for rank, found in enumerate(two_ranks):
        for choice, (wrong, num_models) in found[name].items():
            expected = 2 if PAIRS[name].fused else 0
            assert (wrong, num_models) == ([], expected), f"{name}, {choice}, rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(four_ranks: list[Found], name: str) -> None:
    for rank, found in enumerate(four_ranks):
        for choice, (wrong, num_models) in found[name].items():
            expected = 2 if PAIRS[name].fused else 0
            assert (wrong, num_models) == ([], expected), f"{name}, {choice}, rank {rank}"


def crossing(rank: int) -> tuple[int, bool]:
    """World rank of the reversed critic's last stage, and whether a loss was reported there."""
    pair = TWO_RANKS["equal counts"]
    with on_cpu():
        contexts = contexts_for(pair)
        with contexts["critic"].active():
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            model = Trained(pair.critic, make_value_model)
            model.zero()
            call = model.arguments()
        store = serial(contexts, {"critic": call})["critic"]
    return int(last), bool(store) and bool(torch.isfinite(store[0]["loss"]))


@pytest.mark.slow
def test_a_reversed_critic_ends_on_the_first_rank() -> None:
    assert run_ranks(2, crossing, limit_s=60) == [(0, True), (0, False)]
