"""Evaluation during training: responses to held-out prompts, scored by the run's own reward."""

from collections.abc import Sequence

import msgspec

from rlhfuse.batches import validation_records
from rlhfuse.config import ValidationConfig
from rlhfuse.cost import CostModel
from rlhfuse.evaluation import ScoredResponse, evaluate
from rlhfuse.rollout.records import Record
from rlhfuse.rollout.stage import generate_and_score, validation_sampling
from rlhfuse.run_folder import TrainerState, ValidationSample
from rlhfuse.session import Session

_SAMPLES_KEPT = 12


def validate(session: Session, cost: CostModel) -> dict[str, float]:
    """Run every validation set, log ``val-core/*`` and keep samples for the report; the session's
    state learns the best value so far of the chosen metric."""
    metrics: dict[str, float] = {}
    for validation in session.run.config.data.validation:
        metrics.update(_run_set(session, validation, cost))
    if metrics:
        session.loggers.log(session.state.step, metrics)
        session.state = _with_best(session, metrics)
    return metrics


def _run_set(session: Session, validation: ValidationConfig, cost: CostModel) -> dict[str, float]:
    run = session.run
    records = validation_records(run, validation)
    roles = ("reward",) if run.config.reward.path else ()
    sampling = validation_sampling(run.config, validation, run.stop_token_ids)
    session.progress.note(
        f"validating on {validation.name}: {len(records)} responses after step {session.state.step}"
    )
    generate_and_score(session, records, sampling, roles=roles, cost=cost, overlap=True, show=False)
    session.folder.add_samples(_kept(session, validation.name, records))
    responses = [
        ScoredResponse(
            prompt=str(record.group),
            data_source=record.row.data_source,
            score=record.score,
            metrics=record.reward_metrics,
        )
        for record in records
    ]
    return evaluate(responses, name=validation.name, pass_threshold=validation.pass_threshold)


def _kept(session: Session, name: str, records: Sequence[Record]) -> list[ValidationSample]:
    decode = session.run.decode
    return [
        ValidationSample(
            session.state.step, name, decode(r.prompt), decode(r.response_ids), r.score
        )
        for r in records[:_SAMPLES_KEPT]
    ]


def _with_best(session: Session, metrics: dict[str, float]) -> TrainerState:
    state = session.state
    name = session.run.config.trainer.best_metric or next(iter(metrics))
    if name not in metrics:
        session.progress.note(
            f"trainer.best_metric={name!r} was not measured; known: {', '.join(sorted(metrics))}"
        )
        return state
    if state.best_value is not None and metrics[name] <= state.best_value:
        return state
    return msgspec.structs.replace(
        state, best_metric=name, best_value=metrics[name], best_step=state.step
    )
