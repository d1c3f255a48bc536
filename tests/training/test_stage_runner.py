"""Split backward equals unsplit equals plain autograd; memory is released."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import gpipe, one_f_one_b
from rlhfuse.training.gradients import GradientSums, square_sum
from rlhfuse.training.split import WeightStore, split_linears
from rlhfuse.training.stage_runner import AutogradRunner

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4)
Gradients = dict[str, torch.Tensor]


def block() -> nn.Module:
    torch.manual_seed(0)
    biased = nn.Linear(32, 32)
    return nn.Sequential(nn.RMSNorm(32), LlamaMLP(CONFIG), nn.Tanh(), biased)


def data(num_microbatches: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(1, 16 * (m + 1), 32, generator=generator) for m in range(num_microbatches)
    ]
    return inputs, [torch.randn(x.shape, generator=generator) for x in inputs]


def gradients_of(module: nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def plain() -> tuple[Gradients, list[torch.Tensor]]:
    module, (inputs, outer) = block(), data(3)
    by_input = []
    for x, gradient in zip(inputs, outer, strict=True):
        x.requires_grad_()
        module(x).backward(gradient)
        assert x.grad is not None
        by_input.append(x.grad)
    return gradients_of(module), by_input


def through_runner(order: list[str], recompute: bool) -> tuple[Gradients, list[torch.Tensor]]:
    module, (inputs, outer) = block(), data(3)
    store = WeightStore(GradientSums(module.parameters()))
    split_linears(module, store)

    def compute(microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = module(received)
        return out

    runner = AutogradRunner(compute, last=False, weights=store, recompute=recompute)
    by_input = {}
    for step in order:
        mb = int(step[1])
        if step[0] == "F":
            runner.forward(mb, inputs[mb])
        elif step[0] == "B":
            by_input[mb] = runner.backward(mb, outer[mb])
        elif step[0] == "I":
            by_input[mb] = runner.input_gradient(mb, outer[mb])
        else:
            runner.weight_gradient(mb)
    assert runner.num_held == 0
    results = [by_input[mb] for mb in range(3)]
    assert all(result is not None for result in results)
    return gradients_of(module), [result for result in results if result is not None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "order", ["F0 B0 F1 B1 F2 B2", "F0 F1 I0 F2 I1 W0 I2 W1 W2", "F0 F1 F2 B0 I1 I2 W1 W2"]
)
def test_every_order_gives_the_gradients_of_plain_autograd(order: str, recompute: bool) -> None:
    expected, expected_by_input = plain()
    actual, by_input = through_runner(order.split(), recompute)
    # Bit for bit: the same products, summed in micro-batch order.
    assert all(map(torch.equal, by_input, expected_by_input))
    assert {n: torch.equal(actual[n], expected[n]) for n in expected} == dict.fromkeys(
        expected, True
    )


def test_half_precision_gradients_are_summed_in_float32() -> None:
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    sums = GradientSums(layer.parameters())
    store = WeightStore(sums)
    split = nn.Sequential(layer)
    split_linears(split, store)
    x = torch.ones(16, 8, dtype=torch.bfloat16)
    # 256 + 1 has no bfloat16 of its own: a bfloat16 sum would stay at 256.
    for scale in (256.0, 1.0):
        split(x).backward(torch.full((16, 8), scale / 16, dtype=torch.bfloat16))
    (weight,) = layer.parameters()
    total = sums.of(weight)
    assert total is not None
    assert torch.equal(total, torch.full((8, 8), 257.0))
    sums.clear()
    assert sums.of(weight) is None


def test_what_a_microbatch_saved_is_free_after_its_backward() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    module = block()
    store = WeightStore(GradientSums(module.parameters()))
    split_linears(module, store)

    def compute(microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        assert received is not None
        out: torch.Tensor = module(received)
        alive.append(weakref.ref(out))
        return out

    runner = AutogradRunner(compute, last=False, weights=store)
    inputs, outer = data(3)
    for mb in range(3):
        runner.forward(mb, inputs[mb])
    assert runner.num_held == 3
    runner.backward(0, outer[0])
    runner.input_gradient(1, outer[1])
    assert [ref() is None for ref in alive] == [True, True, False]
    assert (runner.num_held, store.num_held) == (1, 1)
    runner.weight_gradient(1)
    assert store.num_held == 0
    runner.clear()
    assert alive[2]() is None


class Counting(AutogradRunner):
    """Notes how many micro-batches are held at most."""

    peak = 0

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        out = super().forward(microbatch, received)
        self.peak = max(self.peak, self.num_held)
        return out


@pytest.mark.parametrize("order", [one_f_one_b, gpipe])
def test_microbatches_in_flight_are_those_of_the_memory_model(
    order: Callable[[Problem], Schedule],
) -> None:
    schedule = order(Problem(3, (Pipeline.make("actor", range(3), 5, 1, 2),)))
    runners = [
        Counting(lambda mb, x: torch.ones(2, requires_grad=True) * 2, last=stage == 2)
        for stage in range(3)
    ]
    for rank, row in enumerate(schedule.rows):
        for task in row:
            if task.op is Op.F:
                runners[rank].forward(task.microbatch, torch.ones(2) if rank else None)
            else:
                runners[rank].backward(task.microbatch, torch.ones(2))
    assert tuple(runner.peak for runner in runners) == peak_memory(schedule)


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 1024), (5, 1000), (64, 33, 2)])
def test_squares_are_summed_as_in_float64(shape: tuple[int, ...], scale: float) -> None:
    gradient = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    expected = float(gradient.double().square().sum())
    assert square_sum(gradient) == pytest.approx(expected, rel=1e-7, abs=0.0)
    assert square_sum(gradient.T if gradient.dim() == 2 else gradient) == pytest.approx(expected)
    assert math.isnan(square_sum(torch.cat([gradient.reshape(-1), torch.tensor([math.nan])])))


def test_a_split_layer_stays_the_module_that_it_was() -> None:
    """Also one that is a stage by itself: its class, its names, its hooks."""
    layer = nn.Linear(4, 3)
    seen: list[int] = []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[0]))
    names = list(layer.state_dict())
    store = WeightStore(GradientSums(layer.parameters()))
    split_linears(layer, store)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == names
    store.defer(0)
    layer(input=torch.ones(2, 4)).sum().backward()
    assert seen == [2]
    assert layer.weight.grad is None
    store.compute(0)
    found = gradients_of(layer)
    assert torch.equal(found["weight"], torch.full((3, 4), 2.0))
    assert torch.equal(found["bias"], torch.full((3,), 2.0))


def test_what_waits_for_its_weight_gradient_is_counted_once() -> None:
    """Three layers that read the same rows hold them once, and each its output's gradient."""
    layers = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(3))
    store = WeightStore(GradientSums(layers.parameters()))
    split_linears(layers, store)
    rows = torch.ones(16, 8)
    store.defer(0)
    sum((2 * layer(rows)).sum() for layer in layers).backward()
    assert store.nbytes == 16 * 8 * 4 + 3 * 16 * 4 * 4
    store.compute(0)
    assert store.nbytes == 0
