"""AdamW of one stage: which one runs, and shards that own nothing."""

import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from rlhfuse.config import OptimConfig
from rlhfuse.training import optimizer
from rlhfuse.training.gradients import GradientSums
from rlhfuse.training.optimizer import StageOptimizer, choice

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1)
Group = dict[str, object]


class LikeApex(torch.optim.Optimizer):
    """apex's FusedAdam as its documentation says: steps are counted per group."""

    def __init__(
        self,
        groups: Iterable[Group],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
    ) -> None:
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(parameter))
                gradient = parameter.grad
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                parameter.sub_(group["lr"] * mean / (spread + group["eps"]))


def made() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"matrix": nn.Parameter(torch.randn(4, 3)), "vector": nn.Parameter(torch.randn(5))}


def stepped(steps: int, resume_after: int | None = None) -> dict[str, torch.Tensor]:
    """Parameters after some steps; at one of them, a new optimizer goes on from the state."""
    parameters = made()
    sums = GradientSums(parameters.values())
    stage = StageOptimizer(parameters, sums, CONFIG, steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        if step == resume_after:
            state = stage.state()
            stage = StageOptimizer(parameters, sums, CONFIG, steps)
            stage.restore(state)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        stage.step(0.5)
    return {name: p.detach() for name, p in parameters.items()}


def test_apex_is_chosen_where_it_is_installed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("amp_C", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "amp_C" else None)
    assert (choice(GPU), choice(CPU)) == ("apex FusedAdam", "torch AdamW, fused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert choice(GPU) == "torch AdamW, fused"


def test_apex_steps_and_resumes_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stepped(4)
    assert all(torch.equal(value, expected[name]) for name, value in stepped(4, 2).items())
    apex, inside = ModuleType("apex"), ModuleType("apex.optimizers")
    inside.FusedAdam = LikeApex  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", inside)
    monkeypatch.setattr(optimizer, "choice", lambda _device: optimizer.APEX)
    for resume_after in (None, 2):
        for name, value in stepped(4, resume_after).items():
            assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_shard_may_own_nothing() -> None:
    """More replicas than tensors: who owns none steps and saves nothing, and counts on."""
    parameters = made()
    sums = GradientSums(parameters.values())
    shards = [
        StageOptimizer(parameters, sums, CONFIG, 3, shard=shard, num_shards=3) for shard in range(3)
    ]
    assert sorted(len(names) for names in shards[0].shards) == [0, 1, 1]
    idle = next(s for s, names in zip(shards, shards[0].shards, strict=True) if not names)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    idle.step(1.0)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    state = idle.state()
    assert (state.steps, state.tensors) == (1, {})
    idle.restore(state)
