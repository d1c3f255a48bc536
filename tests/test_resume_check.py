"""All that changed is named; what breaks a run is refused; the rest is let through."""

import msgspec
import pytest

from rlhfuse.config import Config, RewardFunctionConfig
from rlhfuse.config_file import known_keys
from rlhfuse.resume_check import _HARMLESS, _REFUSED, _SCHEDULED, _STAGES, check_resume, compare

replace = msgspec.structs.replace
BEFORE = Config()


def test_nothing_changed_is_nothing_to_tell() -> None:
    changes = check_resume(BEFORE, Config())
    assert changes.told == ()
    assert not changes.stages


def test_all_that_breaks_a_run_is_named_at_once() -> None:
    now = replace(
        BEFORE,
        actor=replace(BEFORE.actor, path="other", ppo_epochs=2),
        trainer=replace(BEFORE.trainer, seed=2),
    )
    with pytest.raises(ValueError, match="cannot resume") as told:
        check_resume(BEFORE, now)
    for part in ("actor.path: '' is now 'other'", "actor.ppo_epochs: 1 is now 2", "trainer.seed"):
        assert part in str(told.value)


def test_what_does_no_harm_is_told_as_such() -> None:
    now = replace(
        BEFORE,
        trainer=replace(BEFORE.trainer, save_freq=5, total_training_steps=9),
        fusion=replace(BEFORE.fusion, inter_stage="off"),
    )
    told = check_resume(BEFORE, now).told
    assert len(told) == 3
    assert all(line.endswith("results do not change") for line in told)


def test_what_changes_results_is_told_as_such() -> None:
    optim = replace(BEFORE.actor.optim, lr=1.0, lr_scheduler="cosine")
    now = replace(
        BEFORE,
        actor=replace(BEFORE.actor, optim=optim),
        reward=replace(BEFORE.reward, function=RewardFunctionConfig(path="f.py")),
        trainer=replace(BEFORE.trainer, total_training_steps=9),  # the schedule ends there
    )
    told = check_resume(BEFORE, now).told
    assert len(told) == 5
    assert all(line.endswith("results change from here on") for line in told)


def test_other_pipeline_stages_are_cut_anew() -> None:
    now = replace(BEFORE, placement=replace(BEFORE.placement, num_devices=4))
    changes = compare(BEFORE, now)
    assert changes.stages
    assert "equal to rounding" in changes.told[0]


def test_the_lists_name_keys_that_exist() -> None:
    known = set(known_keys())
    for key in {*_REFUSED, *_STAGES, *_SCHEDULED}:
        assert key in known
    for start in _HARMLESS:
        assert start.rstrip(".") in known
