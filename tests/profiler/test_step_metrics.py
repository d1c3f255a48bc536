"""Step metrics of RL frameworks: stage times, bounds of the tail, in every way they are logged."""

import json
import random
from pathlib import Path

import pytest

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.readers.step_metrics import tail_bounds

VERL = {
    "timing_s/gen": 60.0,
    "timing_s/reward": 2.0,
    "timing_s/old_log_prob": 8.0,
    "timing_s/ref": 7.0,
    "timing_s/values": 6.0,
    "timing_s/adv": 0.5,
    "timing_s/update_critic": 20.0,
    "timing_s/update_actor": 24.0,
    "timing_s/step": 130.0,
    "response_length/mean": 500.0,
    "response_length/max": 8000.0,
    "response_length/min": 20.0,
    "actor/pg_loss": -0.01,
}
CONSOLE = "(TaskRunner pid=71) step:{step} - " + " - ".join(
    f"{name}:np.float64({value})" if name == "timing_s/gen" else f"{name}:{value}"
    for name, value in VERL.items()
)


def _write(folder: Path, how: str) -> Path:
    lines = {
        "file logger": [json.dumps({"step": step, "data": VERL}) for step in (3, 4)],
        "flat": [json.dumps({"step": step, **VERL}) for step in (3, 4)],
        "console": ["INFO starting", CONSOLE.format(step=3), "warning: x", CONSOLE.format(step=4)],
    }[how]
    path = folder / "train.log"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("how", ["file logger", "flat", "console"])
def test_all_ways_of_logging_give_the_same(tmp_path: Path, how: str) -> None:
    trace = open_trace([_write(tmp_path, how)])
    assert (trace.format, trace.steps) == ("step metrics", (3, 4))
    _, summary = explain(trace, 4)
    assert summary.wall_s == 130
    assert summary.bubble_fraction is None
    assert summary.causes == pytest.approx(
        {
            "generate": 60,
            "score": 21,
            "reward": 2,
            "advantage": 0.5,
            "compute": 44,
            "controller": 2.5,
        }
    )
    low, high = summary.what_if
    assert low.saving_fraction == pytest.approx(23 / 130)  # the tail is longer than all scoring
    assert high.saving_fraction == low.saving_fraction


def test_the_tail_lies_within_its_bounds() -> None:
    """Against lengths that are known: whatever their distribution, the truth is in the range."""
    rng = random.Random(3)
    for _ in range(200):
        sigma = rng.uniform(0.01, 2.0)
        lengths = sorted(
            1 + int(rng.lognormvariate(5, sigma)) for _ in range(rng.randrange(5, 500))
        )
        # The first position that under a fifth of the samples reach.
        begin = next(t for t in lengths if sum(n > t for n in lengths) < 0.2 * len(lengths))
        truth = 1 - begin / lengths[-1]
        values = {
            "response_length/mean": sum(lengths) / len(lengths),
            "response_length/max": float(lengths[-1]),
            "response_length/min": float(lengths[0]),
        }
        bounds, _ = tail_bounds(values, 1.0)
        assert bounds is not None
        assert bounds[0] - 1e-9 <= truth <= bounds[1] + 1e-9
        values["response_length/median"] = float(lengths[len(lengths) // 2])
        tighter, _ = tail_bounds(values, 1.0)
        assert tighter is not None
        assert bounds[0] <= tighter[0] - 1e-12 or tighter[0] == bounds[0]
        assert tighter[1] + 1e-9 >= truth


def test_overlapping_stages_are_told(tmp_path: Path) -> None:
    row = {"step": 1, "timing_s/gen": 10.0, "timing_s/update_actor": 8.0, "timing_s/step": 12.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    _, summary = explain(open_trace([tmp_path]), 1)
    assert any("overlap" in text for text in summary.warnings)
    assert any("cannot be bounded" in text for text in summary.warnings)
