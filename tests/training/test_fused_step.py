"""Any models under one schedule: each trains as it would alone in a plain loop."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import gpipe, one_f_one_b, zb_h1
from rlhfuse.training.failure import StepFailed
from rlhfuse.training.fused_step import Batch, FusedStep, Model, Result
from tests.training.ranks import run_ranks

WIDTH, ROWS, COUNT = 24, 20, 3
Weights = dict[str, torch.Tensor]
Loss = Callable[[int, torch.Tensor], torch.Tensor]


def stages(seed: int, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        for _ in range(count)
    ]


def rows(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS + m, WIDTH, generator=generator) for m in range(COUNT)]


def mean_square(targets: list[torch.Tensor]) -> Loss:
    return lambda microbatch, out: functional.mse_loss(out, targets[microbatch]) / COUNT


def preferred(_: list[torch.Tensor]) -> Loss:
    """A reward model's: the first half of the rows is chosen over the second."""

    def loss(_: int, out: torch.Tensor) -> torch.Tensor:
        half = len(out) // 2
        return -functional.logsigmoid(out[:half, 0] - out[half : 2 * half, 0]).mean() / COUNT

    return loss


def next_tokens(targets: list[torch.Tensor]) -> Loss:
    """A draft head's: the actor's tokens, from hidden states that the actor had."""
    return lambda microbatch, out: (
        functional.cross_entropy(out, targets[microbatch].argmax(dim=1)) / COUNT
    )


# What is trained beside a first policy of two stages on ranks 0 and 1: ranks, loss, W split off.
BESIDE = {
    "a second policy": ((1, 0), mean_square, False),
    "a reward model": ((1, 0), preferred, True),
    "a draft head": ((1,), next_tokens, False),
}


def batch(inputs: list[torch.Tensor], finish: Loss) -> Batch:
    return Batch([tuple(x.shape) for x in inputs], lambda microbatch: inputs[microbatch], finish)


def adam(modules: list[nn.Module]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=1e-2)


def plain(
    seed: int, steps: int, clip: float, count: int, make: Callable[[list[torch.Tensor]], Loss]
) -> tuple[Weights, list[list[float]]]:
    """One model alone: its weights after `steps`, and every loss."""
    modules = stages(seed, count)
    optimizer = adam(modules)
    losses = []
    for step in range(steps):
        inputs, targets = rows(10 * seed + step), rows(100 + 10 * seed + step)
        found = []
        for microbatch in range(COUNT):
            loss = make(targets)(microbatch, nn.Sequential(*modules)(inputs[microbatch]))
            loss.backward()
            found.append(float(loss.detach()))
        nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found)
    return named(modules), losses


def named(modules: list[nn.Module]) -> Weights:
    return {
        f"{stage}.{name}": p.detach().clone()
        for stage, module in enumerate(modules)
        for name, p in module.named_parameters()
    }


def problem(*, second_forward_only: bool = False, second: tuple[int, ...] = (1, 0)) -> Problem:
    backward = 0 if second_forward_only else 2
    weight = 0 if second_forward_only else 1
    return Problem(
        2,
        (
            Pipeline.make("one", (0, 1), COUNT, 1, 2, weight=1),
            Pipeline.make("two", second, COUNT, 1, backward, weight=weight),
        ),
    )


@pytest.mark.parametrize("beside", BESIDE)
def test_two_models_train_together_as_each_alone(beside: str) -> None:
    second, finish, split = BESIDE[beside]
    schedule = fuse(problem(second=second), iterations=20, split_weight=split)
    both = (("one", 1, (0, 1), mean_square), ("two", 2, second, finish))
    assert schedule.problem.num_ranks == 2

    def run(rank: int) -> tuple[dict[str, Weights], list[dict[str, Result]]]:
        models = []
        for name, seed, ranks, _ in both:
            made = stages(seed, len(ranks))
            mine = {s: made[s] for s, home in enumerate(ranks) if home == rank}
            optimizer = adam(list(mine.values())) if mine else None
            models.append(Model(name, ranks, mine, optimizer, 0.3, split_weight=split))
        step = FusedStep(models, rank=rank, device=torch.device("cpu"), dtype=torch.float32)
        results = []
        for number in range(2):
            data = {
                name: batch(rows(10 * seed + number), make(rows(100 + 10 * seed + number)))
                for name, seed, _, make in both
            }
            results.append(step.update(data, schedule))
        held = {
            model.name: {
                f"{s}.{name}": p.detach()
                for s, module in model.stages.items()
                for name, p in module.named_parameters()
            }
            for model in models
        }
        step.close()
        return held, results

    per_rank = run_ranks(2, run)
    for name, seed, ranks, make in both:
        last = ranks[-1]
        weights, losses = plain(seed, 2, 0.3, len(ranks), make)
        held = {k: v for part in per_rank for k, v in part[0][name].items()}
        assert set(held) == set(weights)
        for key, expected in weights.items():
            assert torch.allclose(held[key], expected, rtol=1e-5, atol=1e-6), key
        for number in range(2):
            found = [float(x) for x in per_rank[last][1][number][name].finished]
            assert found == pytest.approx(losses[number], rel=1e-6)
            assert per_rank[1 - last][1][number][name].finished == ()


@pytest.mark.parametrize("own", [False, True])
def test_a_forward_only_model_runs_in_a_trained_one_s_bubbles(own: bool) -> None:
    """A teacher's answers for the next batch come out while the student learns from the last; and
    a policy's own log-probabilities of later mini-batches are those of before its step."""
    ranks = (0, 1) if own else (1, 0)
    schedule = fuse(
        problem(second_forward_only=True, second=ranks), iterations=20, split_weight=own
    )

    def run(rank: int) -> list[torch.Tensor]:
        mine = {s: stages(1)[s] for s in range(2) if s == rank}
        frozen = {s: stages(2)[s] for s in range(2) if ranks[s] == rank}
        step = FusedStep(
            [
                Model("one", (0, 1), mine, adam(list(mine.values())), split_weight=own),
                Model(
                    "two",
                    ranks,
                    mine if own else frozen,
                    forward_only=True,
                    weights_of="one" if own else None,
                ),
            ],
            rank=rank,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        data = {
            "one": batch(rows(1), mean_square(rows(2))),
            "two": replace(batch(rows(3), lambda _, out: out), version=step.version("two")),
        }
        result = step.update(data, schedule)
        if own:  # the policy has taken a step: it is no longer the old one
            with pytest.raises(ValueError, match=r"one as it was after 0 .*, but it has taken 1"):
                step.update(data, schedule)
            with pytest.raises(ValueError, match=r"two: Batch\.version .* FusedStep\.version"):
                step.update({**data, "two": replace(data["two"], version=None)}, schedule)
        step.close()
        return list(result["two"].finished)

    before = stages(1 if own else 2)
    answers = run_ranks(2, run)
    assert answers[ranks[0]] == []
    for got, row in zip(answers[ranks[1]], rows(3), strict=True):
        assert torch.equal(got, before[1](before[0](row)))


def with_dropout(seed: int, schedule: Schedule, recompute: bool) -> tuple[list[Weights], bool]:
    """Weights of each rank after two updates of two models that draw as they train, and whether
    torch's own generator stayed as it was."""

    def run(rank: int) -> tuple[Weights, bool]:
        models = []
        for name, ranks in (("one", (0, 1)), ("two", (1, 0))):
            stage = ranks.index(rank)
            module = nn.Sequential(stages(len(name))[stage], nn.Dropout(0.4))
            models.append(
                Model(name, ranks, {stage: module}, adam([module]), recompute=recompute, seed=seed)
            )
        step = FusedStep(models, rank=rank, device=torch.device("cpu"), dtype=torch.float32)
        before = torch.get_rng_state()
        for number in range(2):
            data = {m.name: batch(rows(number), mean_square(rows(2))) for m in models}
            step.update(data, schedule)
        step.close()
        held = {
            f"{m.name}.{key}": weight
            for m in models
            for key, weight in named(list(m.stages.values())).items()
        }
        return held, torch.equal(before, torch.get_rng_state())

    held, untouched = zip(*run_ranks(2, run), strict=True)
    return list(held), all(untouched)


def test_what_dropout_drops_does_not_depend_on_the_schedule() -> None:
    both = problem()
    first, second = (one_f_one_b(Problem(2, (pipe,))).rows for pipe in both.pipelines)
    serial = Schedule(both, tuple(a + b for a, b in zip(first, second, strict=True)))
    expected, untouched = with_dropout(1, serial, False)
    assert untouched
    for recompute in (False, True):
        found, _ = with_dropout(1, fuse(both, iterations=20), recompute)
        for rank, weights in enumerate(expected):
            assert all(torch.equal(found[rank][name], weight) for name, weight in weights.items())
    other, _ = with_dropout(2, serial, False)
    assert any(not torch.equal(other[0][name], weight) for name, weight in expected[0].items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Pipeline.make("three", (0,), COUNT, 1, 2), "called 'three'"),
        (Pipeline.make("one", (0,), COUNT + 1, 1, 2), "4 micro-batches of one, the batch has 3"),
        (Pipeline.make("one", (0,), COUNT, 1, 0), "only forward"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(wrong: Pipeline, words: str) -> None:
    schedule: Schedule = one_f_one_b(Problem(1, (wrong,)))

    def run(rank: int) -> str:
        modules = {0: stages(1)[0]}
        step = FusedStep(
            [Model("one", (0,), modules, adam(list(modules.values())))],
            rank=rank,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        with pytest.raises(ValueError, match="schedule") as caught:
            step.update({"one": batch(rows(1), mean_square(rows(2)))}, schedule)
        return str(caught.value)

    assert words in run_ranks(1, run)[0]


def test_nothing_is_stepped_when_a_gradient_is_not_finite() -> None:
    schedule = one_f_one_b(Problem(1, (Pipeline.make("one", (0,), COUNT, 1, 2),)))

    def run(rank: int) -> bool:
        module = stages(1)[0]
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        step = FusedStep(
            [Model("one", (0,), {0: module}, adam([module]))],
            rank=rank,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        with pytest.raises(FloatingPointError, match="one: the gradient norm is nan"):
            step.update({"one": batch(rows(1), lambda _, out: out.sum() * float("nan"))}, schedule)
        step.update({"one": batch(rows(1), mean_square(rows(2)))}, schedule)
        return all(torch.isfinite(p).all() for p in module.parameters()) and any(
            not torch.equal(before[name], p) for name, p in module.named_parameters()
        )

    assert run_ranks(1, run) == [True]


def in_half_precision(frozen: bool) -> nn.Module:
    module = stages(1)[0].bfloat16()
    if frozen:
        module.get_submodule("0").requires_grad_(False)
    return module


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_trains_on_gradients_summed_in_float32(split: bool, frozen: bool) -> None:
    """Also where some layers stay as they are."""
    pipeline = Pipeline.make("one", (0,), COUNT, 1, 2, weight=1)
    schedule = (zb_h1 if split else one_f_one_b)(Problem(1, (pipeline,)))
    inputs, targets = ([x.bfloat16() for x in rows(seed)] for seed in (1, 2))

    def run(rank: int) -> Weights:
        module = in_half_precision(frozen)
        model = Model("one", (0,), {0: module}, adam([module]), split_weight=split)
        step = FusedStep([model], rank=rank, device=torch.device("cpu"), dtype=torch.bfloat16)
        step.update({"one": batch(inputs, mean_square(targets))}, schedule)
        return named([module])

    module = in_half_precision(frozen)
    optimizer = adam([module])
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for microbatch in range(COUNT):
        loss = mean_square(targets)(microbatch, module(inputs[microbatch]))
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient
    for parameter, total in zip(parameters, sums, strict=True):
        parameter.grad = total.bfloat16()
    optimizer.step()
    (found,) = run_ranks(1, run)
    expected = named([module])
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_memory_that_runs_out_names_what_is_held_and_a_way_out() -> None:
    schedule = gpipe(Problem(1, (Pipeline.make("one", (0,), COUNT, 1, 2),)))

    def run(rank: int) -> str:
        module = stages(1)[0]
        model = Model("one", (0,), {0: module}, adam([module]))
        step = FusedStep([model], rank=rank, device=torch.device("cpu"), dtype=torch.float32)
        step.update({"one": batch(rows(1), mean_square(rows(2)))}, schedule)

        def greedy(microbatch: int, out: torch.Tensor) -> torch.Tensor:
            return out.sum() if microbatch < 2 else out.new_empty(2**60)  # no machine has it

        with pytest.raises(StepFailed) as caught:
            step.update({"one": batch(rows(1), greedy)}, schedule)
        return str(caught.value)

    (message,) = run_ranks(1, run)
    assert "rank 0 failed at one:0F2: out of memory (" in message
    for part in ("weights 0.0 MiB", "optimizer 0.0 MiB", "activations of 2 micro-batches"):
        assert part in message
    assert "Model.recompute" in message
