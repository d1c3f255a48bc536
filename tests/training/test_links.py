"""Every message is sent once, received once, and expected in the sender's order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import gpipe, one_f_one_b
from rlhfuse.schedules.timing import channels
from rlhfuse.training.links import plan_row


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_plans_agree_with_the_channels_of_the_schedule(
    num_stages: int, num_microbatches: int, flushed: bool
) -> None:
    pipelines = (
        Pipeline.make("actor", range(num_stages), num_microbatches, 1, 2),
        Pipeline.make("critic", range(num_stages)[::-1], num_microbatches, 1, 2),
    )
    problem = Problem(num_stages, pipelines)
    schedule = gpipe(problem) if flushed else one_f_one_b(problem)
    plans = [plan_row(schedule, rank) for rank in range(num_stages)]
    expected = {
        (way.pipeline, way.source, way.target): [(m.pp_stage, m.microbatch) for m in order]
        for plan in plans
        for way, order in plan.expected.items()
    }
    independent = {
        (way.pipeline, way.source, way.target): [
            (m.consumer.pp_stage, m.consumer.microbatch) for m in way.messages
        ]
        for way in channels(schedule)
    }
    assert expected == independent
    sent = [step.sends for plan in plans for step in plan.steps if step.sends]
    received = [step.receives for plan in plans for step in plan.steps if step.receives]
    assert sorted(map(str, sent)) == sorted(map(str, received))
    assert len(set(sent)) == len(sent) == 4 * (num_stages - 1) * num_microbatches
