"""Activation checkpointing holds a layer's input, and one layer at a time in the backward pass."""

import weakref
from pathlib import Path

import pytest
import torch

from rlhfuse.placement import StagePlacement
from rlhfuse.training.batch import make_microbatch
from rlhfuse.training.trained_stage import TrainedStage
from tests.training.tiny_update import make_config, make_samples, save_models

LAYERS = 3
CPU = torch.device("cpu")


class Alive:
    """How many of a layer's inner tensors are alive: now, and at most."""

    def __init__(self) -> None:
        self.made = self.peak = 0
        self._held: list[weakref.ref[torch.Tensor]] = []

    @property
    def now(self) -> int:
        return sum(ref() is not None for ref in self._held)

    def saw(self, _module: object, _inputs: object, output: torch.Tensor) -> None:
        self._held.append(weakref.ref(output))
        self.made += 1
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_layer_is_held_at_a_time(recompute: bool, split: bool, tmp_path: Path) -> None:
    stage = TrainedStage(
        make_config(save_models(tmp_path), recompute=recompute, split_weight=split),
        "actor",
        0,
        StagePlacement((0, 1), ((0, LAYERS), (LAYERS, 4))),
        device=CPU,
        dtype=torch.float32,
        total_steps=1,
    )
    alive = Alive()
    for name, module in stage.stage.named_modules():
        if name.endswith("act_fn"):
            module.register_forward_hook(alive.saw)
    samples = make_samples(4)
    stage.begin([make_microbatch([s], None, CPU, padded=False) for s in samples], 1, 1, 0)
    outputs = [stage.runner.forward(mb, None) for mb in range(4)]
    assert alive.made == 4 * LAYERS
    assert alive.now == (0 if recompute else 4 * LAYERS)
    alive.peak = 0
    for mb, output in enumerate(outputs):
        assert output is not None
        if split:
            stage.runner.input_gradient(mb, torch.ones_like(output))
            stage.runner.weight_gradient(mb)
        else:
            stage.runner.backward(mb, torch.ones_like(output))
    assert alive.made == (8 if recompute else 4) * LAYERS
    assert alive.peak == (1 if recompute else 0)  # where nothing is made again, nothing was seen
    assert alive.now == 0
