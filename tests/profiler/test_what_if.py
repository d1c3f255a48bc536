"""Recovery and replay: what ran comes back, and predictions agree with simulated truth."""

from pathlib import Path

import pytest

from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.recovery import recover, schedule_name, stragglers
from rlhfuse.profiler.what_if import describe, replay, what_ifs
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import gpipe, one_f_one_b
from rlhfuse.schedules.timing import makespan, simulate
from rlhfuse.timeline import Timeline

DATA = Path(__file__).parent / "data"


def _model(ranks: int, name: str = "actor", *, mbs: int = 8, scale: float = 1.0) -> Pipeline:
    order = range(ranks) if name == "actor" else range(ranks - 1, -1, -1)
    return Pipeline.make(name, list(order), mbs, 1.0 * scale, 2.0 * scale, weight=1.0 * scale)


def _makers() -> dict[str, Schedule]:
    alone = Problem(4, (_model(4),))
    both = Problem(4, (_model(4), _model(4, "critic")))
    return {
        "1F1B": one_f_one_b(alone),
        "GPipe": gpipe(alone),
        "zero-bubble (weight gradient split off)": fuse(alone, iterations=2, split_weight=True),
        "fused": fuse(both, iterations=2),
    }


@pytest.mark.parametrize("name", list(_makers()))
def test_what_ran_comes_back(name: str) -> None:
    schedule = _makers()[name]
    (found,), warnings = recover(simulate(schedule))
    assert warnings == []
    assert found.schedule.rows == schedule.rows
    assert schedule_name(found.schedule) == name
    assert found.makespan_s == pytest.approx(makespan(schedule))
    assert replay(found.schedule, found.durations.__getitem__) == pytest.approx(found.makespan_s)
    assert describe([found]).ideal_makespan_s == pytest.approx(found.makespan_s)


@pytest.mark.parametrize("step", [2, 5, 20])
def test_the_replay_reproduces_a_real_run(step: int) -> None:
    trace = open_trace([DATA / "primus_pp8"])
    timeline = trace.load(step).timeline
    rounds, warnings = recover(timeline)
    assert warnings == []
    assert schedule_name(rounds[0].schedule) == "1F1B"
    found, told = what_ifs(rounds, timeline.wall_s)
    assert found[0].name == "as it ran, replayed"
    assert found[0].makespan_s == pytest.approx(timeline.wall_s, rel=0.03)
    assert not any("with care" in text for text in told)


def test_serial_models_predict_the_fused_time() -> None:
    """Two serial rounds with equal costs: the prediction is what fusing them really takes."""
    actor, critic = Problem(4, (_model(4),)), Problem(4, (_model(4, "critic"),))
    first = simulate(one_f_one_b(actor))
    second = simulate(one_f_one_b(critic)).shifted(first.end_s)
    timeline = Timeline.merged([first, second])
    rounds, _ = recover(timeline)
    assert len(rounds) == 2
    found, _ = what_ifs(rounds, timeline.wall_s + 5.0)
    fused = next(x for x in found if x.name.startswith("both models fused"))
    both = Problem(4, (_model(4), _model(4, "critic")))
    least = makespan(fuse(both, iterations=12))
    assert least <= fused.makespan_s - 5.0 <= 1.1 * least
    assert fused.makespan_s < timeline.wall_s


def test_a_slow_stage_and_a_slow_micro_batch_are_named() -> None:
    slow = Pipeline.make(
        "actor", [0, 1, 2, 3], 4, [1, 1, 1.5, 1], [2, 2, 3, 2], microbatch_weights=[1, 1, 1.4, 1]
    )
    rounds, _ = recover(simulate(one_f_one_b(Problem(4, (slow,)))))
    told = " ".join(stragglers(rounds))
    assert "actor stage 2: 1.50 times" in told
    assert "actor micro-batch 2: 1.40 times" in told
    assert told.count("times") == 2
    found, _ = what_ifs(rounds, rounds[0].makespan_s)
    by_name = {x.name: x for x in found}
    assert by_name["even stages"].saving_fraction > 0.05
    assert by_name["even micro-batches"].makespan_s < rounds[0].makespan_s
