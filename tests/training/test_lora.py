"""Adapters: what they add is trained and exported, everything else stays as it was."""

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhfuse.algorithms.tally import named
from rlhfuse.config import Config
from rlhfuse.models.loading import load_model
from rlhfuse.models.lora import add_adapters
from rlhfuse.models.stage import Head
from rlhfuse.schedules.fused import fuse
from tests.models.tiny import save_tiny
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    Models,
    cut,
    digests,
    first_moments,
    make_config,
    make_plans,
    make_problem,
    make_samples,
    make_trainer,
    one_update,
    save_models,
    serial_rounds,
    two_updates,
)

pytest.importorskip("peft", reason="adapters need the package peft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def with_adapters(config: Config, *targets: str, dropout: float = 0.0) -> Config:
    replace = msgspec.structs.replace
    adapters = {"lora_rank": 4, "target_modules": targets, "lora_dropout": dropout}
    return replace(
        config,
        actor=msgspec.structs.replace(config.actor, **adapters),
        critic=msgspec.structs.replace(config.critic, **adapters),
    )


def test_the_first_loss_is_that_of_the_whole_model(models: Models, tmp_path: Path) -> None:
    """An adapter's effect is zero to begin with."""
    plain = one_update(make_config(models), 2, tmp_path / "plain")
    adapted = one_update(with_adapters(make_config(models)), 2, tmp_path / "adapted")
    for name in ("actor/pg_loss", "critic/vf_loss", "actor/entropy"):
        assert adapted[name] == pytest.approx(plain[name], rel=1e-6)
    assert adapted["actor/grad_norm"] < plain["actor/grad_norm"]


@pytest.mark.slow
def test_fused_split_and_recomputed_updates_equal_serial_ones_with_dropout(models: Models) -> None:
    problem = make_problem(2, 2)
    config = with_adapters(make_config(models), dropout=0.2)
    serial, *_ = two_updates(config, 2, serial_rounds(problem))
    split = fuse(problem, iterations=20, split_weight=True)
    for recompute in (False, True):
        apart = make_config(models, split_weight=True, recompute=recompute)
        assert two_updates(with_adapters(apart, dropout=0.2), 2, (split,))[0] == serial


def test_dropout_does_not_depend_on_the_cut_into_stages_and_microbatches(
    models: Models, tmp_path: Path
) -> None:
    config = with_adapters(make_config(models), dropout=0.2)
    one_update(config, 1, tmp_path / "whole", num_microbatches=4)
    one_update(config, 2, tmp_path / "cut")
    one_update(with_adapters(make_config(models)), 1, tmp_path / "without")
    for role in ("actor", "critic"):
        whole, cut_, without = (
            first_moments(tmp_path / name, role) for name in ("whole", "cut", "without")
        )
        for name, expected in whole.items():
            allowed = 2e-5 * float(expected.abs().max())
            assert torch.allclose(cut_[name], expected, rtol=1e-4, atol=allowed), name
        assert any(not torch.allclose(without[n], whole[n], rtol=1e-2) for n in whole)


def test_only_adapters_change_and_the_export_computes_as_the_run(
    models: Models, tmp_path: Path
) -> None:
    config = with_adapters(make_config(models, lr=1e-2), "q_proj", "down_proj")
    samples = make_samples(8)
    plans = make_plans(cut(samples, 1, 2), serial_rounds(make_problem(2, 2)))

    def run(rank: int) -> tuple[set[str], dict[str, float]]:
        trainer = make_trainer(config, rank, 2)
        before = digests(trainer)
        trainer.update(0, samples, plans, KL_COEF, [])
        after = digests(trainer)
        trainer.export_hf(tmp_path, "actor")
        trainer.save(tmp_path / "checkpoint")
        again = make_trainer(config, rank, 2)
        again.load(tmp_path / "checkpoint")
        assert digests(again) == after
        seen = named(trainer.update(1, samples, plans, KL_COEF, []))
        return {name for name in before if before[name] != after[name]}, seen

    changed, metrics = zip(*run_ranks(2, run), strict=True)
    names = {name for part in changed for name in part}
    assert names == {
        name
        for role in ("actor", "critic")
        for layer in range(4)
        for name in (
            f"{role}/model.layers.{layer}.self_attn.q_proj.weight",
            f"{role}/model.layers.{layer}.mlp.down_proj.weight",
        )
    } | {"critic/score.weight"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    sample = samples[0]
    tokens = torch.tensor([[*sample.prompt.tolist(), *sample.response.tolist()]])
    base = AutoModelForCausalLM.from_pretrained(config.actor.path)
    assert not torch.allclose(model(tokens).logits, base(tokens).logits, atol=1e-4)
    # The run's own entropy at its second step is that of the exported model.
    spread, count = 0.0, 0
    for sample in samples:
        tokens = torch.tensor([[*sample.prompt.tolist(), *sample.response.tolist()]])
        logits = model(tokens).logits[0, len(sample.prompt) - 1 : -1].detach()
        log_probs = (logits / config.rollout.temperature).log_softmax(-1)
        spread += float(-(log_probs.exp() * log_probs).sum())
        count += len(sample.response)
    entropy = next(m["actor/entropy"] for m in metrics if "actor/entropy" in m)
    assert entropy == pytest.approx(spread / count, rel=1e-5)


def test_adapters_and_their_moments_load_into_other_stages(models: Models, tmp_path: Path) -> None:
    config = with_adapters(make_config(models))
    one_update(config, 2, tmp_path / "saved")

    def load(rank: int) -> dict[str, str]:
        trainer = make_trainer(config, rank, 4)
        trainer.load(tmp_path / "saved")
        trainer.save(tmp_path / "again")
        return digests(trainer)

    def whole(rank: int) -> dict[str, str]:
        trainer = make_trainer(config, rank, 1)
        trainer.load(tmp_path / "again")
        return digests(trainer)

    found = {name: digest for part in run_ranks(4, load) for name, digest in part.items()}
    assert run_ranks(1, whole) == [found]
    for role in ("actor", "critic"):
        saved, again = (first_moments(tmp_path / f, role) for f in ("saved", "again"))
        assert set(saved) == set(again)
        assert any(".lora_A." in name for name in saved)
        assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_names_that_no_layer_has_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", seed=1)
    whole = load_model(tmp_path, head=Head.LM)
    with pytest.raises(ValueError, match="target_modules: nothing_like_it"):
        add_adapters(whole, rank=2, alpha=1, targets=("nothing_like_it",), seed=1)
