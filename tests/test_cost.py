"""The cost model: known costs are found again from spans, with stragglers and gaps."""

from dataclasses import replace

import numpy as np
import pytest

from rlhfuse.cost import CostModel, StageCost, fit
from rlhfuse.learned_cost import LearnedCost
from rlhfuse.timeline import Kind, Span, Timeline

TRUE = replace(
    CostModel.default(),
    decode_batch=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    decode_step_s=(2e-3, 2.1e-3, 2.5e-3, 3e-3, 4e-3, 7e-3),
    decode_context_s=4e-7,
    prefill_call_s=1e-3,
    prefill_token_s=3e-5,
    score_token_s={"actor": 2e-4, "critic": 1e-4, "reference": 1.7e-4, "reward": 9e-5},
    score_call_s=4e-3,
    migrate_call_s=2e-3,
    migrate_token_s=5e-6,
    weight_sync_s=0.25,
)


def _measured(seed: int, *, noise: float = 0.02, stragglers: float = 0.05) -> Timeline:
    rng = np.random.default_rng(seed)
    spans: list[Span] = []

    def add(kind: Kind, seconds: float, args: dict[str, int | float | str]) -> None:
        seconds *= 1 + noise * rng.standard_normal()
        seconds *= 5.0 if rng.random() < stragglers else 1.0
        spans.append(Span("rank0", 0.0, seconds, kind, kind.value, args))

    for _ in range(200):
        batch, context = int(rng.integers(1, 33)), float(rng.integers(100, 6000))
        steps = int(rng.integers(1, 9))
        seconds = steps * TRUE.step_s(batch, context)
        add(Kind.GENERATE, seconds, {"steps": steps, "batch": batch, "context_tokens": context})
    for _ in range(40):
        tokens = int(rng.integers(20, 2000))
        add(Kind.PREFILL, TRUE.prefill_s(tokens), {"tokens": tokens})
        add(Kind.MIGRATE, TRUE.migrate_s(tokens, with_cache=True), {"tokens": tokens})
        for role in TRUE.score_token_s:
            add(Kind.SCORE, TRUE.score_s(role, tokens), {"role": role, "tokens": tokens})
    for _ in range(4):
        add(Kind.WEIGHTS, TRUE.weight_sync_s, {})
    return Timeline(tuple(spans))


@pytest.mark.parametrize("seed", range(3))
def test_known_costs_are_found_again(seed: int) -> None:
    cost = fit(_measured(seed), CostModel.default())
    for batch in (1, 3, 6, 12, 20, 31):
        for context in (200.0, 5000.0):
            assert cost.step_s(batch, context) == pytest.approx(
                TRUE.step_s(batch, context), rel=0.08
            )
    for tokens in (100, 1500):
        assert cost.prefill_s(tokens) == pytest.approx(TRUE.prefill_s(tokens), rel=0.05)
        moved = cost.migrate_s(tokens, with_cache=True)
        assert moved == pytest.approx(TRUE.migrate_s(tokens, with_cache=True), rel=0.05)
        for role in TRUE.score_token_s:
            assert cost.score_s(role, tokens) == pytest.approx(TRUE.score_s(role, tokens), rel=0.08)
    assert cost.weight_sync_s == pytest.approx(0.25, rel=0.1)
    assert cost.basis["decode"].startswith("fitted from 200 spans")
    assert cost.basis["swap"].startswith("kept (0 spans)")
    assert cost.swap_s == CostModel.default().swap_s


def test_beyond_what_was_seen_the_shape_is_kept() -> None:
    """Twice as slow up to batch 8: the unseen part is taken to be twice as slow as well."""
    before = CostModel.default()
    spans = [
        Span("rank0", 0.0, 20 * before.step_s(b), Kind.GENERATE, "", {"steps": 10, "batch": b})
        for b in (1, 2, 3, 4, 6, 8) * 5
    ]
    cost = fit(Timeline(tuple(spans)), before)
    assert cost.step_s(64) == pytest.approx(2 * before.step_s(64), rel=0.05)
    assert cost.basis["decode_range"] == "batches 1..8 measured"
    steps = [cost.step_s(b) for b in range(1, 100)]
    assert steps == sorted(steps)


def test_nothing_measured_keeps_every_number() -> None:
    before = CostModel.default()
    after = fit(Timeline(()), before)
    assert replace(after, basis=before.basis) == before
    assert set(after.basis) >= {"decode", "prefill", "score/actor", "weights"}
    again = fit(Timeline(()), after)
    assert again.basis == after.basis  # notes do not grow with every step


def test_training_tasks_per_stage() -> None:
    spans = []
    for stage_index in (0, 1):
        for kind, factor in ((Kind.F, 1.0), (Kind.I, 1.2), (Kind.W, 0.8)):
            for tokens in (50, 100, 150):
                args: dict[str, int | float | str] = {
                    "pipeline": "actor",
                    "pp_stage": stage_index,
                    "tokens": tokens,
                }
                spans.append(Span("rank0", 0.0, 1e-4 * tokens * factor, kind, "", args))
    stage = fit(Timeline(tuple(spans)), CostModel.default()).train["actor"][1]
    expected = StageCost(1e-4, 2e-4, 0.8e-4)
    assert stage.forward_token_s == pytest.approx(expected.forward_token_s)
    assert stage.backward_token_s == pytest.approx(expected.backward_token_s)
    assert stage.weight_token_s == pytest.approx(expected.weight_token_s)


def test_json_round_trip_and_mistakes() -> None:
    cost = replace(TRUE, train={"actor": (StageCost(1.0, 2.0),)})
    assert CostModel.from_json(cost.to_json()) == cost
    with pytest.raises(ValueError, match="not a cost model"):
        CostModel.from_json(b'{"decode_batch": 3}')
    with pytest.raises(ValueError, match="must rise"):
        replace(TRUE, decode_batch=(1.0, 4.0, 3.0, 8.0, 16.0, 32.0))


def test_the_parts_of_a_migration_add_up() -> None:
    """Leaving costs 2 ms and 1 us a token, fetching 1 ms and 2 us, taking in 3 us a token."""
    parts = {"leave": (2e-3, 1e-6), "fetch": (1e-3, 2e-6), "take in": (0.0, 3e-6)}
    spans = [
        Span("rank0", 0.0, call_s + token_s * tokens, Kind.MIGRATE, name, {"tokens": tokens})
        for name, (call_s, token_s) in parts.items()
        for tokens in (40, 300, 900, 2000)
    ]
    plain = [Span("rank0", 0.0, 9.0, Kind.MIGRATE, "leave", {"samples": 1}) for _ in range(9)]
    cost = fit(Timeline((*spans, *plain)), CostModel.default())
    assert cost.migrate_s(500, with_cache=True) == pytest.approx(3e-3 + 6e-6 * 500, rel=0.02)
    few = Timeline((*spans, *(Span("", 0, 1, Kind.MIGRATE, "rare", {"tokens": 1}) for _ in "ab")))
    assert fit(few, CostModel.default()).migrate_call_s == CostModel.default().migrate_call_s


def test_what_is_seldom_is_remembered_over_steps() -> None:
    """One migration a step: none is enough to fit, three are."""
    learned = LearnedCost(CostModel.default())
    for step, tokens in enumerate((100, 400, 1600)):
        assert learned.model.migrate_call_s == CostModel.default().migrate_call_s
        span = Span("rank0", 0.0, 0.02 + 1e-5 * tokens, Kind.MIGRATE, "leave", {"tokens": tokens})
        learned.learn(Timeline((span,)))
        assert learned.model.basis["migrate"].startswith("fitted" if step == 2 else "kept")
    assert learned.model.migrate_s(800, with_cache=True) == pytest.approx(0.028, rel=0.05)
