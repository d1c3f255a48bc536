"""A resumed run goes on to the same bits; what is damaged is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhfuse.models.stage import EMBEDDING, LM_HEAD
from rlhfuse.schedules.fused import fuse
from rlhfuse.training.update import RankTrainer
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    Digests,
    Models,
    cut,
    digests,
    first_moments,
    make_config,
    make_placement,
    make_plans,
    make_problem,
    make_samples,
    make_trainer,
    one_update,
    save_models,
    serial_rounds,
    two_updates,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    tie: bool, models: Models, tied: Models, tmp_path: Path
) -> None:
    config = make_config(tied if tie else models)
    rounds = serial_rounds(make_problem(2, 2))
    expected, *_ = two_updates(config, 2, rounds)
    first, second = make_samples(8, 0), make_samples(8, 1)

    def begin(rank: int) -> None:
        trainer = make_trainer(config, rank, 2)
        trainer.update(0, first, make_plans(cut(first, 2, 2), rounds), KL_COEF, [])
        trainer.save(tmp_path)

    def go_on(rank: int) -> Digests:
        trainer = make_trainer(config, rank, 2)
        trainer.load(tmp_path)
        trainer.update(1, second, make_plans(cut(second, 2, 2), rounds), KL_COEF, [])
        return digests(trainer)

    run_ranks(2, begin)
    results = run_ranks(2, go_on)
    assert {k: v for result in results for k, v in result.items()} == expected


@pytest.mark.parametrize(("before_pp", "after_pp"), [(2, 4), (1, 2), (4, 1)])
def test_a_checkpoint_loads_into_other_stages_and_exports_to_transformers(
    before_pp: int, after_pp: int, tied: Models, tmp_path: Path
) -> None:
    config = make_config(tied)
    one_update(config, before_pp, tmp_path / "saved")

    def load(rank: int) -> Digests:
        trainer = make_trainer(config, rank, after_pp)
        trainer.load(tmp_path / "saved")
        trainer.save(tmp_path / "again")
        trainer.export_hf(tmp_path / "actor", "actor")
        trainer.export_hf(tmp_path / "critic", "critic")
        return digests(trainer)

    found = {k: v for result in run_ranks(after_pp, load) for k, v in result.items()}
    names = {name: role for name in found for role in [name.split("/")[0]]}
    assert set(names.values()) == {"actor", "critic"}
    before, after = (first_moments(tmp_path / run, "actor") for run in ("saved", "again"))
    # The end of a tied matrix that only one of both cuts has apart has the moments of the other.
    both = (
        before.setdefault(LM_HEAD, before[EMBEDDING]),
        after.setdefault(LM_HEAD, after[EMBEDDING]),
    )
    assert torch.equal(*both)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported = {
        "actor": AutoModelForCausalLM.from_pretrained(tmp_path / "actor"),
        "critic": AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic"),
    }
    for role, model in exported.items():
        saved: dict[str, torch.Tensor] = {}
        for stage in range(before_pp):
            saved |= load_file(tmp_path / "saved" / role / f"stage_{stage}.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, saved[f"weight/{name}"]), name


def test_damaged_checkpoints_are_refused(models: Models, tmp_path: Path) -> None:
    config = make_config(models)
    one_update(config, 1, tmp_path)
    path = tmp_path / "critic" / "stage_0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)

    def load(rank: int) -> str:
        with pytest.raises(ValueError, match="is damaged") as caught:
            make_trainer(config, rank, 1).load(tmp_path)
        return str(caught.value)

    assert str(path) in run_ranks(1, load)[0]


@pytest.mark.slow
def test_bfloat16_updates_keep_float32_masters_and_resume_to_the_same_bits(
    models: Models, tmp_path: Path
) -> None:
    config = make_config(models, lr=1e-5, split_weight=True)
    batches = [make_samples(8, seed) for seed in range(3)]
    schedule = fuse(make_problem(2, 2), iterations=20, split_weight=True)

    def trainer(rank: int) -> RankTrainer:
        return RankTrainer(
            config,
            rank=rank,
            world_size=2,
            pipelines=make_placement(2),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            total_steps=10,
        )

    def straight(rank: int) -> Digests:
        one = trainer(rank)
        for step, samples in enumerate(batches):
            one.update(step, samples, make_plans(cut(samples, 1, 2), (schedule,)), KL_COEF, [])
        return digests(one)

    def interrupted(rank: int) -> Digests:
        for step, samples in enumerate(batches):
            one = trainer(rank)
            if step:
                one.load(tmp_path / str(step - 1))
            rounds = serial_rounds(make_problem(2, 2))  # and serially, at that
            one.update(step, samples, make_plans(cut(samples, 1, 2), rounds), KL_COEF, [])
            one.save(tmp_path / str(step))
        return digests(one)

    assert run_ranks(2, straight) == run_ranks(2, interrupted)
    saved = load_file(tmp_path / "2" / "actor" / "stage_0.safetensors")
    moved = [
        name
        for name, tensor in saved.items()
        if name.startswith("master/")
        and not torch.equal(tensor, saved[name.replace("master", "weight", 1)].float())
    ]
    assert moved  # updates of 1e-5 are too small for bfloat16 weights, and are not lost
