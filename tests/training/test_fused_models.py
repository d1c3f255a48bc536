"""Models of a fused step that have to do with one another: replicas, tied ends, shared weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import one_f_one_b, zb_h1
from rlhfuse.training.failure import StepFailed
from rlhfuse.training.fused_step import Batch, FusedStep, Model
from tests.training.ranks import run_ranks, stay_until_the_other_ended
from tests.training.test_fused_step import (
    COUNT,
    WIDTH,
    Weights,
    adam,
    batch,
    mean_square,
    named,
    problem,
    rows,
    stages,
)

CPU = torch.device("cpu")


def make_step(models: list[Model], rank: int) -> FusedStep:
    return FusedStep(models, rank=rank, device=CPU, dtype=torch.float32)


class End(nn.Module):
    """The first or the last stage of a model whose ends share a matrix."""

    def __init__(self, shared: nn.Linear, own: nn.Linear, *, last: bool) -> None:
        super().__init__()
        self.shared, self.own, self.last = shared, own, last

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.last:
            found: torch.Tensor = self.shared(torch.tanh(self.own(inputs)))
        else:
            found = self.own(torch.tanh(self.shared(inputs)))
        return found


def tied_ends(seed: int, *, copies: bool) -> list[End]:
    """Both stages, with one matrix or (`copies`) with one each, to begin with alike."""
    torch.manual_seed(seed)
    own = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    shared = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
    shared[1].load_state_dict(shared[0].state_dict())
    second = shared[1] if copies else shared[0]
    return [End(shared[0], own[0], last=False), End(second, own[1], last=True)]


def shared_matrix(stage: nn.Module) -> nn.Parameter:
    return stage.get_submodule("shared").get_parameter("weight")


NAMES = {"one": (0, 1), "one.1": (2, 3), "two": (1, 0), "two.1": (3, 2)}
PARTS = {"one": (1, 2), "one.1": (3, 4), "two": (5, 6), "two.1": (7, 8)}  # seeds of data


@pytest.mark.parametrize("split", [False, True])
def test_replicas_and_tied_ends_train_as_one_model_on_all_data(split: bool) -> None:
    """Weights and the norm are those of a plain loop, and replicas agree on every bit."""
    pipelines = [Pipeline.make(name, ranks, COUNT, 1, 2, weight=1) for name, ranks in NAMES.items()]
    schedule = fuse(Problem(4, tuple(pipelines)), iterations=20, split_weight=split)

    def run(rank: int) -> tuple[dict[str, Weights], dict[str, float]]:
        models = []
        for name, ranks in NAMES.items():
            made = tied_ends(len(name.split(".")[0]), copies=True)
            mine: dict[int, nn.Module] = {s: made[s] for s, r in enumerate(ranks) if r == rank}
            optimizer = adam(list(mine.values())) if mine else None
            of = name.removesuffix(".1")
            models.append(
                Model(
                    name,
                    ranks,
                    mine,
                    optimizer,
                    0.05,
                    split_weight=split,
                    replica_of=of if of != name else None,
                    tied=shared_matrix,
                )
            )
        step = make_step(models, rank)
        for _ in range(2):
            data = {n: batch(rows(a), mean_square(rows(b))) for n, (a, b) in PARTS.items()}
            found = step.update(data, schedule)
        step.close()
        held = {
            m.name: {
                f"{s}.{k}": w for s, module in m.stages.items() for k, w in named([module]).items()
            }
            for m in models
        }
        return held, {name: result.grad_norm for name, result in found.items()}

    results = run_ranks(4, run)
    for name in ("one", "two"):
        modules = tied_ends(len(name), copies=False)
        whole = nn.Sequential(*modules)
        optimizer = adam([whole])
        for _ in range(2):
            for part in (name, f"{name}.1"):
                inputs, targets = (rows(seed) for seed in PARTS[part])
                for microbatch in range(COUNT):
                    mean_square(targets)(microbatch, whole(inputs[microbatch])).backward()
            norm = float(nn.utils.clip_grad_norm_(whole.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad()
        assert norm > 0.05  # and so was clipped
        expected = {f"{s}.{k}": w for s in range(2) for k, w in named([modules[s]]).items()}
        first, second = (
            {k: w for held, _ in results for k, w in held[part].items()}
            for part in (name, f"{name}.1")
        )
        assert set(first) == set(second) == set(expected)
        for key, weight in expected.items():
            assert torch.equal(first[key], second[key]), key
            assert torch.allclose(first[key], weight, rtol=1e-5, atol=1e-6), key
        assert torch.equal(first["0.0.shared.weight"], first["1.0.shared.weight"])
        for _, norms in results:
            assert norms[name] == norms[f"{name}.1"] == pytest.approx(norm, rel=1e-5)


def test_a_draft_head_learns_from_hidden_states_of_the_actor() -> None:
    """Those of the batch before, which the actor's own forward passes made on the same rank."""
    alone = one_f_one_b(Problem(2, problem().pipelines[:1]))
    both = fuse(
        Problem(2, (problem().pipelines[0], Pipeline.make("draft", (1,), COUNT, 1, 2))),
        iterations=20,
    )

    def run(rank: int) -> tuple[Weights, Weights]:
        actor = {rank: stages(1)[rank]}
        draft: dict[int, nn.Module] = {0: stages(2)[0]} if rank == 1 else {}
        step = make_step(
            [
                Model("one", (0, 1), actor, adam(list(actor.values()))),
                Model("draft", (1,), draft, adam(list(draft.values())) if draft else None),
            ],
            rank,
        )
        hidden: list[torch.Tensor] = []
        for number in range(3):
            before, hidden = hidden, []
            data = {"one": batch(rows(number), watched(mean_square(rows(10 + number)), hidden))}
            if number:
                data["draft"] = Batch(
                    [tuple(x.shape) for x in rows(0)],
                    lambda microbatch, before=before: before[microbatch],  # type: ignore[misc]
                    next_tokens(rows(10 + number)),
                )
            step.update(data, both if number else alone)
        step.close()
        return named(list(actor.values())), named(list(draft.values()))

    modules, head = stages(1), stages(2)[0]
    optimizer, heads = adam(modules), adam([head])
    hidden: list[torch.Tensor] = []
    for number in range(3):
        before, hidden = hidden, []
        loss = watched(mean_square(rows(10 + number)), hidden)
        for microbatch, inputs in enumerate(rows(number)):
            loss(microbatch, nn.Sequential(*modules)(inputs)).backward()
        for microbatch, inputs in enumerate(before):
            next_tokens(rows(10 + number))(microbatch, head(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        heads.step()
        heads.zero_grad()
    found = run_ranks(2, run)
    for rank, module in enumerate(modules):
        for key, weight in named([module]).items():
            assert torch.equal(found[rank][0][key], weight), key
    moved = {key: weight for key, weight in named([head]).items()}
    assert any(not torch.equal(weight, named([stages(2)[0]])[key]) for key, weight in moved.items())
    assert all(torch.equal(found[1][1][key], weight) for key, weight in moved.items())


def watched(
    loss: Callable[[int, torch.Tensor], torch.Tensor], hidden: list[torch.Tensor]
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def finish(microbatch: int, out: torch.Tensor) -> torch.Tensor:
        hidden.append(out.detach())
        return loss(microbatch, out)

    return finish


def next_tokens(targets: list[torch.Tensor]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    return lambda microbatch, out: (
        functional.cross_entropy(out, targets[microbatch].argmax(dim=1)) / COUNT
    )


@pytest.mark.parametrize("order", [one_f_one_b, zb_h1])
def test_a_model_whose_first_stage_is_frozen_trains_the_rest(
    order: Callable[[Problem], Schedule],
) -> None:
    schedule = order(Problem(2, problem().pipelines[:1]))

    def run(rank: int) -> Weights:
        module = stages(1)[rank].requires_grad_(rank == 1)
        optimizer = adam([module]) if rank else None
        step = make_step(
            [Model("one", (0, 1), {rank: module}, optimizer, split_weight=order is zb_h1)], rank
        )
        for number in range(2):
            step.update({"one": batch(rows(number), mean_square(rows(9)))}, schedule)
        step.close()
        return named([module])

    first, last = stages(1)
    first.requires_grad_(False)
    optimizer = adam([last])
    for number in range(2):
        for microbatch, inputs in enumerate(rows(number)):
            mean_square(rows(9))(microbatch, last(first(inputs))).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, module in zip(run_ranks(2, run), (first, last), strict=True):
        assert all(torch.equal(found[key], weight) for key, weight in named([module]).items())


class Broken(torch.optim.SGD):
    """Fails as it steps, as where memory runs out for states."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise MemoryError("no room for states")


@pytest.mark.parametrize("place", ["the last task", "the optimizer"])
def test_a_rank_that_fails_late_ends_all_ranks_at_once(place: str) -> None:
    """Also one that has run its own tasks, and would call the update done."""
    pipelines = [Pipeline.make(name, (rank,), COUNT, 1, 2) for rank, name in enumerate("ab")]
    schedule = fuse(Problem(2, tuple(pipelines)), iterations=5)

    def spoilt(microbatch: int, out: torch.Tensor) -> torch.Tensor:
        if microbatch == COUNT - 1:
            raise ArithmeticError("the loss broke")
        return out.sum()

    def run(rank: int) -> str:
        models = []
        for home, name in enumerate("ab"):
            module = stages(1)[0]
            kind = Broken if (name, place) == ("b", "the optimizer") else torch.optim.SGD
            optimizer = kind(module.parameters(), lr=0.1)
            mine: dict[int, nn.Module] = {0: module} if home == rank else {}
            models.append(Model(name, (home,), mine, optimizer if mine else None))
        step = make_step(models, rank)
        bad = spoilt if place == "the last task" else mean_square(rows(3))
        data = {"a": batch(rows(1), mean_square(rows(2))), "b": batch(rows(1), bad)}
        with pytest.raises(StepFailed) as caught:
            step.update(data, schedule)
        step.close()  # may be closed again
        stay_until_the_other_ended(rank, 1 - rank)
        return str(caught.value)

    for message in run_ranks(2, run):
        if place == "the optimizer":
            assert "rank 1 failed after the tasks of update 1: out of memory (no room" in message
        else:
            assert "rank 1 failed at b:0F2: ArithmeticError: the loss broke" in message


def own_adam(module: nn.Module) -> torch.optim.Optimizer:
    return adam([module])


def shared_between_two(first: nn.Module) -> list[Model]:
    return [
        Model("a", (0,), {0: first}, own_adam(first)),
        Model("b", (0,), {0: nn.Sequential(first)}, own_adam(first)),
    ]


def shared_unsaid(first: nn.Module) -> list[Model]:
    return [
        Model("a", (0,), {0: first}, own_adam(first)),
        Model("b", (0,), {0: first}, forward_only=True),
    ]


def half_stepped(first: nn.Module) -> list[Model]:
    return [Model("a", (0,), {0: first}, own_adam(first.get_submodule("0")))]


def stepping_others(first: nn.Module) -> list[Model]:
    return [Model("a", (0,), {0: first}, adam([first, stages(2)[0]]))]


def weights_of_nobody(first: nn.Module) -> list[Model]:
    return [Model("a", (0,), {0: first}, forward_only=True, weights_of="c")]


def replica_beside_itself(first: nn.Module) -> list[Model]:
    a = Model("a", (0,), {0: first}, own_adam(first))
    return [a, replace(a, name="b", stages={0: stages(1)[0]}, optimizer=None, replica_of="a")]


def replica_of_nobody(first: nn.Module) -> list[Model]:
    return [Model("a", (0,), {0: first}, own_adam(first), replica_of="c")]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (shared_between_two, r"b trains a parameter \(24, 24\) that a trains too"),
        (shared_unsaid, "b holds parameters that a trains: say so .weights_of='a'."),
        (half_stepped, "2 parameters require a gradient and are not in the optimizer: add them"),
        (stepping_others, "the optimizer has parameters of no stage"),
        (weights_of_nobody, "a: weights_of 'c'"),
        (replica_beside_itself, r"b: on ranks \(0,\), a on \(0,\)"),
        (replica_of_nobody, "a: replica_of 'c'"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(
    make: Callable[[nn.Module], list[Model]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_step(make(stages(1)[0]), 0)


def test_a_schedule_without_one_of_two_replicas_is_refused() -> None:
    pipelines = [Pipeline.make(name, (rank,), COUNT, 1, 2) for rank, name in enumerate("ab")]

    def run(rank: int) -> str:
        models = []
        for home, name in enumerate("ab"):
            mine: dict[int, nn.Module] = {0: stages(1)[0]} if home == rank else {}
            optimizer = adam(list(mine.values())) if mine else None
            models.append(
                Model(name, (home,), mine, optimizer, replica_of="a" if name == "b" else None)
            )
        step = make_step(models, rank)
        data = {"a": batch(rows(1), mean_square(rows(2)))}
        with pytest.raises(ValueError, match="runs replicas of a, but not b") as caught:
            step.update(data, one_f_one_b(Problem(2, tuple(pipelines[:1]))))
        return str(caught.value)

    assert len(run_ranks(2, run)) == 2
