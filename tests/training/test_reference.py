"""Reference log-probabilities of later mini-batches come out of the update itself, to the bit."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest
import torch

from rlhfuse import scoring
from rlhfuse.algorithms.tally import named
from rlhfuse.config import AlgorithmConfig, Config
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head
from rlhfuse.placement import StagePlacement, reference_ranks
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.records import MiniBatchPlan, SampleData
from rlhfuse.training.update import RankTrainer
from rlhfuse.update_plan import (
    StageCosts,
    TrainedSample,
    UpdatePlan,
    forward_only,
    later_samples,
    plan_update,
)
from tests.training.ranks import run_ranks
from tests.training.tiny_update import KL_COEF, Digests, make_config, make_samples, save_models

LAYERS = ((0, 2), (2, 4))
COSTS = {
    "actor": StageCosts((1.0, 1.2), (2.0, 2.4), (1.0, 1.2)),
    "reference": forward_only((1.0, 1.2)),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Four mini-batches, two of them in the second epoch; KL to the starting actor in the loss."""
    change = msgspec.structs.replace
    base = make_config(save_models(tmp_path_factory.mktemp("models")))
    actor = change(
        base.actor, use_kl_loss=True, ppo_mini_batch_size=4, num_microbatches=2, ppo_epochs=2
    )
    return change(
        base,
        actor=actor,
        algorithm=AlgorithmConfig(adv_estimator="grpo"),
        data=change(base.data, train_batch_size=8),
    )


def scored(config: Config) -> list[SampleData]:
    """Samples with what a rollout worker's scorer says of them."""
    reference = load_model(config.actor.path, head=Head.LM)
    samples = make_samples(16)
    tokens = [scoring.Tokens(s.prompt, s.response) for s in samples]
    found = scoring.token_logprobs(reference, tokens, temperature=0.7, token_budget=64)
    return [
        replace(s, reference_logprobs=f, values=None) for s, f in zip(samples, found, strict=True)
    ]


def planned(
    config: Config,
    samples: list[SampleData],
    actor: Mapping[str, StagePlacement],
    reference: Mapping[str, StagePlacement] | None,
) -> UpdatePlan:
    num_ranks = 1 + max(rank for place in actor.values() for rank in place.ranks)
    placement = msgspec.structs.replace(config.placement, num_devices=num_ranks)
    return plan_update(
        msgspec.structs.replace(config, placement=placement),
        [TrainedSample(s.sample_id, s.group, len(s.prompt) + len(s.response)) for s in samples],
        actor,
        COSTS,
        roles=("actor",),
        fused=reference is not None,
        step=1,
        reference=reference,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_update_is_that_of_references_known_beforehand(
    config: Config, num_replicas: int
) -> None:
    blocks = {("actor", "actor.1")[i]: (2 * i, 2 * i + 1) for i in range(num_replicas)}
    actor = {name: StagePlacement(ranks, LAYERS) for name, ranks in blocks.items()}
    beside = {n: StagePlacement(ranks, LAYERS) for n, ranks in reference_ranks(blocks).items()}
    samples = scored(config)
    later = later_samples(config, [(s.sample_id, s.group) for s in samples], 1)
    assert len(later) == 8
    without = [replace(s, reference_logprobs=None) if s.sample_id in later else s for s in samples]
    serial = planned(config, samples, actor, None)
    fused = planned(config, samples, actor, beside)
    assert set(fused.forward_samples) == later
    assert fused.predicted_s < fused.serial_s

    def run(rank: int) -> list[tuple[Digests, dict[str, float], list[Span]]]:
        results = []
        for given, plan in ((samples, serial), (without, fused)):
            trainer = RankTrainer(
                config,
                rank=rank,
                world_size=2 * num_replicas,
                pipelines=actor,
                reference=beside,
                device=torch.device("cpu"),
                dtype=torch.float32,
                total_steps=10,
            )
            plans = [MiniBatchPlan(b.microbatches, b.rounds, b.forward) for b in plan.minibatches]
            spans: list[Span] = []
            metrics = named(trainer.update(1, given, plans, KL_COEF, spans))
            results.append((trainer.digest("actor"), metrics, spans))
        return results

    for before, within in run_ranks(2 * num_replicas, run):
        assert within[:2] == before[:2]
        forward = [s for s in within[2] if str(s.args.get("pipeline")).startswith("reference")]
        assert [s.kind for s in forward if s.kind is not Kind.WAIT] == [Kind.F] * 2
        assert not [s for s in before[2] if str(s.args.get("pipeline")).startswith("reference")]
