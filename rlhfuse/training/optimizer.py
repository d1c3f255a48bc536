"""AdamW on one stage's parameters, with float32 masters where the parameters are narrower."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rlhfuse.config import OptimConfig
from rlhfuse.training.gradients import GradientSums

APEX, TORCH = "apex FusedAdam", "torch AdamW, fused"


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine down to
    ``min_lr_ratio`` of the peak at `total_steps`."""
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.lr_scheduler == "constant":
        return config.lr
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    fall = 1.0 - share if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """`tensors`: ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and, for narrow parameters,
    ``master/NAME``; none of the first two before the first step."""

    steps: int
    tensors: Mapping[str, torch.Tensor]


class StageOptimizer:
    """Weight decay applies to matrices alone, as in Megatron: not to norms and biases.

    With several shards (ZeRO stage 1, arXiv 1910.02054) it keeps moments and masters of its own
    share of the parameters and steps those alone: the others' new values must be brought to it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sums: GradientSums,
        config: OptimConfig,
        total_steps: int,
        *,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        self._all = dict(parameters)
        self.shards = divide(self._all, num_shards)
        self._parameters = {name: self._all[name] for name in self.shards[shard]}
        self._sums = sums
        self._config = config
        self._total_steps = total_steps
        self._steps = 0
        self._masters = {name: _master(p) for name, p in self._parameters.items()}
        matrices = [p for p in self._masters.values() if p.dim() > 1]
        vectors = [p for p in self._masters.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Of many replicas, one may own nothing of a small stage.
        self._adam = _make_adam(groups, config) if groups else None

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self._config, self._steps, self._total_steps)

    def square_sum(self, leave_out: nn.Parameter | None) -> float:
        """Sum of squares of all gradients, float64. `leave_out`: counted on another stage."""
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64)
            for parameter in self._all.values()
            if parameter is not leave_out and (gradient := self._sums.of(parameter)) is not None
        ]
        return float(torch.stack(norms).square().sum()) if norms else 0.0

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with the summed gradients times `scale`; then forget the gradients."""
        for name, parameter in self._parameters.items():
            gradient = self._sums.of(parameter)
            if gradient is not None and scale != 1.0:
                gradient.mul_(scale)
            self._masters[name].grad = gradient
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = self.lr
            self._adam.step()
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is not parameter:
                parameter.copy_(master)
                master.grad = None
        self._sums.clear()
        self._steps += 1

    def state(self) -> OptimizerState:
        """What a checkpoint needs; tensors are shared, not copied."""
        tensors: dict[str, torch.Tensor] = {}
        states = {} if self._adam is None else self._adam.state
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                tensors[f"master/{name}"] = master.detach()
            moments = states.get(master, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    tensors[f"{key}/{name}"] = moments[key]
        return OptimizerState(self._steps, tensors)

    @torch.no_grad()
    def restore(self, state: OptimizerState) -> None:
        """Go on from `state`. The parameters themselves must have been restored already."""
        self._steps = state.steps
        if self._adam is None:
            return
        for name, master in self._masters.items():
            if master is not self._parameters[name]:
                saved = state.tensors.get(f"master/{name}")
                master.copy_(self._parameters[name] if saved is None else saved)
            self._adam.state.pop(master, None)
            if f"exp_avg/{name}" not in state.tensors:
                continue
            self._adam.state[master] = {
                key: state.tensors[f"{key}/{name}"].to(master.device).clone()
                for key in ("exp_avg", "exp_avg_sq")
            }
            if isinstance(self._adam, torch.optim.AdamW):
                steps = torch.tensor(float(state.steps), device=master.device)
                self._adam.state[master]["step"] = steps
        for group in self._adam.param_groups:
            if not isinstance(self._adam, torch.optim.AdamW):
                group["step"] = state.steps  # apex counts per group


def divide(parameters: Mapping[str, nn.Parameter], num_shards: int) -> tuple[tuple[str, ...], ...]:
    """Names by shard, of nearly equal numbers of elements: large ones first, each to the shard
    that has least. Every name once; a function of names and shapes alone."""
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    filled = [0] * num_shards
    for name in sorted(parameters, key=lambda n: (-parameters[n].numel(), n)):
        least = filled.index(min(filled))
        shards[least].append(name)
        filled[least] += parameters[name].numel()
    order = list(parameters)
    return tuple(tuple(sorted(shard, key=order.index)) for shard in shards)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())


def choice(device: torch.device) -> str:
    """Which AdamW runs on `device`: apex's, which takes all tensors in one kernel, where it is
    installed on a GPU; else torch's fused one."""
    apex = device.type == "cuda" and importlib.util.find_spec("amp_C") is not None
    return APEX if apex else TORCH


def _make_adam(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.Optimizer:
    parameters = groups[0]["params"]
    assert isinstance(parameters, list)
    if choice(parameters[0].device) == APEX:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        apex: torch.optim.Optimizer = FusedAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True
        )
        return apex
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
